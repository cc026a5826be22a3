"""Runs of the subject's layer and of the reference's layer on the same input, to compare the results.

The reference runs in float64. Further runs give plausible results: results that a correct program may compute. Their
errors show how large rounding errors can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from harness.conformance.comparison.inputs import cast
from harness.conformance.comparison.moved_numbers import perturbed, with_error_of_float64
from harness.conformance.comparison.observations import observe
from harness.conformance.comparison.tolerance_policies import ROUNDED_SUMS
from harness.conformance.subject import ReferenceLayer, Subject
from harness.conformance.tolerance_constants import LAYER_DRAWS, REORDERED_DRAWS, REORDERED_ULPS, ROUNDED_ULPS

RunLayer = Callable[..., dict[str, Tensor]]
"""Function that runs a layer and returns its output and gradients by name. It takes the parameters of `observe`."""


class PlausibleResults:
    """Plausible outputs and gradients of a layer: those that correct programs with other rounding may compute.

    Each item is a dict with the output and gradients of one such program, by name. An item is computed when it is first
    needed, and then stored.
    """

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
    run: RunLayer = observe,
) -> tuple[dict[str, Tensor], dict[str, Tensor], PlausibleResults]:
    """Run the subject's layer and the reference's layer on the same input, both with the function `run`.

    training: mode of both layers. Some layers compute something else in training, even without dropout (lora_int8).
    Return the subject's output and gradients, followed by the two results of `reference_runs`.
    """
    mine = run(layer, subject.tensors_of(path), x, dy, training=training)
    return mine, *reference_runs(subject, path, x, dy, run=partial(run, training=training))


def reference_runs(
    subject: Subject, path: str, x: Tensor, dy: Tensor, *, run: RunLayer = observe
) -> tuple[dict[str, Tensor], PlausibleResults]:
    """Run the reference's layer at `path` with the function `run`.

    Return its output and gradients in float64, and then plausible outputs and gradients in the subject's dtype, made by
    `runs_of`.
    """
    wide, own = subject.reference(path, "float64"), subject.reference(path, subject.dtype)
    return runs_of(wide, own, subject.dtype, x, dy, run=run, narrow=partial(subject.reference, path, "float32"))


def runs_of(
    wide: ReferenceLayer,
    own: ReferenceLayer,
    dtype: str,
    x: Tensor,
    dy: Tensor,
    *,
    run: RunLayer = observe,
    narrow: Callable[[], ReferenceLayer] | None = None,
    reordered: bool = False,
) -> tuple[dict[str, Tensor], PlausibleResults]:
    """Return output and gradients of the float64 reference, and then plausible results in `dtype`.

    wide: the reference in float64. own: the reference in `dtype`. run: function that runs a layer and may change the
    layer. narrow: function that returns the reference in float32. It is called if `dtype` is float64.

    The layer `own` gives the first plausible result, which may happen to have almost no rounding error. For every
    further result, each number in the input and in the layer is moved by up to half a unit in the last place of
    `dtype`, as rounding might move it. If `dtype` has 16 bits, the layer then runs in float64. Otherwise it runs in
    `dtype`, so that its sums are rounded differently, too; for the last results, or for all if `reordered`, the numbers
    are moved further (REORDERED_ULPS). Afterwards the layers hold moved numbers. If `dtype` is float64 and `narrow` is
    given, the second result shows the errors of the float64 reference itself; see `with_error_of_float64`.
    """
    exactly = cast(x, "float64"), dy.double()
    truth = run(wide.layer, wide.tensors, *exactly)

    def drawn() -> Iterator[dict[str, Tensor]]:
        yield run(own.layer, own.tensors, x, dy)
        if narrow is not None and dtype == "float64":
            rough = narrow()
            yield with_error_of_float64(run(rough.layer, rough.tensors, cast(x, "float32"), dy.float()), truth)
        held = {id(one): _numbers(one.layer) for one in (wide, own)}
        for seed in range(LAYER_DRAWS):
            generator = torch.Generator().manual_seed(seed)
            is_last = reordered or seed >= LAYER_DRAWS - REORDERED_DRAWS
            ulps = REORDERED_ULPS if dtype in ROUNDED_SUMS and is_last else ROUNDED_ULPS
            moved, given = (own, (x, dy)) if dtype in ROUNDED_SUMS or is_last else (wide, exactly)
            with torch.no_grad():
                for tensor, value in held[id(moved)]:
                    tensor.copy_(perturbed(value, dtype, generator, ulps))
            yield run(moved.layer, moved.tensors, *(perturbed(t, dtype, generator, ulps) for t in given))

    return truth, PlausibleResults(drawn())


def _numbers(layer: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the layer's parameters and buffers of floating-point numbers, each with a copy."""
    return [(t, t.detach().clone()) for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()]
