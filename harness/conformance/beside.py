"""A layer of the subject beside the reference's: in float64, and in draws of what a program in its dtype loses."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from harness.conformance.drawn import cast
from harness.conformance.observe import observe
from harness.conformance.subject import Subject
from harness.conformance.tolerance import perturbed
from harness.tolerances import PERTURBED_DRAWS

Look = Callable[..., dict[str, Tensor]]
"""`observe`, or another way of looking at a layer that takes the same."""


def beside(
    subject: Subject,
    path: str,
    layer: nn.Module,
    x: Tensor,
    dy: Tensor,
    *,
    training: bool = False,
    look: Look = observe,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Tensor]]]:
    """Observe the subject's layer, the reference in float64, and draws of what a program in the subject's dtype loses.

    One draw is the reference in that dtype. It may happen to round to almost nothing, so there are others: the reference in
    float64 with every number that goes in moved by up to half a unit in the last place of the dtype, as rounding might.
    """
    mine = look(layer, subject.tensors_of(path), x, dy, training=training)
    twin = subject.reference(path, "float64")
    wide = cast(x, "float64"), dy.double()
    truth = look(twin.layer, twin.tensors, *wide)
    own = subject.reference(path, subject.dtype)
    draws = [look(own.layer, own.tensors, x, dy)]
    for seed in range(PERTURBED_DRAWS):
        generator = torch.Generator().manual_seed(seed)
        moved, tensors = copy.deepcopy((twin.layer, twin.tensors))
        with torch.no_grad():
            for tensor in [*moved.parameters(), *moved.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(perturbed(tensor, subject.dtype, generator))
        draws.append(look(moved, tensors, *(perturbed(t, subject.dtype, generator) for t in wide)))
    return mine, truth, draws
