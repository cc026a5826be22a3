from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import pytest

from harness.analysis import ranking, run_verdict, trajectories
from harness.analysis.statistics import intervals
from harness.analysis.verdict_kind import Verdict, VerdictKind, joint
from harness.errors import Exit
from harness.records import naming
from harness.records.manifest import Comparison
from harness.records.record import CheckResult, Failure, Outcome, Record, Status
from harness.records.store import Run
from support import recorded_run

# ---- intervals


def _by_bisection(correct: int, n: int, inside: float, outside: float) -> float:
    """Find where |p̂ - p| = z sqrt(p (1 - p) / n), the definition of Wilson's ends, between two values of p."""
    z = 1.959963984540054
    for _ in range(200):
        middle = (inside + outside) / 2
        if abs(correct / n - middle) <= z * math.sqrt(middle * (1 - middle) / n):
            inside = middle
        else:
            outside = middle
    return inside


@pytest.mark.parametrize(("correct", "n"), [(1, 10), (81, 100), (810, 1000), (199, 200)])
def test_wilson_solves_its_defining_quadratic(correct: int, n: int) -> None:
    low, high = intervals.wilson(correct, n)
    assert low == pytest.approx(_by_bisection(correct, n, correct / n, 0.0))
    assert high == pytest.approx(_by_bisection(correct, n, correct / n, 1.0))


def test_wilson_at_the_edges() -> None:
    assert intervals.wilson(0, 0) == (0.0, 1.0)
    assert intervals.wilson(0, 5)[0] == 0.0
    assert intervals.wilson(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match="6 correct of 5"):
        intervals.wilson(6, 5)


@pytest.mark.parametrize("n", [6, 9, 20, 60, 1500])
def test_median_interval_is_the_narrowest_that_covers(n: int) -> None:
    m = intervals.median_interval([float(i) for i in reversed(range(n))])
    assert m.low is not None
    rank = int(m.low)

    def misses(r: int) -> bool:
        """Say whether the r-th from either end misses the median more often than 5 %, by exact counting."""
        return 2 * sum(math.comb(n, i) for i in range(r + 1)) * 20 > 2**n

    assert not misses(rank)
    assert misses(rank + 1)
    assert m.high == n - 1 - rank


def test_median_of_few_samples_has_no_interval() -> None:
    assert intervals.median_interval([3.0, 1.0, 2.0]) == intervals.Median(2.0, None, None, 3)


def test_mcnemar_equals_enumeration() -> None:
    for left, right in [(0, 0), (1, 0), (5, 1), (8, 8), (3, 9)]:
        n = left + right
        outcomes = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
        as_far = sum(abs(2 * k - n) >= abs(left - right) for k in outcomes)
        assert intervals.mcnemar(left, right) == as_far / 2**n


def test_holm_steps_down_and_never_decreases() -> None:
    assert intervals.holm({"a": 0.25, "b": 0.01, "c": 0.02}) == {"b": 0.03, "c": 0.04, "a": 0.25}
    assert intervals.holm({"a": 0.3, "b": 0.2}) == {"b": 0.4, "a": 0.4}
    assert intervals.holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


def test_four_times_the_items_halve_the_detectable_difference() -> None:
    assert intervals.detectable(400, 0.2) == pytest.approx(intervals.detectable(100, 0.2) / 2)


@pytest.mark.parametrize(
    ("words", "decided"),
    [
        ([], VerdictKind.NOT_RUN),
        ([VerdictKind.PASS, VerdictKind.PASS], VerdictKind.PASS),
        ([VerdictKind.PASS, VerdictKind.INCONCLUSIVE], VerdictKind.INCONCLUSIVE),
        ([VerdictKind.NOT_RUN, VerdictKind.INCONCLUSIVE], VerdictKind.NOT_RUN),
        ([VerdictKind.NOT_RUN, VerdictKind.FAIL, VerdictKind.PASS], VerdictKind.FAIL),
    ],
)
def test_joint(words: list[VerdictKind], decided: VerdictKind) -> None:
    assert joint(words) is decided


# ---- trajectories


def _records() -> dict[str, Record]:
    return {name: recorded_run.record(name, cell) for name, cell in recorded_run.cells().items()}


class SameLosses(NamedTuple):
    verdict: Verdict
    subjects: tuple[trajectories.JudgedTrajectory, ...]


def _same_losses(records: dict[str, Record]) -> SameLosses:
    cells = {c.cell_id: c for c in recorded_run.cells().values()} | {r.cell_id: r.cell for r in records.values()}
    comparison = Comparison(
        kind="same-losses",
        left=[records[n].cell_id for n in ("reference", "fused", "hf-peft") if n in records],
        right=[recorded_run.cells()["float64"].cell_id],
        says="same",
    )
    return SameLosses(*trajectories.judge(comparison, cells, {r.cell_id: r for r in records.values()}))


def _losses(record: Record) -> list[float]:
    assert record.measurements is not None
    assert record.measurements.training is not None
    return record.measurements.training.losses


def test_runs_that_differ_by_rounding_pass() -> None:
    result = _same_losses(_records())
    assert result.verdict.word is VerdictKind.PASS
    assert [s.by for s in result.subjects] == ["growth", "noise", "noise"]
    assert all(s.ratio is not None and s.ratio <= 1 for s in result.subjects)
    assert all(len(s.errors) == len(s.allowed) == 60 for s in result.subjects)
    assert set(result.verdict.records) == {_records()[n].id for n in ("reference", "fused", "hf-peft", "float64")}


@pytest.mark.parametrize("step", [0, 17, 59])
def test_one_loss_shifted_beyond_its_bound_fails_at_that_step(step: int) -> None:
    records = _records()
    judged = next(s for s in _same_losses(records).subjects if s.cell_id == records["hf-peft"].cell_id)
    shifted = _losses(records["hf-peft"])[:]
    shifted[step] = _losses(records["float64"])[step] + 1.5 * judged.allowed[step]
    records["hf-peft"] = recorded_run.with_losses(records["hf-peft"], shifted)
    result = _same_losses(records)
    assert result.verdict.word is VerdictKind.FAIL
    assert [s.verdict.word for s in result.subjects] == [VerdictKind.PASS, VerdictKind.PASS, VerdictKind.FAIL]
    assert result.subjects[2].step == step
    assert f"at step {step}:" in result.verdict.reason

    shifted[step] = _losses(records["float64"])[step] + 0.5 * judged.allowed[step]
    records["hf-peft"] = recorded_run.with_losses(records["hf-peft"], shifted)
    assert _same_losses(records).verdict.word is VerdictKind.PASS


def test_noise_seen_later_excuses_nothing_earlier() -> None:
    records = _records()
    late = _losses(records["reference"])[:]
    before = _same_losses(records).subjects[1].allowed
    late[40] = _losses(records["float64"])[40] + before[40]
    records["reference"] = recorded_run.with_losses(records["reference"], late)
    after = _same_losses(records).subjects[1].allowed
    assert after[:40] == before[:40]
    assert after[40] > before[40]


def test_a_reference_that_leaves_float64_faster_than_rounding_fails() -> None:
    records = _records()
    drifting = [x + 1e-4 * t for t, x in enumerate(_losses(records["reference"]))]
    records["reference"] = recorded_run.with_losses(records["reference"], drifting)
    result = _same_losses(records)
    assert result.subjects[0].verdict.word is VerdictKind.FAIL
    assert result.verdict.word is VerdictKind.FAIL


def test_another_seed_is_refused() -> None:
    records = _records()
    records["fused"] = recorded_run.record("fused", recorded_run.cells(seed=1)["fused"])
    result = _same_losses(records)
    assert result.subjects[1].verdict.word is VerdictKind.NOT_RUN
    assert "seed 1 against 0" in result.subjects[1].verdict.reason


def with_cell(record: Record, **changes: object) -> Record:
    cell = record.cell.model_copy(update=changes)
    return record.model_copy(update={"cell": cell, "cell_id": cell.cell_id})


def in_parts(record: Record) -> Record:
    how = {"accumulate": 4, "checkpointing": True}
    return with_cell(record, training=record.cell.training.model_copy(update=how))


def test_a_batch_in_parts_is_judged_by_the_losses_of_the_whole() -> None:
    records = _records()
    records["fused"] = in_parts(records["fused"])
    result = _same_losses(records)
    assert result.verdict.word is VerdictKind.PASS
    assert [s.by for s in result.subjects] == ["growth", "noise", "noise"]


def test_another_optimizer_is_refused_and_named() -> None:
    records = _records()
    records["fused"] = with_cell(records["fused"], optimizer="adamw-8bit")
    subject = _same_losses(records).subjects[1]
    assert subject.verdict.word is VerdictKind.NOT_RUN
    assert "optimizer adamw-8bit against adamw" in subject.verdict.reason


def test_another_data_order_is_refused() -> None:
    records = _records()
    m = records["fused"].measurements
    assert m is not None
    assert m.training is not None
    other = m.training.model_copy(update={"tokens": list(reversed(m.training.tokens))})
    records["fused"] = records["fused"].model_copy(update={"measurements": m.model_copy(update={"training": other})})
    assert "the data order differs" in _same_losses(records).subjects[1].verdict.reason


def test_a_run_of_other_length_is_refused() -> None:
    records = _records()
    records["fused"] = recorded_run.with_losses(records["fused"], _losses(records["fused"])[:30])
    judged = _same_losses(records).subjects[1]
    assert judged.verdict.word is VerdictKind.NOT_RUN
    assert "30 steps were run here and 60 in float64" in judged.verdict.reason


def test_without_a_reference_run_the_noise_is_unknown() -> None:
    records = _records()
    records["reference"] = recorded_run.failed(records["reference"])
    result = _same_losses(records)
    assert [s.verdict.word for s in result.subjects] == [
        VerdictKind.NOT_RUN,
        VerdictKind.INCONCLUSIVE,
        VerdictKind.INCONCLUSIVE,
    ]


def test_without_float64_nothing_is_judged() -> None:
    records = _records()
    del records["float64"]
    result = _same_losses(records)
    assert {s.verdict.word for s in result.subjects} == {VerdictKind.NOT_RUN}
    assert "its float64 Cell is missing" in result.verdict.reason


# ---- ranking


def test_cells_are_ranked_within_equal_budgets_only(tmp_path: Path) -> None:
    found = ranking.groups(recorded_run.write_run(tmp_path / "r"))
    named = {id_: name for name, c in recorded_run.cells().items() for id_ in [c.cell_id]}
    assert [[named[e.record.cell_id] for e in g.ranked] for g in found] == [
        ["full", "hf-peft", "reference", "fused", "nf4", "lora-r1", "head"],
        ["float64"],
        ["smollm-lora"],
    ]
    assert [[named[e.record.cell_id] for e in g.untrained] for g in found] == [[], [], ["zero-shot"]]
    assert {named[e.record.cell_id]: e.standing for e in found[0].ranked} == {
        "full": "best", "hf-peft": "tied", "reference": "tied", "fused": "tied", "nf4": "tied",
        "lora-r1": "below", "head": "below",
    }  # fmt: skip
    assert found[0].basis == "tied"
    assert found[2].basis == "all"
    assert found[0].detectable is not None
    assert found[1].detectable is None


def test_micro_batches_and_optimizer_are_not_part_of_the_budget(tmp_path: Path) -> None:
    records = _records()
    records["fused"] = in_parts(records["fused"])
    records["hf-peft"] = with_cell(records["hf-peft"], optimizer="adamw-8bit")
    cells = [record.cell for record in records.values()]
    # Only one Cell is requested, so the suite has no comparison; all Cells are in the manifest.
    run = recorded_run.write_run(
        tmp_path / "r", only=["head"], cells=cells, change=lambda *_: None, extra=list(records.values())
    )
    group = ranking.groups(run)[0]
    assert {e.record.cell.implementation for e in group.ranked} == {"reference", "fused", "hf-peft"}
    assert set(group.optimizers) == {"adamw", "adamw-8bit"}
    parts, narrow = records["fused"].cell, records["hf-peft"].cell
    assert ranking.why_not_comparable(parts, narrow) == ""
    names = naming.full(cells)
    assert names[parts.cell_id].endswith("lora r=8 [fused] accumulate=4 checkpointing")
    assert names[narrow.cell_id].endswith("lora r=8 [hf-peft] adamw-8bit")


def test_other_items_are_compared_by_their_intervals(tmp_path: Path) -> None:
    def change(name: str, r: Record) -> Record:
        assert r.measurements is not None
        assert r.measurements.accuracy is not None
        if name != "lora-r1":
            return r
        a = r.measurements.accuracy
        other = a.model_copy(update={"items": [i.model_copy(update={"id": f"other {i.id}"}) for i in a.items]})
        return r.model_copy(update={"measurements": r.measurements.model_copy(update={"accuracy": other})})

    (group,) = ranking.groups(recorded_run.write_run(tmp_path / "r", only=["full", "lora-r1"], change=change))
    assert group.ranked[1].p is None
    assert group.ranked[1].standing == "below"
    assert group.basis == "independent"


# ---- verdict


def _better(left: str, right: str) -> list[Comparison]:
    c = recorded_run.cells()
    return [Comparison(kind="better", left=[c[left].cell_id], right=[c[right].cell_id], says="it is better")]


@pytest.mark.parametrize(
    ("left", "right", "word", "reason"),
    [
        ("reference", "head", VerdictKind.PASS, "the intervals do not overlap"),
        ("head", "reference", VerdictKind.FAIL, "the opposite holds"),
        ("reference", "full", VerdictKind.INCONCLUSIVE, "the intervals overlap"),
        ("full", "reference", VerdictKind.INCONCLUSIVE, "the intervals overlap"),
        ("reference", "float64", VerdictKind.NOT_RUN, "dtype float32 against float64"),
        ("smollm-lora", "reference", VerdictKind.NOT_RUN, "not comparable: model"),
        ("smollm-lora", "zero-shot", VerdictKind.PASS, "the intervals do not overlap"),
    ],
)
def test_better(tmp_path: Path, left: str, right: str, word: VerdictKind, reason: str) -> None:
    run = recorded_run.write_run(tmp_path / "r", asked=lambda _: _better(left, right))
    (judged,) = run_verdict.judge(run).judgements
    assert judged.verdict.word is word
    assert reason in judged.verdict.reason
    assert {recorded_run.cells()[n].cell_id + ".1" for n in (left, right)} == set(judged.verdict.records)


def test_one_reversed_pair_refutes_all_of_them(tmp_path: Path) -> None:
    c = recorded_run.cells()
    comparison = Comparison(
        kind="better", left=[c["reference"].cell_id, c["head"].cell_id], right=[c["lora-r1"].cell_id], says="both"
    )
    (judged,) = run_verdict.judge(recorded_run.write_run(tmp_path / "r", asked=lambda _: [comparison])).judgements
    assert judged.verdict.word is VerdictKind.FAIL
    assert "1 of 2 pairs" in judged.verdict.reason


@pytest.mark.parametrize("how", ["missing", "oom"])
def test_better_is_not_judged_without_both_records(tmp_path: Path, how: str) -> None:
    def change(name: str, r: Record) -> Record | None:
        if name != "head":
            return r
        return None if how == "missing" else recorded_run.failed(r, Status.OOM)

    (judged, *_) = run_verdict.judge(recorded_run.write_run(tmp_path / "r", change=change)).judgements
    assert judged.verdict.word is VerdictKind.NOT_RUN
    assert f"is {how}" in judged.verdict.reason


def _whole(tmp_path: Path, **kwargs: object) -> Run:
    return recorded_run.write_run(tmp_path / "r", **kwargs)  # type: ignore[arg-type]


def test_a_whole_run_passes(tmp_path: Path) -> None:
    run = _whole(tmp_path)
    v = run_verdict.judge(run)
    assert (v.verdict.word, v.exit_code(strict=True), v.counts, run.how) == (
        VerdictKind.PASS,
        Exit.PASS,
        {"ok": 10},
        "finished",
    )
    assert v.parity.failed == 0
    assert len(v.parity.unchecked) == 3


@pytest.mark.parametrize(
    ("right", "only", "reason"),
    [
        ("head", (), "all 10 measured Cells conform and the suite's question is answered yes"),
        ("full", (), "the suite's question is left open; all 10 measured Cells conform"),
        ("head", ("reference",), "the suite's question is left open; the only measured Cell conforms"),
    ],
)
def test_a_verdict_on_one_thing_is_singular(tmp_path: Path, right: str, only: tuple[str, ...], reason: str) -> None:
    v = run_verdict.judge(_whole(tmp_path, only=only, asked=lambda _: _better("reference", right)))
    assert v.verdict.reason == reason


def test_same_losses_of_one_cell_name_it(tmp_path: Path) -> None:
    c = recorded_run.cells()
    asked = Comparison(kind="same-losses", left=[c["fused"].cell_id], right=[c["float64"].cell_id], says="the same")
    (judged,) = run_verdict.judge(_whole(tmp_path, asked=lambda _: [asked])).judgements
    assert "[fused] follows the float64 losses through 60 steps" in judged.verdict.reason


@pytest.mark.parametrize("status", [Status.OOM, Status.TIMEOUT, Status.ERROR, Status.LOST])
def test_an_unmeasured_cell_is_infrastructure(tmp_path: Path, status: Status) -> None:
    v = run_verdict.judge(_whole(tmp_path, change=lambda n, r: recorded_run.failed(r, status) if n == "nf4" else r))
    assert (v.verdict.word, v.exit) == (VerdictKind.INCONCLUSIVE, Exit.INFRASTRUCTURE)
    assert f"1 {status.value}" in v.verdict.reason


def test_a_skipped_cell_is_no_fault(tmp_path: Path) -> None:
    skip = lambda n, r: recorded_run.failed(r, Status.SKIPPED, because="no GPU", failure=None) if n == "nf4" else r  # noqa: E731
    assert run_verdict.judge(_whole(tmp_path, change=skip)).exit is Exit.PASS


def test_a_cell_that_found_no_place_to_run_is_infrastructure(tmp_path: Path) -> None:
    busy = Failure(kind="busy GPU", message="")
    skip = lambda n, r: recorded_run.failed(r, Status.SKIPPED, because="in use", failure=busy) if n == "nf4" else r  # noqa: E731
    assert run_verdict.judge(_whole(tmp_path, change=skip)).exit is Exit.INFRASTRUCTURE


def test_a_missing_cell_a_torn_file_and_a_lacking_footer_are_infrastructure(tmp_path: Path) -> None:
    missing = recorded_run.write_run(tmp_path / "missing", change=lambda n, r: None if n == "nf4" else r)
    unfinished = recorded_run.write_run(tmp_path / "unfinished", footer=False)
    torn = Run(missing.path, unfinished.manifest, unfinished.records, missing.footer, {"x.1.json": "torn"})
    for run, words in ((missing, "without any Record"), (unfinished, "incomplete"), (torn, "unreadable")):
        v = run_verdict.judge(run)
        assert v.exit is Exit.INFRASTRUCTURE
        assert words in v.verdict.reason


def test_a_nonconforming_cell_fails_before_anything_else(tmp_path: Path) -> None:
    def change(name: str, r: Record) -> Record | None:
        return recorded_run.failed(r, Status.NONCONFORMING) if name == "fused" else recorded_run.failed(r)

    v = run_verdict.judge(_whole(tmp_path, change=change, footer=False))
    assert (v.verdict.word, v.exit) == (VerdictKind.FAIL, Exit.FAIL)
    assert v.nonconforming == (recorded_run.cells()["fused"].cell_id + ".1",)


def test_an_untrained_tensor_is_a_finding_with_its_name(tmp_path: Path) -> None:
    def change(name: str, r: Record) -> Record:
        return recorded_run.failed(r, Status.UNTRAINED, because="q.A never moved") if name == "fused" else r

    v = run_verdict.judge(_whole(tmp_path, change=change))
    named = naming.full(recorded_run.cells().values())[recorded_run.cells()["fused"].cell_id]
    assert (v.exit, v.counts["untrained"], len(v.nonconforming)) == (Exit.FAIL, 1, 1)
    assert v.verdict.reason == f"training of 1 Cell left a tensor as it was ({named}: q.A never moved)"


def test_divergence_is_not_called_another_method(tmp_path: Path) -> None:
    reference = recorded_run.cells()["reference"]

    def change(name: str, r: Record) -> Record | None:
        if name not in ("fused", "reference"):
            return r
        red = recorded_run.failed(r, Status.NONCONFORMING, because="the gradient is exactly zero up to step 5")
        assert red.failure is not None
        kind = "Diverged" if name == "fused" else "Untrained"
        return red.model_copy(update={"failure": red.failure.model_copy(update={"kind": kind})})

    v = run_verdict.judge(_whole(tmp_path, change=change))
    names = naming.full(recorded_run.cells().values())
    assert (v.exit, len(v.nonconforming)) == (Exit.FAIL, 2)
    assert v.verdict.reason.startswith(
        f"1 Cell departing from the Method ({names[reference.cell_id]}: the gradient is exactly zero up to "
        f"step 5); training of 1 Cell diverged ({names[recorded_run.cells()['fused'].cell_id]})"
    )


def test_a_failed_check_in_an_ok_record_fails(tmp_path: Path) -> None:
    red = CheckResult(check="lora/forward/float32/warm", outcome=Outcome.FAIL, error=1.0, allowed=0.1)
    v = run_verdict.judge(_whole(tmp_path, change=lambda n, r: r.model_copy(update={"checks": [red]})))
    assert v.exit is Exit.FAIL


def test_a_refuted_comparison_fails(tmp_path: Path) -> None:
    v = run_verdict.judge(_whole(tmp_path, asked=lambda _: _better("head", "full")))
    assert (v.verdict.word, v.exit) == (VerdictKind.FAIL, Exit.FAIL)


def test_nothing_measured_is_nothing_compared(tmp_path: Path) -> None:
    v = run_verdict.judge(_whole(tmp_path, change=lambda _, r: recorded_run.failed(r, Status.SKIPPED, failure=None)))
    assert (v.verdict.word, v.exit) == (VerdictKind.NOT_RUN, Exit.NOTHING_COMPARED)


def test_a_run_in_which_every_cell_broke_is_infrastructure(tmp_path: Path) -> None:
    v = run_verdict.judge(_whole(tmp_path, change=lambda _, r: recorded_run.failed(r)))
    assert (v.verdict.word, v.exit) == (VerdictKind.INCONCLUSIVE, Exit.INFRASTRUCTURE)


def test_an_open_question_counts_only_when_strict(tmp_path: Path) -> None:
    run = _whole(tmp_path, asked=lambda _: _better("reference", "full"))
    assert run_verdict.judge(run).exit is Exit.PASS
    assert run_verdict.judge(run).verdict.word is VerdictKind.INCONCLUSIVE
    assert run_verdict.judge(run).exit_code(strict=True) is Exit.INCONCLUSIVE
