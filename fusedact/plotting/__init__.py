"""Pictures. matplotlib is imported when one is drawn."""

from fusedact.plotting.charts import accuracy as accuracy
from fusedact.plotting.charts import memory as memory
from fusedact.plotting.charts import roofline as roofline
from fusedact.plotting.charts import speedups as speedups
from fusedact.plotting.curves import sweep as sweep
from fusedact.plotting.curves import training_curves as training_curves
from fusedact.plotting.files import png as png
