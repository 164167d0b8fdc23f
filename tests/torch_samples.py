"""PyTorch's own tests with fusedact in torch's place: OpInfo's samples and ModuleInfo's inputs.

`python tests/torch_samples.py fallback`, or `kernels`, then nothing, `functions`, `modules` or part of a name. It is a
process of its own, since importing op_db switches torch's global backend flags off. Standard output: a JSON line for
each function or module of ours, kind of check, and dtype. Standard error: the table of them, and apart, counted as
nothing, the names that merely fall through.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton, which reads it

from samples import derivatives, functions, modules
from samples.cases import DEVICE, FLOATS, Case
from samples.outcomes import Launches
from torch.testing._internal.common_utils import set_rng_seed

import fusedact


def checks(kernels: bool, what: str) -> Iterator[Callable[[], Case]]:
    """Every check of functions or of modules, or of those whose name has `what` in it."""
    for function in functions.discover()[0]:
        if what == "functions" or what in function.name:
            for dtype in FLOATS:
                yield partial(functions.values, function, dtype)
                yield partial(functions.gradients, function, dtype)
            for kind in ("gradcheck", "gradgradcheck"):
                yield partial(derivatives.derivatives, function, kind)
            yield partial(functions.error_inputs, function)
            yield partial(functions.other_dtypes, function)
            yield partial(functions.in_place, function)
            yield partial(functions.out, function)
            yield partial(functions.signature, function)
    for module in modules.discover()[0]:
        if what == "modules" or what in module.name:
            for dtype in FLOATS:
                yield partial(modules.values, module, dtype)
            yield partial(modules.errors, module)
            if not kernels:
                yield partial(modules.copies, module)


def told(case: Case, seconds: float) -> str:
    parts = [f"{case.samples} samples", f"{case.fused} fused", f"{seconds:.1f} s"]
    parts += [f"{case.empty} empty"] if case.empty else []
    parts += [f"{count} left to torch since {reason}" for reason, count in case.left.items()]
    parts += [f"{case.other_strides} with other strides than torch's"] if case.other_strides else []
    parts += [f"skipped: {case.skipped}"] if case.skipped else []
    parts += [f"{case.failed} FAILED, as {case.failures[0]}"] if case.failed else []
    return f"{case.name:28} {case.kind:14} {case.dtype:15} {', '.join(parts)}"


def main(mode: str, what: str = "") -> None:
    torch.set_num_threads(1)
    torch.set_warn_always(True)  # else only the first of two calls warns
    kernels = mode == "kernels"
    if kernels:
        fusedact.set_backend("triton")
        Launches.counted()
        torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody wrote is NaN
    else:
        fusedact.set_backend("auto" if DEVICE == "cpu" else "torch")
    for check in checks(kernels, what):
        set_rng_seed(0)
        started = time.process_time()
        case = check()
        seconds = time.process_time() - started
        print(json.dumps(asdict(case) | {"seconds": seconds}), flush=True)
        print(told(case, seconds), file=sys.stderr)
    others = functions.discover()[1] + modules.discover()[1]
    print(json.dumps({"fall through": others}))
    print(f"counted as nothing, since they fall through: {' '.join(others)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
