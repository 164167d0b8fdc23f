"""S9, the tutorials' losses: what their snippets print, and which output goes with which loss, shown on data."""

from fusedact.catalogue.comparing import Comparison as Comparison
from fusedact.catalogue.comparing import Outcome as Outcome
from fusedact.catalogue.comparing import compare as compare
from fusedact.catalogue.pairings import TASKS as TASKS
from fusedact.catalogue.pairings import Pairing as Pairing
from fusedact.catalogue.pairings import Task as Task
from fusedact.catalogue.snippets import SNIPPETS as SNIPPETS
from fusedact.catalogue.snippets import Snippet as Snippet
from fusedact.catalogue.snippets import Values as Values
from fusedact.catalogue.snippets import values as values
