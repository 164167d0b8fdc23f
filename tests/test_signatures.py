"""Every fused function can be called as torch's of the same name: its arguments, their order and their defaults."""

import ast
import inspect
import types
from inspect import Parameter

import pytest
import torch.nn.functional as F

from fusedact import functional

OURS = {
    name: function
    for name, function in vars(functional).items()
    if isinstance(function, types.FunctionType) and not name.startswith("_") and hasattr(F, name)
}


def own(function):
    return [p for p in inspect.signature(function).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]


def told(function):
    """Names and defaults of what is written in C++, from the first line of its help."""
    line = next(line for line in function.__doc__.splitlines() if line.strip())
    arguments = ast.parse(f"def told({line.partition('(')[2].partition(' ->')[0]}: ...").body[0].args
    defaults = [ast.literal_eval(default) for default in arguments.defaults]
    required = [Parameter.empty] * (len(arguments.args) - len(defaults))
    return [(a.arg, default) for a, default in zip(arguments.args, [*required, *defaults], strict=True)]


@pytest.mark.parametrize("name", sorted(OURS))
def test_arguments_and_defaults_are_torchs(name):
    ours, stock = own(OURS[name]), getattr(F, name)
    try:
        expected = [(p.name, p.default, p.kind) for p in own(stock)]
        shared = [(p.name, p.default, p.kind) for p in ours]
    except ValueError:
        expected, shared = told(stock), [(p.name, p.default) for p in ours]
    assert shared[: len(expected)] == expected
    assert all(p.kind is Parameter.KEYWORD_ONLY and not p.default for p in ours[len(expected) :])
