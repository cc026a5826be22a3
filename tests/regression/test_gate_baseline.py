"""`gate --baseline` and `baseline`: kinds of findings, refusals, torn files, exit codes, outputs and cost."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean, variance
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from scipy import stats

from harness.analysis import metrics
from harness.analysis.comparison import against_baseline
from harness.analysis.comparison.against_baseline import BaselineVerdict
from harness.analysis.comparison.baseline_rows import (
    COUNTED_PEAK_B,
    ONE_SEED,
    PROCESS_PEAK_B,
    PROCESS_SHARE,
    TIMES,
    ComparisonRow,
    GateResult,
    Margins,
    RowKind,
)
from harness.analysis.measurements import above_imports, training_peak
from harness.analysis.run_facts import analyse
from harness.analysis.statistics import over_seeds
from harness.analysis.statistics.intervals import paired_difference
from harness.analysis.verdict_kind import Verdict, VerdictKind
from harness.cli import main
from harness.cli.topics import explain
from harness.errors import Exit
from harness.records import store
from harness.records.manifest import Footer
from harness.records.record import AssetUse, Measurements, Outcome, Phase, Record, Status
from harness.regression.baseline import store as baselines
from harness.regression.outputs import github, junit, markdown
from support import recorded_run
from support.repository import PUBLISHED

COUNTED_PEAK = metrics.COUNTED_PEAK.quantity
Change = Callable[[str, Record], Record | None]
FUSED = recorded_run.cells()["fused"].cell_id
FEW = ("head", "reference", "fused")


def only(name: str, change: Callable[[Record], Record | None]) -> Change:
    """Change one Cell's Record."""
    return lambda at, record: change(record) if at == name else record


def measured(record: Record, **changes: Any) -> Record:
    assert record.measurements is not None
    return record.model_copy(update={"measurements": record.measurements.model_copy(update=changes)})


def measurements(record: Record) -> Measurements:
    assert record.measurements is not None
    return record.measurements


def memory(record: Record, **changes: Any) -> Record:
    return measured(record, memory=measurements(record).memory.model_copy(update=changes))


def peak(record: Record, more: int) -> Record:
    def taller(p: Phase) -> Phase:
        taken = p.peak_memory_B or 0
        return p.model_copy(update={"peak_memory_B": taken + more}) if p.name == "train" else p

    return record.model_copy(update={"phases": [taller(p) for p in record.phases]})


def red(record: Record) -> Record:
    failed = record.checks[0].model_copy(update={"outcome": Outcome.FAIL})
    return record.model_copy(update={"checks": [failed, *record.checks[1:]]})


@pytest.fixture
def base(tmp_path: Path) -> store.Run:
    return recorded_run.write_run(tmp_path / "results" / "runs" / "base", run="base", only=FEW)


def judge(base: store.Run, new: store.Run, **options: Any) -> BaselineVerdict:
    """Compare two loaded runs."""
    return against_baseline.judge(analyse(base), analyse(new), **options)


def against(base: store.Run, change: Change = lambda _, r: r, **more: Any) -> BaselineVerdict:
    """Judge a run of the same Cells, with some Records changed."""
    margins, strict = more.pop("margins", None), more.pop("strict", False)
    folder = base.path.with_name("new")
    shutil.rmtree(folder, ignore_errors=True)
    return judge(
        base,
        recorded_run.write_run(folder, run="new", change=change, **{"only": FEW, **more}),
        margins=margins,
        strict=strict,
    )


def found(result: BaselineVerdict, kind: RowKind) -> list[ComparisonRow]:
    return [row for row in result.rows if row.kind is kind and not row.same]


# ---- kinds of findings


def test_an_equal_run_passes_and_times_are_not_judged(base: store.Run) -> None:
    result = against(base)
    assert (result.verdict.word, result.exit, result.compared) == (VerdictKind.PASS, Exit.PASS, 3)
    assert {row.kind for row in result.rows if not row.same} == {RowKind.TIME}
    times = found(result, RowKind.TIME)
    assert all(row.reason == TIMES and row.base and row.new for row in times)
    assert not any(row.judged for row in times)


def slower(record: Record) -> Record:
    training = measurements(record).training
    assert training is not None
    return measured(record, training=training.model_copy(update={"step_seconds": [9.0] * len(training.step_seconds)}))


def test_a_time_ten_times_as_long_fails_nothing(base: store.Run) -> None:
    result = against(base, only("fused", slower))
    assert result.exit == Exit.PASS
    assert [row.new for row in found(result, RowKind.TIME) if row.what == "step" and row.cells == (FUSED,)] == [9.0]


def test_a_missing_time_is_a_finding(base: store.Run) -> None:
    untimed = against(base, only("fused", lambda r: measured(r, latency=[])))
    missing = found(untimed, RowKind.MISSING)
    assert [row.what for row in missing] == [f"forward {of}, 1 x 40" for of in ("base", "unmerged", "merged")]
    assert (untimed.exit, untimed.verdict.word) == (Exit.FAIL, VerdictKind.FAIL)
    untrained = against(base, only("fused", lambda r: measured(r, training=None)))
    assert "step" in [row.what for row in found(untrained, RowKind.MISSING)]


def with_losses(factor: float) -> Callable[[Record], Record]:
    def change(record: Record) -> Record:
        training = measurements(record).training
        assert training is not None
        return measured(record, training=training.model_copy(update={"losses": [factor * x for x in training.losses]}))

    return change


@pytest.mark.parametrize(("factor", "code"), [(100.0, Exit.FAIL), (1.001, Exit.PASS), (0.5, Exit.PASS)])
def test_a_higher_training_loss_is_a_finding(factor: float, code: Exit, base: store.Run) -> None:
    result = against(base, only("fused", with_losses(factor)))
    (row,) = found(result, RowKind.LOSS)
    assert (row.cells, result.exit) == ((FUSED,), code)
    training = next(m.training for r in base.records if r.cell_id == FUSED and (m := r.measurements))
    assert training is not None
    last = training.losses[-math.ceil(len(training.losses) / 4) :]
    assert (row.base, row.new) == (fmean(last), fmean(factor * x for x in last))


def test_a_check_that_allows_far_more_is_inconclusive(base: store.Run) -> None:
    def looser(times: float) -> Change:
        def change(record: Record) -> Record:
            first, *rest = record.checks
            return record.model_copy(
                update={"checks": [first.model_copy(update={"allowed": times * (first.allowed or 0)}), *rest]}
            )

        return only("fused", change)

    result = against(base, looser(1e6))
    (row,) = found(result, RowKind.PARITY)
    assert (row.word, result.verdict.word) == (VerdictKind.INCONCLUSIVE, VerdictKind.INCONCLUSIVE)
    assert row.reason == "larger errors allowed than in the baseline: lora/forward/float32/init (1e+06 times)"
    assert (
        against(base, looser(1.5)).verdict.word is VerdictKind.PASS
    )  # the noise of another machine may differ so much


def test_a_run_without_hashes_does_not_pass(base: store.Run) -> None:
    folder = base.path.with_name("new")
    new = recorded_run.write_run(folder, run="new", only=FEW)
    assert new.footer is not None
    store.write(folder / "footer.json", new.footer.model_copy(update={"sha256": {}}))
    result = judge(base, store.read_run(folder))
    assert (result.verdict.word, result.exit) == (VerdictKind.INCONCLUSIVE, Exit.INFRASTRUCTURE)
    assert "the run has no footer with hashes" in result.verdict.reason


def test_a_check_that_passed_before_and_fails_now(base: store.Run) -> None:
    result = against(base, only("fused", red))
    (row,) = found(result, RowKind.PARITY)
    assert (row.word, row.cells, result.exit) == (VerdictKind.FAIL, (FUSED,), Exit.FAIL)
    assert "lora/forward/float32/init failed" in row.reason
    assert "parity: " in result.verdict.reason


def test_a_nonconforming_cell_fails(base: store.Run) -> None:
    result = against(base, only("fused", lambda r: recorded_run.failed(r, Status.NONCONFORMING, because="diverged")))
    (row,) = found(result, RowKind.PARITY)
    assert (row.word, row.reason, found(result, RowKind.OUTCOME)) == (VerdictKind.FAIL, "diverged", [])


@pytest.mark.parametrize("before", [Status.NONCONFORMING, Status.OOM])
def test_a_nonconforming_cell_fails_whatever_it_was_before(before: Status, base: store.Run) -> None:
    def wrong(status: Status) -> Change:
        return only("fused", lambda r: recorded_run.failed(red(r), status, because="it departs"))

    old = recorded_run.write_run(base.path.with_name("old"), run="old", only=FEW, change=wrong(before))
    result = against(old, wrong(Status.NONCONFORMING))
    (row,) = [row for row in found(result, RowKind.PARITY) if row.word is VerdictKind.FAIL]
    assert (row.cells, result.exit) == ((FUSED,), Exit.FAIL)
    assert row.reason.endswith(f"was {before.value} in the baseline")
    assert against(old, only("fused", lambda r: recorded_run.failed(r, Status.OOM))).exit == Exit.PASS


def test_a_check_that_no_longer_runs_is_inconclusive(base: store.Run) -> None:
    fewer = only("fused", lambda r: r.model_copy(update={"checks": r.checks[1:]}))
    assert against(base, fewer).exit == Exit.PASS
    result = against(base, fewer, strict=True)
    assert (found(result, RowKind.PARITY)[0].word, result.exit) == (VerdictKind.INCONCLUSIVE, Exit.INCONCLUSIVE)


@pytest.mark.parametrize("status", [Status.OOM, Status.TIMEOUT, Status.ERROR, Status.LOST, Status.SKIPPED])
def test_another_outcome_of_an_ok_cell_fails(base: store.Run, status: Status) -> None:
    result = against(base, only("fused", lambda r: recorded_run.failed(r, status)))
    (row,) = found(result, RowKind.OUTCOME)
    assert (row.word, row.base, row.new, result.exit) == (VerdictKind.FAIL, "ok", status.value, Exit.FAIL)


def test_a_cell_that_the_run_does_not_plan_fails(base: store.Run) -> None:
    result = against(base, only=FEW[:2])
    (row,) = found(result, RowKind.MISSING)
    assert (row.word, row.cells, result.exit) == (VerdictKind.FAIL, (FUSED,), Exit.FAIL)


def test_a_cell_that_the_run_did_not_reach_is_not_run(base: store.Run) -> None:
    result = against(base, only("fused", lambda _: None))
    (row,) = found(result, RowKind.MISSING)
    assert (row.word, result.verdict.word, result.exit) == (
        VerdictKind.NOT_RUN,
        VerdictKind.INCONCLUSIVE,
        Exit.INFRASTRUCTURE,
    )
    assert against(base, footer=False).exit == Exit.INFRASTRUCTURE


def test_a_new_cell_is_listed_and_not_judged(base: store.Run) -> None:
    result = against(base, only=(*FEW, "lora-r1"))
    assert result.exit == Exit.PASS
    assert [row.cells for row in found(result, RowKind.NEW)] == [(recorded_run.cells()["lora-r1"].cell_id,)]


def test_nothing_compared_is_never_a_pass(base: store.Run) -> None:
    result = against(base, only=("lora-r1",))
    assert (result.verdict.word, result.exit) == (VerdictKind.NOT_RUN, Exit.NOTHING_COMPARED)
    assert "nothing was compared" in result.verdict.reason


@pytest.mark.parametrize("field", ["weights_B", "adapter_B", "gradients_B", "optimizer_B", "optimizer_host_B"])
def test_one_more_counted_byte_fails_and_fewer_are_listed(base: store.Run, field: str) -> None:
    def by(n: int) -> Change:
        return only("fused", lambda r: memory(r, **{field: getattr(measurements(r).memory, field) + n}))

    result = against(base, by(1))
    (row,) = found(result, RowKind.MEMORY)
    assert (row.word, row.delta, row.reason, result.exit) == (VerdictKind.FAIL, 1, "grew", Exit.FAIL)
    if field != "optimizer_host_B":
        less = against(base, by(-1))
        (row,) = found(less, RowKind.MEMORY)
        assert (row.word, row.reason, less.exit) == (VerdictKind.PASS, "shrank", Exit.PASS)


@pytest.mark.parametrize("by", [-1, 1])
def test_another_parameter_count_fails(base: store.Run, by: int) -> None:
    def change(record: Record) -> Record:
        count = measurements(record).parameters
        return measured(record, parameters=count.model_copy(update={"adapter": count.adapter + by}))

    result = against(base, only("fused", change))
    assert [(row.word, row.what) for row in found(result, RowKind.PARAMETERS)] == [
        (VerdictKind.FAIL, "adapter parameters")
    ]


@pytest.mark.slow
def test_process_peaks_have_a_margin_and_gpu_peaks_none(base: store.Run) -> None:
    def grown(n: int, source: str = "VmHWM") -> Change:
        return only("fused", lambda r: memory(peak(r, n), source=source))

    (row,) = found(against(base, grown(1)), RowKind.MEMORY)
    assert isinstance(row.base, int)
    usual = max(PROCESS_PEAK_B, int(PROCESS_SHARE * row.base))
    assert against(base, grown(usual)).exit == Exit.PASS
    assert against(base, grown(usual + 1)).exit == Exit.FAIL
    assert against(base, grown(usual + 1), margins=Margins(memory_B=2 * usual)).exit == Exit.PASS
    assert against(base, grown(1), margins=Margins(memory_B=0)).exit == Exit.FAIL
    large = recorded_run.write_run(base.path.with_name("large"), only=FEW, change=grown(2**31))
    for share, code in ((0.03, Exit.PASS), (0.08, Exit.FAIL)):
        assert against(large, grown(2**31 + int(share * 2**31))).exit == code
    assert found(against(base, grown(0, "sampled")), RowKind.MEMORY)[0].word is VerdictKind.INCONCLUSIVE
    gpu = recorded_run.write_run(base.path.with_name("gpu"), only=FEW, change=grown(0, "cuda allocated"))
    assert against(gpu, grown(0, "cuda allocated")).exit == Exit.PASS
    assert against(gpu, grown(1, "cuda allocated")).exit == Exit.FAIL


def test_counted_peaks_may_grow_by_little_or_by_the_option(base: store.Run) -> None:
    counted = recorded_run.write_run(
        base.path.with_name("counted"), only=FEW, change=only("fused", lambda r: of_tensors(r, 0))
    )

    def grown(n: int, **more: Any) -> BaselineVerdict:
        return against(counted, only("fused", lambda r: of_tensors(r, n)), **more)

    assert found(grown(0), RowKind.MEMORY) == []
    assert grown(COUNTED_PEAK_B).exit == Exit.PASS
    result = grown(COUNTED_PEAK_B + 1)
    (row,) = found(result, RowKind.MEMORY)
    assert (row.what, row.word, row.delta, result.exit) == (
        COUNTED_PEAK,
        VerdictKind.FAIL,
        COUNTED_PEAK_B + 1,
        Exit.FAIL,
    )
    assert row.reason == "grew (margin 65,536 B, counted)"
    assert grown(COUNTED_PEAK_B + 1, margins=Margins(memory_B=2 * COUNTED_PEAK_B)).exit == Exit.PASS
    assert grown(1, margins=Margins(memory_B=0)).exit == Exit.FAIL
    # An old baseline has no counts, and is not compared; a run that lacks counts is a finding.
    new = against(base, only("fused", lambda r: of_tensors(r, 0)))
    assert ([row.what for row in found(new, RowKind.NEW)], new.exit) == ([COUNTED_PEAK], Exit.PASS)
    assert [row.what for row in found(against(counted), RowKind.MISSING)] == [COUNTED_PEAK]


def of_tensors(record: Record, more: int) -> Record:
    return memory(record, counted_peak_B=100 * recorded_run.MIB + more)


def test_the_published_run_supports_the_margin_of_a_process() -> None:
    """The margin gives one false alarm in a million, at the upper 95 % bound of the deviation between equal processes."""
    run = store.read_run(PUBLISHED / "2026-11-25-tune-small-cpu")
    groups: dict[str, list[int]] = {}
    for record in run.latest().values():
        like = record.cell.model_copy(
            update={"seed": 0, "training": record.cell.training.model_copy(update={"lr": 0.0})}
        )
        taken = training_peak(record)
        assert taken is not None
        groups.setdefault(like.cell_id, []).append(above_imports(record, taken))
    freedom = sum(len(g) - 1 for g in groups.values())
    square = sum((len(g) - 1) * variance(g) for g in groups.values()) / freedom
    bound = math.sqrt(2 * square * freedom / stats.chi2.ppf(0.05, freedom)) * stats.norm.isf(1e-6)
    assert PROCESS_PEAK_B / 2 < bound <= PROCESS_PEAK_B


def test_a_drop_of_accuracy_with_one_seed_names_the_seed(base: store.Run) -> None:
    result = against(base, only("fused", lambda r: recorded_run.with_accuracy(r, 0.75)))
    (row,) = found(result, RowKind.ACCURACY)
    assert (row.word, result.exit) == (VerdictKind.FAIL, Exit.FAIL)
    assert ONE_SEED in row.reason
    assert "margin 2 points" in row.reason
    assert row.interval is not None
    assert row.interval[1] < 0


def test_a_higher_accuracy_passes_and_is_listed(base: store.Run) -> None:
    result = against(base, only("fused", lambda r: recorded_run.with_accuracy(r, 0.87)))
    (row,) = found(result, RowKind.ACCURACY)
    assert (row.word, row.reason.startswith("rose"), result.exit) == (VerdictKind.PASS, True, Exit.PASS)


def test_a_small_drop_is_inconclusive_or_within_a_wide_margin(base: store.Run) -> None:
    drop = only("fused", lambda r: recorded_run.with_accuracy(r, 0.805))
    strict = against(base, drop, strict=True, margins=Margins(accuracy=0.001))
    assert (found(strict, RowKind.ACCURACY)[0].word, strict.exit) == (VerdictKind.INCONCLUSIVE, Exit.INCONCLUSIVE)
    assert "smallest detectable drop" in found(strict, RowKind.ACCURACY)[0].reason
    assert found(against(base, drop), RowKind.ACCURACY)[0].word is VerdictKind.PASS


def test_other_items_are_not_compared(base: store.Run) -> None:
    def renamed(record: Record) -> Record:
        a = measurements(record).accuracy
        assert a is not None
        items = [i.model_copy(update={"id": f"other-{i.id}"}) for i in a.items]
        return measured(record, accuracy=a.model_copy(update={"items": items}))

    result = against(base, only("fused", renamed), strict=True)
    assert (found(result, RowKind.ACCURACY)[0].word, result.exit) == (VerdictKind.INCONCLUSIVE, Exit.INCONCLUSIVE)


def test_a_number_that_is_no_longer_measured_is_missing(base: store.Run) -> None:
    result = against(base, only("fused", lambda r: measured(r, accuracy=None)))
    assert [(row.word, row.what) for row in found(result, RowKind.MISSING)] == [(VerdictKind.FAIL, "accuracy")]


def test_an_environment_is_named_once_for_all_its_cells(base: store.Run) -> None:
    software = {**recorded_run.environment().software, "torch": "2.10.0"}

    def upgraded(_: str, record: Record) -> Record:
        return record.model_copy(update={"environment": recorded_run.environment(software=software)})

    result = against(base, upgraded)
    (row,) = found(result, RowKind.ENVIRONMENT)
    assert (row.name, row.reason, result.exit) == ("3 Cells", "software torch: 2.9.1+cpu, 2.10.0", Exit.PASS)
    assert "software torch: 2.9.1+cpu, 2.10.0 (3 Cells)" in result.verdict.reason
    assert against(base, upgraded, strict=True).exit == Exit.INCONCLUSIVE


def test_another_commit_is_named_and_passes(base: store.Run) -> None:
    def later(_: str, record: Record) -> Record:
        return record.model_copy(
            update={"environment": recorded_run.environment(git_sha="f" * 40, code_version="d" * 64)}
        )

    result = against(base, later, strict=True)
    assert (result.verdict.word, result.exit) == (VerdictKind.PASS, Exit.PASS)
    assert "commit: 0123abc, ffffffffffff" in result.verdict.reason


def test_another_model_under_the_same_name_is_named(base: store.Run) -> None:
    other: list[AssetUse] = recorded_run.assets("d" * 64)
    result = against(base, only("fused", lambda r: r.model_copy(update={"assets": other})), strict=True)
    (row,) = found(result, RowKind.ASSETS)
    assert (row.word, row.cells, result.exit) == (VerdictKind.INCONCLUSIVE, (FUSED,), Exit.INCONCLUSIVE)


# ---- files that cannot be read


def test_broken_files_are_named_and_the_others_are_used(base: store.Run) -> None:
    new = recorded_run.write_run(base.path.with_name("new"), run="new", only=(*FEW, "lora-r1", "nf4"))
    whole = recorded_run.write_run(base.path.with_name("whole"), run="whole", only=(*FEW, "lora-r1", "nf4"))
    ids = [recorded_run.cells()[name].cell_id for name in ("fused", "lora-r1", "nf4", "head")]
    files = [new.path / "cells" / f"{i}.1.json" for i in ids]
    files[0].write_bytes(files[0].read_bytes()[:500])
    files[1].write_text("no JSON", encoding="utf-8")
    future = json.loads(files[2].read_text(encoding="utf-8"))
    files[2].write_text(json.dumps(future | {"schema": 99, "more": 1}), encoding="utf-8")
    files[3].write_text(json.dumps({"schema": 1, "other": "program"}), encoding="utf-8")
    result = judge(whole, store.read_run(new.path))
    assert (result.compared, result.exit, result.verdict.word) == (1, Exit.INFRASTRUCTURE, VerdictKind.INCONCLUSIVE)
    assert {row.cells[0] for row in found(result, RowKind.MISSING)} == set(ids)
    assert all(any(file.name in why for why in result.unreadable) for file in files)
    assert any("written with schema 99, this version reads up to 1" in why for why in result.unreadable)


def test_a_broken_file_of_no_cell_does_not_change_the_exit_code(base: store.Run) -> None:
    against(base)
    folder = base.path.with_name("new")
    (folder / "cells" / "torn.json").write_text("{", encoding="utf-8")
    result = judge(base, store.read_run(folder))
    assert (result.exit, result.verdict.word) == (Exit.PASS, VerdictKind.PASS)
    assert "1 unreadable file" in result.verdict.reason


def test_no_older_attempt_replaces_a_torn_one(base: store.Run) -> None:
    against(base)
    folder = base.path.with_name("new")
    (folder / "cells" / f"{FUSED}.2.json").write_text("{", encoding="utf-8")
    result = judge(base, store.read_run(folder))
    assert [row.cells for row in found(result, RowKind.MISSING)] == [(FUSED,)]
    assert result.exit == Exit.INFRASTRUCTURE


def test_a_record_that_was_changed_after_its_run_is_a_finding(base: store.Run) -> None:
    against(base)
    file = base.path.with_name("new") / "cells" / f"{FUSED}.1.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"duration_s": ', '"duration_s": 1'), encoding="utf-8")
    result = judge(base, store.read_run(base.path.with_name("new")))
    assert result.exit == Exit.FAIL
    assert "was changed after the run" in result.verdict.reason


# ---- statistics


def test_pairs_of_seeds_that_agree_have_no_error() -> None:
    runs = [
        recorded_run.accuracy(recorded_run.cells(seed)["fused"], share)
        for seed, share in ((0, 0.8), (1, 0.7), (2, 0.9))
    ]
    spread = over_seeds.paired(runs, runs)
    assert spread is not None
    assert (spread.value, spread.error) == (0.0, 0.0)
    with pytest.raises(ValueError, match="cannot be paired"):
        over_seeds.paired(runs, runs[:2])


def test_the_interval_of_paired_answers_covers_more_than_one_from_their_variance() -> None:
    """Enumerates all outcomes of 25 items. Probabilities are those of (both, only left, only right, neither)."""
    n = 25
    for p in ((0.7, 0.1, 0.1, 0.1), (0.85, 0.05, 0.02, 0.08), (0.6, 0.2, 0.05, 0.15)):
        true, covered, plain = p[1] - p[2], 0.0, 0.0
        for a, b, c in (cut for cut in product(range(n + 1), repeat=3) if sum(cut) <= n):
            counts = (a, b, c, n - a - b - c)
            chance = math.factorial(n) * math.prod(q**k / math.factorial(k) for q, k in zip(p, counts, strict=True))
            low, high = paired_difference(*counts)
            covered += chance * (low <= true <= high)
            half = 1.96 * math.sqrt(max(0, b + c - (b - c) ** 2 / n)) / n
            plain += chance * (abs((b - c) / n - true) <= half)
        assert plain < covered
    assert paired_difference(0, 0, 0, 0) == (-1.0, 1.0)


# ---- baselines


@pytest.fixture
def here(base: store.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    return tmp_path


def promote(*more: str, reason: str = "the first") -> int:
    return main(["baseline", "promote", "base", "quick", "--reason", reason, "--author", "Ada", *more])


def test_a_promoted_run_is_listed_and_used(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "results" / "runs" / "base" / "logs" / "a.txt").write_text("long", encoding="utf-8")
    assert promote() == Exit.PASS
    saved = here / "results" / "baselines" / "quick"
    assert sorted(p.name for p in saved.iterdir()) == ["baseline.json", "cells", "footer.json", "run.json"]
    provenance = json.loads((saved / "baseline.json").read_text(encoding="utf-8"))
    assert {k: provenance[k] for k in ("run", "author", "reason", "git_shas", "replaces")} == {
        "run": "base", "author": "Ada", "reason": "the first", "git_shas": ["0123abc"], "replaces": "",
    }  # fmt: skip
    capsys.readouterr()
    assert main(["baseline", "list"]) == Exit.PASS
    assert "quick: run base at 0123abc, promoted" in capsys.readouterr().out
    assert main(["gate", "base", "--baseline", "quick"]) == Exit.PASS
    assert capsys.readouterr().out.splitlines()[-1] == "✓ pass: 3 Cells compared, no regression"
    assert main(["gate", "base", "--baseline", "quik"]) == Exit.USAGE
    assert "did you mean `quick`?" in capsys.readouterr().err


def test_a_run_is_compared_with_the_folder_of_another_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = recorded_run.write_run(here / "new", run="new", only=FEW, change=only("fused", red)).path
    folder = str(Path("results", "runs", "base"))
    assert main(["gate", str(new), "--baseline", folder]) == Exit.FAIL
    assert capsys.readouterr().out.splitlines()[0] == "new against base: of unknown origin (it was not promoted)"
    assert main(["gate", "base", "--baseline", folder]) == Exit.PASS
    assert "which is the same run" in capsys.readouterr().out
    capsys.readouterr()
    assert main(["gate", "base", "--baseline", "./other"]) == Exit.USAGE
    assert "./other: is no run" in capsys.readouterr().err


def test_a_folder_that_is_unfit_to_be_a_baseline_is_noted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(Path("results", "runs", "base"))
    assert main(["gate", "base", "--baseline", folder]) == Exit.PASS
    assert "unfit" not in capsys.readouterr().err
    rewrite(here, DIRTY, footer=False)
    new = recorded_run.write_run(here / "new", run="new", only=FEW).path
    main(["gate", str(new), "--baseline", folder])
    notes = capsys.readouterr().err.splitlines()
    assert any(f"{folder} could not be promoted" in line and "the run is incomplete" in line for line in notes)
    assert any("1 of 3 Records made from uncommitted changes" in line for line in notes)


def test_a_baseline_is_replaced_only_with_the_option(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert promote() == Exit.PASS
    assert promote() == Exit.USAGE
    assert "--replace" in capsys.readouterr().err
    assert promote("--replace", reason="again") == Exit.PASS
    (saved,) = baselines.known()
    assert saved.provenance is not None
    assert (saved.provenance.reason, saved.provenance.replaces) == ("again", "base")
    assert [p.name for p in (here / "results" / "baselines").iterdir()] == ["quick"]


def rewrite(here: Path, change: Change = lambda _, r: r, **more: Any) -> Path:
    folder = here / "results" / "runs" / "base"
    shutil.rmtree(folder)
    recorded_run.write_run(folder, **{"run": "base", "only": FEW, "change": change, **more})
    return folder


DIRTY = only("fused", lambda r: r.model_copy(update={"environment": recorded_run.environment(git_dirty=True)}))


@pytest.mark.parametrize(
    ("change", "more", "says"),
    [
        (DIRTY, {}, "1 of 3 Records made from uncommitted changes"),
        (lambda _, r: r, {"environment": recorded_run.environment(git_dirty=True)}, "started from uncommitted changes"),
        (lambda _, r: r, {"footer": False}, "the run is incomplete"),
        (only("fused", red), {}, "lora/forward/float32/init failed"),
        (only("fused", lambda r: recorded_run.failed(r, Status.OOM)), {}, "is oom"),
        (only("fused", lambda _: None), {}, "1 Cell without any Record"),
    ],
    ids=["dirty Record", "dirty start", "no footer", "red check", "oom", "missing"],
)  # fmt: skip
def test_an_unfit_run_is_not_promoted(
    here: Path, capsys: pytest.CaptureFixture[str], change: Change, more: dict[str, Any], says: str
) -> None:
    rewrite(here, change, **more)
    assert promote() == Exit.USAGE
    output = capsys.readouterr().err
    assert says in output
    assert "hint: " in output
    assert not (here / "results" / "baselines").exists()


def test_a_check_that_failed_in_an_earlier_attempt_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = recorded_run.cells()["fused"]
    rewrite(here, only("fused", red), extra=[recorded_run.record("fused", cell, "base", 2)])
    assert promote() == Exit.USAGE
    assert f"{cell.cell_id}.1.json" in capsys.readouterr().err


def test_a_run_changed_after_its_footer_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = here / "results" / "runs" / "base" / "cells" / f"{FUSED}.1.json"
    file.write_text(file.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert promote() == Exit.USAGE
    assert "was changed after the run" in capsys.readouterr().err


def test_a_footer_that_names_a_file_elsewhere_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "results" / "evil.txt").write_text("mine\n", encoding="utf-8")
    run = here / "results" / "runs" / "base"
    (here / "evil.txt").write_text("theirs\n", encoding="utf-8")
    (run / "../../../evil.txt").resolve(strict=True)
    footer = json.loads((run / "footer.json").read_text(encoding="utf-8"))
    footer["sha256"]["../../../evil.txt"] = hashlib.sha256(b"theirs\n").hexdigest()
    (run / "footer.json").write_text(json.dumps(footer), encoding="utf-8")
    assert promote() == Exit.USAGE
    assert "names '../../../evil.txt', which is no file of a run" in capsys.readouterr().err
    assert (here / "results" / "evil.txt").read_text(encoding="utf-8") == "mine\n"


def test_all_reasons_are_given_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(here, DIRTY, footer=False)
    assert promote(reason=" ") == Exit.USAGE
    output = capsys.readouterr().err
    assert "3 reasons not to make a baseline of it" in output
    assert output.count("hint: ") == 3


# ---- outputs


@pytest.fixture
def worse(here: Path) -> Path:
    assert promote() == Exit.PASS
    recorded_run.write_run(
        here / "results" / "runs" / "new", run="new", only=FEW,
        change=only("fused", lambda r: memory(r, adapter_B=measurements(r).memory.adapter_B + 512)),
    )  # fmt: skip
    return here


def test_every_output_has_the_regression(worse: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    reported = ["--junit", "a.xml", "--markdown", "a.md", "--annotations"]
    assert main(["gate", "new", "--baseline", "quick", *reported]) == Exit.FAIL
    printed = capsys.readouterr()
    line = next(line for line in printed.out.splitlines() if "fail: grew" in line)
    assert "[fused]" in line
    assert "+512 B" in line
    assert printed.out.splitlines()[-1].startswith("✗ fail: memory: minilm-l6 lora r=8 [fused]")
    assert printed.err.startswith("::error title=peft-harness gate%3A memory::minilm-l6 lora r=8 [fused]: adapter ")
    root = ET.parse("a.xml").getroot()
    suites = {suite.get("name"): suite for suite in root}
    assert [suites["memory"].get(key) for key in ("tests", "failures", "errors", "skipped")] == ["3", "1", "0", "0"]
    assert [suites["time"].get(key) for key in ("tests", "failures", "errors", "skipped")] == ["1", "0", "0", "1"]
    assert "| fail: grew |" in Path("a.md").read_text(encoding="utf-8")


def test_a_file_that_cannot_be_written_after_all_loses_no_finding(
    worse: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(junit, "render", lambda findings: Path("a.xml").mkdir() or b"")
    assert main(["gate", "new", "--baseline", "quick", "--junit", "a.xml", "--markdown", "a.md"]) == Exit.INFRASTRUCTURE
    assert "fail: grew" in capsys.readouterr().out
    assert "| fail: grew |" in Path("a.md").read_text(encoding="utf-8")


def test_a_difference_below_the_shown_digits_is_written_in_bytes() -> None:
    row = ComparisonRow(RowKind.MEMORY, VerdictKind.FAIL, "a", ("0",), "adapter", "grew", 1_400_000, 1_400_001, "B")
    reported = GateResult(verdict=Verdict(VerdictKind.FAIL, ""), rows=(row,), compared=1)
    assert "adapter 1.3 MiB, now 1.3 MiB (+1 B" in github.lines(reported)[0]
    assert b"adapter: 1.3 MiB, now 1.3 MiB (+1 B" in junit.render(reported)


def test_json_is_one_document_with_everything(worse: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["gate", "new", "--baseline", "quick", "--json", "--annotations"]) == Exit.FAIL
    document = json.loads(capsys.readouterr().out)
    assert (document["verdict"], document["exit"], document["compared"], document["cells"]) == ("fail", 1, 3, 3)
    assert [(r["what"], r["delta"]) for r in document["rows"] if r["word"] == "fail"] == [("adapter", 512)]
    assert document["baseline"]["author"] == "Ada"
    assert set(document["kinds"]) == {kind.value for kind in RowKind}


def test_github_jobs_get_annotations_by_default(
    worse: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    assert main(["gate", "new", "--baseline", "quick"]) == Exit.FAIL
    assert "::error" not in capsys.readouterr().err
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert main(["gate", "new", "--baseline", "quick"]) == Exit.FAIL
    assert "::error" in capsys.readouterr().err


def test_markdown_stays_under_its_limit_and_counts_omitted_rows(base: store.Run) -> None:
    result = against(base, only("fused", red))
    whole = markdown.render(result, "a run").decode()
    sizes = [len(markdown.render(result, "a run", limit)) for limit in (1600, 2400, 3200)]
    assert all(size < limit for size, limit in zip(sizes, (1600, 2400, 3200), strict=True))
    assert all(a <= b for a, b in pairwise(sizes))
    cut = markdown.render(result, "a run", 2400).decode()
    assert "lines left out, to stay under 1 MiB" in cut
    assert "lora/forward/float32/init failed" in cut  # the most serious row comes first
    assert "left out" not in whole
    assert len(whole.encode()) < markdown.LIMIT_B


@pytest.mark.slow
def test_explain_has_the_rule_of_every_kind() -> None:
    assert all(f"{kind.value}: " in explain("gate") for kind in RowKind)


# ---- cost


@pytest.mark.nightly
def test_a_thousand_cells_are_read_twice_for_hash_and_content_and_without_torch(tmp_path: Path) -> None:
    one = recorded_run.cells()["reference"]
    one = one.model_copy(update={"evaluation": one.evaluation.model_copy(update={"items": 200})})
    good = recorded_run.record("reference", one, "new")
    cells = [
        one.model_copy(update={"training": one.training.model_copy(update={"lr": 1e-3 + i * 1e-6})})
        for i in range(1000)
    ]
    run = recorded_run.write_run(tmp_path / "results" / "runs" / "new", run="new", only=("reference",), footer=False)
    (run.path / "cells" / f"{recorded_run.cells()['reference'].cell_id}.1.json").unlink()
    store.write(run.path / "run.json", run.manifest.model_copy(update={"cells": cells}))
    for cell in cells:
        record = good.model_copy(update={"cell": cell, "cell_id": cell.cell_id})
        text = record.model_dump_json(by_alias=True, indent=1)
        (run.path / "cells" / f"{record.id}.json").write_text(text, encoding="utf-8")
    store.RunFolder(run.path).close(
        store.read_run(run.path),
        Footer(
            schema=1, run="new", ended=recorded_run.STARTED, how="finished", counts={}, missing=[], seconds_total=1.0,
            seconds_in_cells=1.0, seconds_outside={},
        )
    )  # fmt: skip
    shutil.copytree(run.path, tmp_path / "results" / "baselines" / "base")
    script = (
        "import sys\nfrom collections import Counter\nfrom harness.cli import main\nopened = Counter()\n"
        "count = lambda event, args: opened.update([str(args[0])] * (event == 'open' and '/cells/' in str(args[0])))\n"
        "sys.addaudithook(count)\n"
        "code = main(['gate', 'new', '--baseline', 'base'])\n"
        "if set(opened.values()) != {2} or len(opened) != 2000: sys.exit(f'{len(opened)} {Counter(opened.values())}')\n"
        "heavy = {'torch', 'numpy', 'scipy', 'pandas', 'transformers', 'rich', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (Exit.PASS, "")
    assert "1000 Cells compared, no regression" in done.stdout


def test_a_baseline_without_hashes_does_not_pass(tmp_path: Path) -> None:
    """Otherwise a user could delete the footer and edit any number."""
    base = recorded_run.write_run(tmp_path / "base", footer=False, only=FEW)
    new = recorded_run.write_run(tmp_path / "new", only=FEW)
    judged = judge(base, new)
    assert judged.exit == Exit.INFRASTRUCTURE
    assert "no footer with hashes" in judged.verdict.reason
