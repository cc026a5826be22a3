"""Comparison of a layer of the subject with the reference's: in float64, and with draws of rounding errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from harness.conformance.comparison.inputs import cast
from harness.conformance.comparison.observations import observe
from harness.conformance.comparison.tolerance_policies import perturbed
from harness.conformance.subject import ReferenceLayer, Subject
from harness.conformance.tolerance_constants import PERTURBED_DRAWS

Look = Callable[..., dict[str, Tensor]]
"""`observe`, or another function with its parameters."""


class Draws:
    """Draws of rounding errors, made on demand and stored: most judgements need only the first."""

    def __init__(self, make: Iterator[dict[str, Tensor]]) -> None:
        self._make, self._made = make, list[dict[str, Tensor]]()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from self._made
        for draw in self._make:
            self._made.append(draw)
            yield draw


def observe_with_reference(
    subject: Subject,
    path: str,
    layer: nn.Module,
    x: Tensor,
    dy: Tensor,
    *,
    training: bool = False,
    look: Look = observe,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Draws]:
    """Observe the subject's layer; return this with `reference_runs` on the same input."""
    mine = look(layer, subject.tensors_of(path), x, dy, training=training)
    return mine, *reference_runs(subject, path, x, dy, look=look)


def reference_runs(
    subject: Subject, path: str, x: Tensor, dy: Tensor, *, look: Look = observe
) -> tuple[dict[str, Tensor], Draws]:
    """Observe the reference in float64, and draws of the errors of a program in the subject's dtype; see `runs_of`."""
    wide, own = subject.reference(path, "float64"), subject.reference(path, subject.dtype)
    return runs_of(wide, own, subject.dtype, x, dy, look=look)


def runs_of(
    wide: ReferenceLayer, own: ReferenceLayer, dtype: str, x: Tensor, dy: Tensor, *, look: Look = observe
) -> tuple[dict[str, Tensor], Draws]:
    """Observe the reference in float64, `wide`, and draws of the errors of a program in `dtype`.

    The first draw is the reference in that dtype, `own`. It may happen to round to almost nothing. The others are the
    reference in float64 with every input moved by up to half a unit in the last place of the dtype, as rounding might;
    `wide` retains the moved tensors. look: may change the layer that it observes.
    """
    held = [(t, t.detach().clone()) for t in (*wide.layer.parameters(), *wide.layer.buffers()) if t.is_floating_point()]
    exactly = cast(x, "float64"), dy.double()
    truth = look(wide.layer, wide.tensors, *exactly)

    def drawn() -> Iterator[dict[str, Tensor]]:
        yield look(own.layer, own.tensors, x, dy)
        for seed in range(PERTURBED_DRAWS):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for tensor, value in held:
                    tensor.copy_(perturbed(value, dtype, generator))
            yield look(wide.layer, wide.tensors, *(perturbed(t, dtype, generator) for t in exactly))

    return truth, Draws(drawn())
