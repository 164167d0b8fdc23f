"""A model that someone else wrote, run fused, in place."""

from fusedact.fusion.fusing import fuse as fuse
from fusedact.fusion.fusing import report as report
from fusedact.fusion.fusing import unfuse as unfuse
