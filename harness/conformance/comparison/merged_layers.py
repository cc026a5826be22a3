"""Expected outputs of merged and unmerged layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.comparison.inputs import HALF
from harness.conformance.comparison.layer_comparison import PlausibleResults, RunLayer, runs_of
from harness.conformance.subject import ReferenceLayer, Subject
from harness.conformance.tolerance_constants import DRAWS_AT_ONCE
from harness.methods.spec import method_info

_Runs = tuple[dict[str, Tensor], Iterable[dict[str, Tensor]]]
"""The output of the float64 reference, and plausible outputs, i.e. outputs that a correct program may give."""


def expected_outputs(subject: Subject, path: str, x: Tensor) -> dict[tuple[bool, bool], _Runs]:
    """Return the expected outputs of a layer, by the pair (whether it is merged, whether its tensors are halved).

    Each value is the output of the float64 reference (the truth), and plausible outputs, which are computed when needed. If
    merging does not quantise, a merged layer has the outputs of the layer with its adapter.

    In a large model, the references of all paths do not fit into memory together. So only the truth and the first plausible
    output are computed here. For further ones, the references are built again when they are needed. If merging has changed
    the base weights by then, these references have another truth, so only the differences from it are used.
    """
    x = x.clone()  # the subject may write to the one that it gets
    quantises, found = method_info(subject.method).spec.merge_quantises, dict[tuple[bool, bool], _Runs]()
    for is_halved in (False, True):
        for is_merged in (False, True) if quantises else (False,):
            runs = partial(_runs, subject, path, x, is_merged=is_merged, is_halved=is_halved)
            truth, draws = runs()
            if subject.reference_cache is None:
                draws = PlausibleResults(chain(list(islice(draws, 1)), _further(truth, runs)))
            found[is_merged, is_halved] = truth, draws
        found[True, is_halved] = found[quantises, is_halved]
    return found


@torch.no_grad()
def _runs(subject: Subject, path: str, x: Tensor, *, is_merged: bool, is_halved: bool) -> _Runs:
    """Return the output of the float64 reference of a layer, and plausible outputs, which are computed when needed.

    Build the references from the present values of the subject. If merging quantises, `is_merged` decides whether they are
    merged. is_halved: whether the adapter's tensors are halved before.
    """
    quantises, is_small = method_info(subject.method).spec.merge_quantises, subject.reference_cache is not None
    wide, own = subject.reference(path, "float64"), subject.reference(path, subject.dtype)
    for reference in (wide, own) if is_halved else ():
        for name in subject.added().keys() & {f"{path}.{name}" for name in reference.tensors}:
            reference.tensors[name.removeprefix(f"{path}.")].mul_(HALF)
    run: RunLayer = _merged_output if is_merged else _output
    first = [] if quantises else [_merged(own, x)]
    truth, draws = runs_of(wide, own, subject.dtype, x, x.new_zeros(()), run=run, reordered=is_merged)
    # Few draws move a sum across a tie of the quantiser, so all of them may be needed.
    return truth, PlausibleResults(chain(first, islice(draws, None if is_merged and is_small else DRAWS_AT_ONCE)))


def _further(truth: Mapping[str, Tensor], runs: Callable[[], _Runs]) -> Iterator[dict[str, Tensor]]:
    """Yield all plausible outputs of `runs` except the first. All are computed when the first one is needed.

    The references may have another truth by then. So each output is `truth` plus the output's difference from that truth.
    """
    other, draws = runs()
    # A list, so that the references are freed.
    moved = [
        {name: truth[name] + (y.double() - other[name]) for name, y in draw.items()} for draw in islice(draws, 1, None)
    ]
    yield from moved


def _merged(reference: ReferenceLayer, x: Tensor) -> dict[str, Tensor]:
    """Return the output of a merged copy of the reference. Merging rounds the weight to the reference's dtype."""
    merged = reference.copy()
    merged.adapted.merge()
    return {"y": merged.adapted.model.get_submodule("layer").eval()(x)}


@torch.no_grad()  # also when a draw is made later
def _output(layer: nn.Module, _: Mapping[str, Tensor], x: Tensor, __: Tensor) -> dict[str, Tensor]:
    return {"y": layer.eval()(x)}


@torch.no_grad()
def _merged_output(layer: Any, _: Mapping[str, Tensor], x: Tensor, __: Tensor) -> dict[str, Tensor]:
    return {"y": layer.merged().eval()(x)}
