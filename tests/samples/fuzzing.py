"""What is fuzzed, by name, and what was once found wrong: test_fuzz.py runs both, tools/fuzz.py for hours."""

from math import inf as inf  # as examples print them
from math import nan as nan
from typing import Any

from samples.fuzzed_calls import Array as Array
from samples.fuzzed_calls import Call, calls, verdict
from samples.fuzzed_files import PARSERS, File, files
from samples.fuzzed_networks import Network, networks
from samples.fuzzed_ops import OPS

OF_OPS: dict[str, Any] = {name: calls(name, op) for name, op in OPS.items()}
OF_NETWORKS: dict[str, Any] = {"networks": networks()}
OF_FILES: dict[str, Any] = {name: files(name) for name in PARSERS}
TARGETS = OF_OPS | OF_NETWORKS | OF_FILES


def problem(example: Call | Network | File) -> str | None:
    """What is wrong with ours, or None."""
    return verdict(OPS[example.op], example)[0] if isinstance(example, Call) else example.problem()


REGRESSIONS: dict[str, Call | Network | File] = {
    "tanhshrink near 0": Call("tanhshrink", {"input": Array(shape=(1000,), scale=0.001)}),
    "tanhshrink near 0, one number": Call("tanhshrink", {"input": Array(shape=(), scale=0.001)}, seed=35),
    "a head's ignored row of NaN": Call(
        "linear_cross_entropy",
        {
            "input": Array(shape=(15,)),
            "linear_weight": Array(shape=(1, 15), odd=(nan,), grad=False),
            "target": Array(shape=(), kind="integers", odd=(-100,), grad=False),
        },
    ),
}
