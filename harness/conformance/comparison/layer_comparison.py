"""Comparison of the subject's layer with the reference's layer in float64, and with draws of rounding errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from harness.conformance.comparison.inputs import cast
from harness.conformance.comparison.observations import observe
from harness.conformance.comparison.tolerance_policies import ROUNDED_SUMS, perturbed
from harness.conformance.subject import ReferenceLayer, Subject
from harness.conformance.tolerance_constants import PERTURBED_DRAWS

Look = Callable[..., dict[str, Tensor]]
"""`observe`, or another function with the parameters of `observe`."""


class Draws:
    """Draws of rounding errors: observations that correct programs might give. Each is made on demand and stored."""

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
    """Observe the subject's layer. Return the observation, and both results of `reference_runs` on the same input."""
    mine = look(layer, subject.tensors_of(path), x, dy, training=training)
    return mine, *reference_runs(subject, path, x, dy, look=look)


def reference_runs(
    subject: Subject, path: str, x: Tensor, dy: Tensor, *, look: Look = observe
) -> tuple[dict[str, Tensor], Draws]:
    """Return the result of `runs_of` for the reference's layer at `path`, in float64 and in the subject's dtype."""
    wide, own = subject.reference(path, "float64"), subject.reference(path, subject.dtype)
    return runs_of(wide, own, subject.dtype, x, dy, look=look)


def runs_of(
    wide: ReferenceLayer, own: ReferenceLayer, dtype: str, x: Tensor, dy: Tensor, *, look: Look = observe
) -> tuple[dict[str, Tensor], Draws]:
    """Return an observation of `wide`, the reference in float64, and draws of the rounding errors of a program in `dtype`.

    The first draw is `own`, the reference in that dtype, which may happen to have almost no rounding error. For the other
    draws every input is moved by up to half a unit in the last place of `dtype`, as rounding might move it. In 16 bits
    they run in float64; otherwise in `dtype`, so that each of them rounds the sums differently, too. Afterwards the
    layers hold moved tensors. look: may change the layer that it observes.
    """
    exactly = cast(x, "float64"), dy.double()
    truth = look(wide.layer, wide.tensors, *exactly)
    moved, given = (own, (x, dy)) if dtype in ROUNDED_SUMS else (wide, exactly)

    def drawn() -> Iterator[dict[str, Tensor]]:
        yield look(own.layer, own.tensors, x, dy)
        there = (*moved.layer.parameters(), *moved.layer.buffers())
        held = [(t, t.detach().clone()) for t in there if t.is_floating_point()]
        for seed in range(PERTURBED_DRAWS):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for tensor, value in held:
                    tensor.copy_(perturbed(value, dtype, generator))
            yield look(moved.layer, moved.tensors, *(perturbed(t, dtype, generator) for t in given))

    return truth, Draws(drawn())
