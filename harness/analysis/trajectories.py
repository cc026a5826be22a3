"""Comparison of training runs: the losses of Cells against those in float64, step by step, within the noise floor.

With err(t) = |loss(t) - loss64(t)|, a subject may err at step t by

    TRAJECTORY_FACTOR * (largest err of the reference run in the subject's dtype up to t)  +  floor(t)

The reference run defines this noise, so it has another bound: its error may grow by a fixed number of eps at each step.
"""

from __future__ import annotations

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
    """Comparison of one run with its float64 run."""

    cell_id: str
    """Id of the Cell."""
    verdict: Verdict
    """Verdict."""
    by: str = ""
    """Source of the allowance: `noise` of the reference run in the same dtype, or `growth` for a run that defines
    the noise itself."""
    errors: tuple[float, ...] = ()
    """Error of each step."""
    allowed: tuple[float, ...] = ()
    """Allowance of each step."""
    ratio: float | None = None
    """Worst error over its allowance."""
    step: int | None = None
    """Step of the worst ratio, from 0."""


@dataclass(frozen=True)
class SameLosses:
    """A `same-losses` comparison, decided."""

    verdict: Verdict
    subjects: tuple[JudgedTrajectory, ...]


def judge(comparison: Comparison, cells: Mapping[str, Cell], records: Mapping[str, Record]) -> SameLosses:
    """Judge every Cell of `left` against its float64 counterpart in `right`; `records` maps cell_id to its Record."""
    subjects = tuple(_judge_one(cells[i], comparison.right, cells, records) for i in comparison.left)
    names = naming.full(cells.values())
    word = joint(s.verdict.word for s in subjects)
    ids = tuple(dict.fromkeys(i for s in subjects for i in s.verdict.records))
    if word is VerdictKind.PASS:
        worst = max(subjects, key=lambda s: s.ratio or 0.0)
        steps = len(worst.errors)
        reason = (
            f"all {len(subjects)} follow the float64 losses through {steps} steps; the worst error is"
            f" {worst.ratio:.2g} of what is allowed ({names[worst.cell_id]}, step {worst.step})"
        )
    else:
        named = [s for s in subjects if s.verdict.word is word]
        says = {VerdictKind.FAIL: "outside the noise", VerdictKind.NOT_RUN: "not judged"}.get(word, "undecided")
        reason = f"{says}: " + "; ".join(f"{names[s.cell_id]}: {s.verdict.reason}" for s in named)
    return SameLosses(Verdict(word, reason if subjects else "it names no Cells", ids), subjects)


def _judge_one(
    cell: Cell, exact_ids: Sequence[str], cells: Mapping[str, Cell], records: Mapping[str, Record]
) -> JudgedTrajectory:
    def undecided(word: VerdictKind, reason: str, *used: Record) -> JudgedTrajectory:
        return JudgedTrajectory(cell.cell_id, Verdict(word, reason, tuple(r.id for r in used)))

    exact_cell = next((cells[i] for i in exact_ids if not _differences(cell, cells[i])), None)
    if exact_cell is None:
        differ = "; ".join(", ".join(_differences(cell, cells[i])) for i in exact_ids) or "no Cell named"
        return undecided(VerdictKind.NOT_RUN, f"not comparable with float64: {differ}")
    if exact_cell.dtype != EXACT:
        return undecided(VerdictKind.NOT_RUN, f"not comparable: the exact run is in {exact_cell.dtype}, not in {EXACT}")

    subject, exact = records.get(cell.cell_id), records.get(exact_cell.cell_id)
    for name, record in (("this Cell", subject), ("its float64 Cell", exact)):
        if record is None or record.status is not Status.OK:
            status = record.status.value if record else "missing"
            return undecided(VerdictKind.NOT_RUN, f"{name} is {status}", *(r for r in (subject, exact) if r))
    assert subject is not None  # noqa: S101 - the loop above returns
    assert exact is not None  # noqa: S101
    refusal = _other_batches(subject, exact)
    if refusal:
        return undecided(VerdictKind.NOT_RUN, f"not comparable: {refusal}", subject, exact)

    noise = next((r for r in records.values() if _is_reference_for(cell, r.cell) and r.status is Status.OK), None)
    if noise is None:
        reason = f"no ok reference run in {cell.dtype}, so the noise of this dtype is unknown"
        return undecided(VerdictKind.INCONCLUSIVE, reason, subject, exact)
    refusal = _other_batches(noise, exact)
    if refusal:
        return undecided(
            VerdictKind.NOT_RUN, f"not comparable: the reference run in {cell.dtype}: {refusal}", noise, exact
        )
    return _measure(subject, exact, noise)


def _measure(subject: Record, exact: Record, noise: Record) -> JudgedTrajectory:
    dtype = subject.cell.dtype
    yardstick = _losses(exact)
    errors = [abs(a - b) for a, b in zip(_losses(subject), yardstick, strict=True)]
    # Largest loss so far, not this step's: the loss of a well-fitted batch is a small difference of large logits, and
    # its rounding error follows the logits.
    scale = list(accumulate((abs(x) for x in yardstick), max))
    eps = tolerance_constants.EPSILON[dtype]
    # A run in float64, and the reference in any dtype, have no noise but their own to be compared with.
    by = "growth" if subject.id == noise.id or dtype == EXACT else "noise"
    if by == "growth":
        allowed = [tolerance_constants.REFERENCE_GROWTH_EPS * eps * (t + 1) * s for t, s in enumerate(scale)]
    else:
        envelope = accumulate((abs(a - b) for a, b in zip(_losses(noise), yardstick, strict=True)), max)
        floor = (tolerance_constants.TRAJECTORY_FLOOR_EPS * eps * s for s in scale)
        allowed = [tolerance_constants.TRAJECTORY_FACTOR * e + f for e, f in zip(envelope, floor, strict=True)]
    ratios = [
        error / bound if bound else (0.0 if error == 0 else float("inf"))
        for error, bound in zip(errors, allowed, strict=True)
    ]
    step = max(range(len(ratios)), key=ratios.__getitem__)
    first_bad = next((t for t, ratio in enumerate(ratios) if ratio > 1), None)
    ids = tuple(dict.fromkeys((subject.id, exact.id, noise.id)))
    if first_bad is None:
        steps = f"at all {len(errors)} steps"
        own = f"within the growth that rounding explains {steps}; this run defines the noise of the others"
        reason = own if by == "growth" else f"within the reference's noise {steps}"
        verdict = Verdict(VerdictKind.PASS, reason, ids)
    else:
        verdict = Verdict(
            VerdictKind.FAIL,
            f"leaves the float64 losses at step {first_bad}: error {errors[first_bad]:.3g}, allowed"
            f" {allowed[first_bad]:.3g}; worst at step {step}, {ratios[step]:,.1f} times what is allowed",
            ids,
        )
    return JudgedTrajectory(subject.cell_id, verdict, by, tuple(errors), tuple(allowed), ratios[step], step)


def _losses(record: Record) -> list[float]:
    training = record.measurements.training if record.measurements else None
    return training.losses if training else []


def _tokens(record: Record) -> list[int]:
    training = record.measurements.training if record.measurements else None
    return training.tokens if training else []


def _other_batches(left: Record, right: Record) -> str:
    """Return the reason why two runs saw different batches; empty if no difference is known."""
    if not _losses(left) or not _losses(right):
        return "there are no losses to compare"
    if len(_losses(left)) != len(_losses(right)):
        return f"{len(_losses(left))} steps were run here and {len(_losses(right))} in float64"
    for step, (a, b) in enumerate(zip(_tokens(left), _tokens(right), strict=True)):
        if a != b:
            return f"the data order differs: {a} tokens at step {step} here, {b} in float64"
    return ""


def _what_is_trained(cell: Cell) -> dict[str, object]:
    """Return the fields that determine the losses: neither scoring nor micro-batching do."""
    how = {"accumulate", "checkpointing", "compile", "layerwise"}
    return cell.model_dump(
        mode="json", exclude={"implementation": True, "dtype": True, "evaluation": True, "training": how}
    )


def _differences(left: Cell, right: Cell) -> list[str]:
    """Return the differences of two Cells other than implementation and dtype."""
    a, b = _what_is_trained(left), _what_is_trained(right)
    return [f"{key} {a[key]} against {b[key]}" for key in a if a[key] != b[key]]


def _is_reference_for(subject: Cell, other: Cell) -> bool:
    return other.implementation == REFERENCE and other.dtype == subject.dtype and not _differences(subject, other)
