"""Judgement of an adapted layer under autocast (torch's automatic mixed precision), or with a backward pass under it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from harness.conformance.case import Case
from harness.conformance.comparison.call_forms import Call
from harness.conformance.comparison.check_results import named_if_raised
from harness.conformance.comparison.inputs import HALF, cast
from harness.conformance.comparison.layer_comparison import PlausibleResults
from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.comparison.observations import observe
from harness.conformance.comparison.operation_call import ill_formed
from harness.conformance.comparison.tolerance_policies import Judgement, noise_floor
from harness.conformance.subject import DTYPES, ReferenceLayer, Subject, load
from harness.conformance.tolerance_constants import AUTOCAST_FACTOR, PERTURBED_DRAWS

UNDER_AUTOCAST, UNDER_AUTOCAST_AFTER_CHANGE = "under autocast to {}", "under autocast after a change to {}"
BACKWARD_UNDER_AUTOCAST = "with backward under autocast to {}"
"""Names of the three forms. `{}` stands for the name of the dtype."""


def judge_under_autocast(subject: Subject, case: Case, path: str, call: Call) -> Iterator[tuple[str, Judgement]]:
    """Yield each form's name, and a judgement of output and gradients under autocast to 16 bits.

    The layer, in float32, is called before and after its tensors change. After the change, the input has the dtype of
    autocast, as the output of an earlier layer would have. Then the layer runs without autocast, and the backward pass
    with it, as in a program that calls `loss.backward()` inside the context.

    Autocast rounds to bfloat16 or float16, so errors may be as large as rounding errors of 16 bits. The output must
    have the dtype of autocast or of the reference's output, because later layers may refuse a mixture of dtypes. A
    packed (4-bit) layer may return the dtype of its input, as bitsandbytes does.
    """
    wide, own = (subject.reference(path, dtype) for dtype in ("float64", "float32"))
    mine, x, dy, factor = call.tensors, call.x, call.dy, AUTOCAST_FACTOR * case.factor("calls", "bfloat16")
    held = {name: t.detach().clone() for name, t in mine.items()}
    is_packed = bool(subject.packed) or any(name.endswith("codes") for name in subject.state())
    try:
        for when in (UNDER_AUTOCAST, UNDER_AUTOCAST_AFTER_CHANGE):
            for dtype in ("bfloat16", "float16"):
                given = x if when == UNDER_AUTOCAST else cast(x, dtype)
                truth = observe(wide.layer, wide.tensors, cast(given, "float64"), dy.double())
                with named_if_raised(path, when.format(dtype)):
                    seen = _forward_under_autocast(call, call.layer, mine, dtype, given)
                rounded = PlausibleResults(rounded_by_autocast(own, replace(call, x=given), dtype))
                verdict = noise_floor(seen, truth, rounded, dtype, factor)
                if seen["y"].dtype != DTYPES[dtype] and not is_packed:
                    verdict = ill_formed({"y": seen["y"]}, {"y": next(iter(rounded))["y"]}) or verdict
                yield when.format(dtype), verdict
            with torch.no_grad():
                for tensor in (*mine.values(), *wide.tensors.values(), *own.tensors.values()):
                    tensor.mul_(HALF)
    finally:
        load(subject.adapted, {f"{path}.{name}": value for name, value in held.items()})
    yield from _judge_backward(subject, case, path, call)


def rounded_by_autocast(own: ReferenceLayer, call: Call, dtype: str) -> Iterator[dict[str, Tensor]]:
    """Yield outputs and gradients that a correct program may give under autocast. own: the reference in float32."""
    yield _forward_under_autocast(call, own.layer, own.tensors, dtype, call.x)
    for seed in range(PERTURBED_DRAWS):
        generator, moved = torch.Generator().manual_seed(seed), copy.deepcopy(own)
        for parameter in moved.layer.parameters():
            parameter.data = perturbed(parameter.data, dtype, generator)
        yield _forward_under_autocast(call, moved.layer, moved.tensors, dtype, perturbed(call.x, dtype, generator))


def _forward_under_autocast(
    call: Call, layer: nn.Module, tensors: Mapping[str, Tensor], dtype: str, x: Tensor
) -> dict[str, Tensor]:
    """Run the layer forward under autocast to `dtype`, and backward outside it, as torch's documentation recommends."""

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, DTYPES[dtype]):
            y: Tensor = layer(x)
            return y

    return observe(layer, tensors, x, call.dy, training=call.training, call=run)


def _judge_backward(subject: Subject, case: Case, path: str, call: Call) -> Iterator[tuple[str, Judgement]]:
    """Run the layer forward without autocast, and backward under autocast to bfloat16.

    Yield the form's name and a judgement. A program may compute the gradients in bfloat16 or in float32. It may also
    refuse by RuntimeError, because torch's documentation advises against such a backward pass.
    """
    dtype, form = "bfloat16", BACKWARD_UNDER_AUTOCAST.format("bfloat16")
    wide, own = subject.reference(path, "float64"), subject.reference(path, "float32")

    def plainly(layer: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = layer(x)
            return y

    def run(layer: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast(call.x.device.type, DTYPES[dtype]):
            return observe(layer, tensors, call.x, call.dy, training=call.training, call=plainly)

    def drawn() -> Iterator[dict[str, Tensor]]:
        yield run(own.layer, own.tensors)
        yield from rounded_by_autocast(own, call, dtype)

    truth = observe(wide.layer, wide.tensors, cast(call.x, "float64"), call.dy.double(), training=call.training)
    try:
        mine = run(call.layer, call.tensors)
    except RuntimeError:
        return
    factor = AUTOCAST_FACTOR * case.factor("calls", dtype)
    yield form, noise_floor(mine, truth, PlausibleResults(drawn()), dtype, factor)
