"""Check of rank dropout, which drops rows of the update of LoHa and LoKr. Each row gives one output feature."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.comparison.check_results import from_problems, skipped
from harness.conformance.comparison.inputs import inputs
from harness.conformance.comparison.layer_comparison import reference_runs
from harness.conformance.comparison.observations import observe
from harness.conformance.comparison.tolerance_policies import ROUNDED_SUMS, exact, noise_floor
from harness.conformance.subject import DTYPES, Subject
from harness.conformance.tolerance_constants import DROPOUT_SIGMAS, EPSILON, VISIBLE_EPS
from harness.records.record import CheckResult
from reference.shared.row_dropout import RowDropout

CALLS = 12
"""Number of calls of each layer in which the dropped rows are counted."""


@check(States.WARM)
def check_rank_dropout(subject: Subject, case: Case) -> CheckResult:
    """Training mode drops rows of the update as the config states: one mask of rows for all tokens of a call.

    The rows that remain are divided by their share of all rows, so that the mean of the mask is 1; if none remains, the
    output is the base's output. Masks differ between calls, the same seed of torch gives the same mask, and the
    backward pass uses the mask of the forward pass. Rows are dropped independently: the number of dropped rows differs
    between calls, and few pairs of rows are dropped in exactly the same calls. Output and gradients must equal the
    reference's for this mask; the binomial distribution bounds the number of dropped rows. The checks `forward` and
    `merge` show that eval mode and merging drop no row, even if the layer is merged in training mode. A layer is left
    out if some row of its update is so small beside the output that rounding hides it.
    """
    p = getattr(subject.config, "rank_dropout", 0.0)
    if not p:
        return skipped(subject, case, "rank_dropout", "the config has no rank dropout")
    problems: list[str] = []
    rows, dropped, hidden = 0, 0, list[str]()
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        x, dy = inputs(subject.original_base(path), case.tokens, DTYPES[subject.dtype], case.generator(index))
        if not x.numel():
            return skipped(subject, case, "rank_dropout", "there is no token")
        masks = []
        for _ in range(CALLS):
            mine = observe(layer, subject.tensors_of(path), x, dy, training=True)
            kept = _kept(subject, path, mine["y"], x, dy)
            if kept is None:
                hidden.append(path)
                break
            masks.append(kept)
            mask = kept.double() / kept.double().mean().clamp(min=1 / len(kept))
            truth, draws = reference_runs(subject, path, x, dy, run=partial(_masked, mask[:, None]))
            plausible = chain(draws, _with_a_rounded_share(subject, path, x, dy, mask))
            verdict = noise_floor(mine, truth, plausible, subject.dtype, case.factor("gradient"))
            if verdict.decided and not verdict.passed:
                off = verdict.worst if verdict.error is None else f"is off by {verdict.error:.3g}"
                problems.append(f"{path}: with {int(kept.sum())} of {len(kept)} rows left {verdict.tensor} {off}")
                break
        if not masks:
            continue
        rows += sum(map(len, masks))
        dropped += sum(int((~kept).sum()) for kept in masks)
        # Two right masks are equal with this probability, and so are all of them with its power.
        alike = (p**2 + (1 - p) ** 2) ** (len(masks[0]) * (CALLS - 1))
        if len(masks) == CALLS and alike < 2.0**-30 and all(torch.equal(masks[0], kept) for kept in masks):
            problems.append(f"{path}: {CALLS} calls drop the same rows")
        if len(masks) == CALLS and not problems:
            problems += (f"{path}: {one}" for one in _dependent_rows(torch.stack(masks), p))
        if not problems and _differs_with_one_seed(subject, path, layer, x, dy):
            problems.append(f"{path}: two calls with one seed of torch differ; activation checkpointing needs the same")
    if not problems and len(hidden) == len(subject.adapted.layers):
        return skipped(subject, case, "rank_dropout", "rounding hides which rows of the update are kept")
    spread = DROPOUT_SIGMAS * (rows * p * (1 - p)) ** 0.5
    if not problems and abs(dropped - p * rows) > spread + 1:
        problems.append(f"{dropped} of {rows} rows were dropped, should be {p * rows:.0f} +- {spread:.0f}")
    return from_problems(subject, case, "rank_dropout", problems, f"{dropped} of {rows} rows dropped at p = {p:g}")


def _dependent_rows(kept: Tensor, p: float) -> Iterator[str]:
    """Yield a message if the rows of the masks `kept`, bool (CALLS, E), are not dropped independently with probability p."""
    calls, rows = kept.shape
    likeliest = (
        2 * math.pi * max(rows * p * (1 - p), 1.0)
    ) ** -0.5  # about the largest probability of a number of rows
    if likeliest ** (calls - 1) < 2.0**-30 and len(kept.sum(1).unique()) == 1:
        yield f"{calls} calls drop {rows - int(kept[0].sum())} rows each"
    pairs, triples = math.comb(rows, 2), math.comb(rows, 3)
    two, three = (p**2 + (1 - p) ** 2) ** calls, (p**3 + (1 - p) ** 3) ** calls
    # Two pairs with a common row are equal in all calls with the probability `three`.
    spread = DROPOUT_SIGMAS * (pairs * (two - two**2) + 6 * triples * (three - two**2)) ** 0.5
    equal = sum(math.comb(int(count), 2) for count in kept.T.unique(dim=0, return_counts=True)[1])
    if equal > pairs * two + spread + DROPOUT_SIGMAS:  # a small number of pairs is not normally distributed
        yield f"{equal} pairs of rows are dropped in the same calls, should be {pairs * two:.3g} +- {spread:.3g}"


def _with_a_rounded_share(
    subject: Subject, path: str, x: Tensor, dy: Tensor, mask: Tensor
) -> Iterator[dict[str, Tensor]]:
    """Yield the reference's results for a mask that is one unit in the last place larger, as a mean in 16 bits may be."""
    if subject.dtype not in ROUNDED_SUMS:
        near = mask[:, None] * (1 + EPSILON[subject.dtype])
        yield next(iter(reference_runs(subject, path, x, dy, run=partial(_masked, near))[1]))


def _differs_with_one_seed(subject: Subject, path: str, layer: nn.Module, x: Tensor, dy: Tensor) -> bool:
    """Return whether two calls in training mode, with the same seed of torch, differ in any bit."""
    seen = []
    with torch.random.fork_rng():
        for _ in range(2):
            torch.manual_seed(0)
            seen.append(observe(layer, subject.tensors_of(path), x, dy, training=True))
    return not exact(*seen).passed


def _kept(subject: Subject, path: str, y: Tensor, x: Tensor, dy: Tensor) -> Tensor | None:
    """Return a mask (E,) of the rows that rank dropout has kept in the output y.

    Dropout multiplies a kept row of the update by 1 or more, and a dropped row by 0. The projection of the observed
    update on the whole update shows whether a row is kept. Return None if some row of the whole update is so small that
    the rounding of y hides it.
    """
    base, whole = (
        reference_runs(subject, path, x, dy[:0], run=partial(_masked, x.new_full((), factor)))[0]["y"].double()
        for factor in (0.0, 1.0)
    )
    update = (whole - base).flatten(0, -2)
    flat = whole.flatten(0, -2)
    smallest = torch.finfo(DTYPES[subject.dtype]).tiny  # below it the distance between two numbers stays the same
    # The features of a row of the update may cancel, but not their rounding errors. They are as large in other rows.
    largest = torch.maximum(flat.square().mean(0), update.square().mean()).sqrt().clamp(min=smallest)
    rounding = EPSILON[subject.dtype] * largest
    if bool((update.norm(dim=0) <= VISIBLE_EPS * rounding).any()):
        return None
    return ((y.double() - base).flatten(0, -2) * update).sum(0) > update.square().sum(0) / 2


def _masked(mask: Tensor, layer: nn.Module, tensors: Mapping[str, Tensor], x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Run the reference's layer in training mode, and return its output and gradients.

    The layer multiplies its update by `mask` instead of a random mask.
    """
    for name, child in list(layer.named_modules()):
        if isinstance(child, RowDropout):
            parent, _, last = name.rpartition(".")
            setattr(layer.get_submodule(parent), last, _Times(mask))
    return observe(layer, tensors, x, dy, training=True)


class _Times(nn.Module):
    """Layer that multiplies an update by a known mask. It replaces a RowDropout layer."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, delta: Tensor) -> Tensor:
        return delta * self.mask.to(delta.dtype)
