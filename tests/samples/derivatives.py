"""gradcheck and gradgradcheck in float64 as TestGradients runs them, with what op_db says of each entry.

To spare the interpreter, the kernels get the fast mode, and second derivatives of one layout of the gradient.
"""

import re
import warnings
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from samples.cases import DEVICE, Case, skips
from samples.functions import Function, leaves_of
from samples.outcomes import Launches
from torch.testing._internal.common_methods_invocations import SampleInput
from torch.testing._internal.common_utils import gradcheck, gradgradcheck
from torch.utils._pytree import tree_map

import fusedact

SPARED = {"linear_cross_entropy": 12}  # of so many samples the kernels get one: each takes several products
NO_SECOND = "derivative for .* is not implemented"


def derivatives(function: Function, kind: str) -> Case:
    case = Case(function.name, kind, str(torch.float64))
    check, test = {
        "gradcheck": (_first_order, "test_fn_grad"),
        "gradgradcheck": (_second_order, "test_fn_gradgrad"),
    }[kind]
    for info in function.infos:
        if not info.supports_autograd or torch.float64 not in info.supported_backward_dtypes(DEVICE):
            case.skipped = "torch's has no gradient in float64"
        elif skips(info, "TestBwdGradients", test, torch.float64):
            case.skipped = f"op_db skips TestBwdGradients.{test}"
        else:
            samples = info.sample_inputs(DEVICE, torch.float64, requires_grad=True)
            for sample in islice(samples, 0, None, SPARED.get(function.name, 1) if _through_kernels() else 1):
                before = Launches.count
                case.judge(sample, check(info, function.ours, sample))
                case.fused += Launches.count > before
    return case


def _first_order(info: Any, function: Callable, sample: SampleInput) -> str | None:
    forward_ad = info.supports_forward_ad and not skips(info, "TestFwdGradients", "test_forward_mode_AD", torch.float64)
    return _failing(
        gradcheck,
        *_recomposed(info, function, sample),
        check_batched_grad=info.check_batched_grad,
        check_grad_dtypes=True,
        nondet_tol=info.gradcheck_nondet_tol,
        fast_mode=_through_kernels() or info.gradcheck_fast_mode,
        check_forward_ad=forward_ad,
        check_undefined_grad=True,
    )


def _second_order(info: Any, function: Callable, sample: SampleInput) -> str | None:
    """None, or what is wrong. Where torch has no second derivative, its error must come, as test_fn_fail_gradgrad."""
    problem = None
    for non_contiguous in (True,) if _through_kernels() else (False, True):
        problem = problem or _failing(
            gradgradcheck,
            *_recomposed(info, function, sample),
            gen_non_contig_grad_outputs=non_contiguous,
            check_batched_grad=info.check_batched_gradgrad,
            check_grad_dtypes=True,
            nondet_tol=info.gradcheck_nondet_tol,
            fast_mode=_through_kernels() or info.gradcheck_fast_mode,
        )
    if info.supports_gradgrad:
        return problem
    return None if problem and re.search(NO_SECOND, problem) else f"{problem}, where torch has no second derivative"


def _through_kernels() -> bool:
    return fusedact.get_backend() == "triton"


def _failing(check: Callable, *args: Any, **options: Any) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check(*args, **options)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


def _recomposed(info: Any, function: Callable, sample: SampleInput) -> tuple[Callable, tuple[torch.Tensor, ...]]:
    """A function of the tensors that want a gradient, and those tensors."""
    leaves = leaves_of(sample)

    def call(*inputs: torch.Tensor) -> Any:
        given = {id(leaf): x for leaf, x in zip(leaves, inputs, strict=True)}
        args, kwargs = tree_map(lambda t: given.get(id(t), t), ([sample.input, *sample.args], sample.kwargs))
        return sample.output_process_fn_grad(info.gradcheck_wrapper(function, *args, **kwargs))

    return call, tuple(leaves)
