"""Pictures. matplotlib is imported when one is drawn."""

from fusedact.plotting.curves import sweep as sweep
from fusedact.plotting.curves import training_curves as training_curves
from fusedact.plotting.files import png as png
