"""Compare the losses of training runs with the losses of the same training in float64, step by step.

The error of a run at step t is err(t) = |loss(t) - loss64(t)|, where loss64 is the loss in float64. The largest allowed
error of a Cell at step t is

    TRAJECTORY_FACTOR * (largest err of the reference run at all steps up to t)  +  floor(t)

The reference run is made by the reference implementation in the dtype of the Cell. floor(t) is a small number of eps of
that dtype, times the largest loss so far. The reference run cannot be judged by its own errors. So its allowed error
grows by a fixed number of eps at each step, and so does the allowed error of a float64 run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from harness.analysis.verdict_kind import Verdict, VerdictKind, joint
from harness.conformance import tolerance_constants
from harness.records import naming
from harness.records.manifest import Comparison
from harness.records.record import Cell, Record, Status

REFERENCE = "reference"
EXACT = "float64"


@dataclass(frozen=True)
class JudgedTrajectory:
    """Comparison of the losses of one run with the losses of the same training in float64."""

    cell_id: str
    """Id of the Cell."""
    verdict: Verdict
    """Verdict on this run."""
    by: str = ""
    """Source of the allowed errors. `noise`: the errors of the reference run in the same dtype. `growth`: a fixed
    growth of rounding errors from step to step, for float64 runs and for the reference run itself."""
    limited_by: str = ""
    """Id of the Cell that is the reference run in the same dtype."""
    errors: tuple[float, ...] = ()
    """Error of each step: the distance of its loss from the loss in float64."""
    allowed: tuple[float, ...] = ()
    """Largest allowed error of each step."""
    ratio: float | None = None
    """Largest ratio, over all steps, of the error to the allowed error."""
    step: int | None = None
    """Number of the step with the largest ratio, counted from 0."""


def judge(
    comparison: Comparison, cells: Mapping[str, Cell], records: Mapping[str, Record]
) -> tuple[Verdict, tuple[JudgedTrajectory, ...]]:
    """Judge a `same-losses` comparison: compare every Cell of `left` with its float64 counterpart in `right`.

    Return the joint verdict, and the verdict on each Cell of `left`. cells, records: Cells and newest Records, by
    cell_id.
    """
    subjects = tuple(_judge_one(cells[i], comparison.right, cells, records) for i in comparison.left)
    names = naming.full(cells.values())
    word = joint(s.verdict.word for s in subjects)
    ids = tuple(dict.fromkeys(i for s in subjects for i in s.verdict.records))
    if word is VerdictKind.PASS:
        worst = max(subjects, key=lambda s: s.ratio or 0.0)
        who = f"all {len(subjects)} follow" if len(subjects) > 1 else f"{names[worst.cell_id]} follows"
        reason = (
            f"{who} the float64 losses through {len(worst.errors)} steps; the worst error is"
            f" {worst.ratio:.2g} times what is allowed ({names[worst.cell_id]}, step {worst.step})"
        )
    else:
        text = {VerdictKind.FAIL: "outside the noise", VerdictKind.NOT_RUN: "not judged"}.get(word, "undecided")
        reasons = [f"{names[s.cell_id]}: {s.verdict.reason}" for s in subjects if s.verdict.word is word]
        reason = f"{text}: {'; '.join(reasons)}"
    return Verdict(word, reason if subjects else "the question names no Cells", ids), subjects


def _judge_one(
    cell: Cell, exact_ids: Sequence[str], cells: Mapping[str, Cell], records: Mapping[str, Record]
) -> JudgedTrajectory:
    def refused(reason: str, *used: Record | None, word: VerdictKind = VerdictKind.NOT_RUN) -> JudgedTrajectory:
        return JudgedTrajectory(cell.cell_id, Verdict(word, reason, tuple(r.id for r in used if r)))

    exact_cell = next((cells[i] for i in exact_ids if not _differences(cell, cells[i])), None)
    if exact_cell is None:
        differ = "; ".join(", ".join(_differences(cell, cells[i])) for i in exact_ids) or "no Cell named"
        return refused(f"not comparable with float64: {differ}")
    if exact_cell.dtype != EXACT:
        return refused(f"not comparable: the exact run is in {exact_cell.dtype}, not in {EXACT}")

    subject, exact = records.get(cell.cell_id), records.get(exact_cell.cell_id)
    if subject is None or subject.status is not Status.OK:
        return refused(f"this Cell is {_status(subject)}", subject, exact)
    if exact is None or exact.status is not Status.OK:
        return refused(f"its float64 Cell is {_status(exact)}", subject, exact)
    if refusal := _other_batches(subject, exact):
        return refused(f"not comparable: {refusal}", subject, exact)

    noise = next((r for r in records.values() if _is_reference_for(cell, r.cell) and r.status is Status.OK), None)
    if noise is None:
        reason = f"no ok reference run in {cell.dtype}, so the noise of this dtype is unknown"
        return refused(reason, subject, exact, word=VerdictKind.INCONCLUSIVE)
    if refusal := _other_batches(noise, exact):
        return refused(f"not comparable: the reference run in {cell.dtype}: {refusal}", noise, exact)
    return _measure(subject, exact, noise)


def _measure(subject: Record, exact: Record, noise: Record) -> JudgedTrajectory:
    dtype = subject.cell.dtype
    true_losses = _losses(exact)
    errors = [abs(a - b) for a, b in zip(_losses(subject), true_losses, strict=True)]
    # The largest loss so far, not the loss of the step, sets the scale: the loss of a well-fitted batch is a small
    # difference of large logits, and its rounding error follows the logits.
    scale = list(accumulate(map(abs, true_losses), max))
    eps = tolerance_constants.EPSILON[dtype]
    # The errors of the reference run limit other runs. They cannot limit that run itself, nor a float64 run: there, the
    # growth of rounding errors from step to step is the limit.
    by = "growth" if subject.id == noise.id or dtype == EXACT else "noise"
    if by == "growth":
        allowed = [tolerance_constants.REFERENCE_GROWTH_EPS * eps * (t + 1) * s for t, s in enumerate(scale)]
    else:
        own = [abs(a - b) for a, b in zip(_losses(noise), true_losses, strict=True)]
        allowed = allowed_errors(true_losses, own, dtype)
    ratios = [
        error / bound if bound else (0.0 if error == 0 else math.inf)
        for error, bound in zip(errors, allowed, strict=True)
    ]
    step = max(range(len(ratios)), key=ratios.__getitem__)
    first_bad = next((t for t, ratio in enumerate(ratios) if ratio > 1), None)
    if first_bad is not None:
        word = VerdictKind.FAIL
        reason = (
            f"leaves the float64 losses at step {first_bad}: error {errors[first_bad]:.3g}, allowed"
            f" {allowed[first_bad]:.3g}; worst at step {step}, {ratios[step]:,.1f} times what is allowed"
        )
    else:
        word = VerdictKind.PASS
        growth = "within the growth of rounding errors at all {} steps; this run defines the noise of the others"
        reason = (growth if by == "growth" else "within the noise of the reference at all {} steps").format(len(errors))
    verdict = Verdict(word, reason, tuple(dict.fromkeys((subject.id, exact.id, noise.id))))
    return JudgedTrajectory(
        subject.cell_id, verdict, by, noise.cell_id, tuple(errors), tuple(allowed), ratios[step], step
    )


def allowed_errors(true_losses: Sequence[float], own_errors: Sequence[float], dtype: str) -> list[float]:
    """Return the largest allowed error of the loss at each step.

    true_losses: losses in float64. own_errors: errors of the reference run in `dtype`. All lists have one value per
    step.
    """
    floor = tolerance_constants.TRAJECTORY_FLOOR_EPS * tolerance_constants.EPSILON[dtype]
    scale = accumulate(map(abs, true_losses), max)
    envelope = accumulate(own_errors, max)
    return [tolerance_constants.TRAJECTORY_FACTOR * e + floor * s for e, s in zip(envelope, scale, strict=True)]


def _status(record: Record | None) -> str:
    return record.status.value if record else "missing"


def _losses(record: Record) -> list[float]:
    return record.training.losses if record.training else []


def _other_batches(left: Record, right: Record) -> str:
    """Return the reason why two runs saw different batches. If no difference is known, return an empty string."""
    a, b = left.training, right.training
    if a is None or b is None or not a.losses or not b.losses:
        return "there are no losses to compare"
    if len(a.losses) != len(b.losses):
        return f"{len(a.losses)} steps were run here and {len(b.losses)} in float64"
    for step, (here, exact) in enumerate(zip(a.tokens, b.tokens, strict=True)):
        if here != exact:
            return f"the data order differs: {here} tokens at step {step} here, {exact} in float64"
    return ""


def _training_settings(cell: Cell) -> dict[str, object]:
    """Return the settings of a Cell that determine its losses in exact arithmetic.

    These are all settings except the implementation, its environment, the dtype, the evaluation, and the settings that
    only say how a step is computed (`accumulate`, `checkpointing`, `compile`, `layerwise`, `loop`).
    """
    how = {"accumulate", "checkpointing", "compile", "layerwise", "loop"}
    return cell.model_dump(
        mode="json",
        exclude={"implementation": True, "environment": True, "dtype": True, "evaluation": True, "training": how},
    )


def _differences(left: Cell, right: Cell) -> list[str]:
    """List the `_training_settings` that differ between two Cells, each with both values."""
    a, b = _training_settings(left), _training_settings(right)
    return [f"{key} {a[key]} against {b[key]}" for key in a if a[key] != b[key]]


def _is_reference_for(subject: Cell, other: Cell) -> bool:
    return other.implementation == REFERENCE and other.dtype == subject.dtype and not _differences(subject, other)
