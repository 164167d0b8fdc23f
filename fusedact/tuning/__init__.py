"""Which kernel takes a product: measured on this GPU where `fusedact tune` was run there, else by a written rule."""

from fusedact.tuning.candidates import HEAD as HEAD
from fusedact.tuning.candidates import LEAST_ALIGNED as LEAST_ALIGNED
from fusedact.tuning.candidates import Chip as Chip
from fusedact.tuning.candidates import Problem as Problem
from fusedact.tuning.candidates import by_rule as by_rule
from fusedact.tuning.candidates import candidates as candidates
from fusedact.tuning.records import choose as choose
from fusedact.tuning.records import prefers_stock as prefers_stock
