"""Times, traces and rooflines: what is measured, against whom, and how."""
