"""Whole training runs: `fit`, and `fit_many` for thousands of small networks at once."""

from fusedact.fitting.many import FittedMany as FittedMany
from fusedact.fitting.many import fit_many as fit_many
from fusedact.fitting.training import ENGINES as ENGINES
from fusedact.fitting.training import Fitted as Fitted
from fusedact.fitting.training import Training as Training
from fusedact.fitting.training import fit as fit
