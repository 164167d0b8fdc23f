"""Where and how much the suites of a session measure."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import pytest
import torch

from fusedact.profiling import ceilings
from fusedact.profiling.machine import machine, processor
from fusedact.profiling.timing import Effort, undisturbed

THREADS = 1  # of torch on a CPU


@dataclass
class Setting:
    """The device, the effort of a measurement, and the ceilings measured so far. smoke: nothing here is a figure."""

    device: torch.device
    effort: Effort
    smoke: bool
    ceilings: dict[str, float] = field(default_factory=dict)

    @cached_property
    def machine(self) -> dict:
        return machine(self.device, THREADS) | ({"smoke": True} if self.smoke else {})

    @property
    def info(self) -> dict:
        """What any benchmark's extra_info has of it."""
        return {key: self.machine[key] for key in ("device", "threads", "smoke") if key in self.machine}

    @property
    def host_info(self) -> dict:
        """As info, of what a CPU's thread is timed at, whatever the device."""
        return self.info | {"device": processor()}

    def ceilings_with(self, rate: str | None) -> dict[str, float]:
        """The ceilings, that of a copy and this one among them."""
        missing = [name for name in (ceilings.COPY, rate) if name and name not in self.ceilings]
        with undisturbed(self.device, THREADS) if missing else nullcontext():
            self.ceilings |= ceilings.measured(missing, self.device, self.effort)
        return self.ceilings


SETTING = pytest.StashKey[Setting]()
