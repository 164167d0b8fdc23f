"""fusedact.functional under torch's name for it: one module object, two import paths."""

import sys

from fusedact import functional

sys.modules[__name__] = functional
