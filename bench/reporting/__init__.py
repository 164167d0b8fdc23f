"""Records of bench/results as tables and charts, for bench/report.py."""
