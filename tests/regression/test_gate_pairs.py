"""`gate --pairs`: two sides run in turn. Fake process runs return synthetic Records."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import psutil
import pytest

from harness.analysis import metrics
from harness.analysis.comparison.baseline_costs import PEAK
from harness.analysis.comparison.baseline_rows import COUNTED_PEAK_B, ComparisonRow
from harness.analysis.comparison.pair_verdict import CellComparison, judge
from harness.analysis.statistics.canaries import Canaries
from harness.analysis.statistics.pair_design import Design
from harness.analysis.statistics.paired import decide
from harness.analysis.tracked_metrics import STEP
from harness.analysis.verdict_kind import VerdictKind
from harness.cli import main
from harness.errors import Exit, HarnessError, StoreError, UsageError
from harness.records import environment, files, naming
from harness.records.cost import GpuPhase, GpuState
from harness.records.memory import ALLOCATED
from harness.records.record import Cell, Record, Status
from harness.regression import git
from harness.regression.outputs.files import Outputs
from harness.regression.pairs import canary_file, external_repo
from harness.regression.pairs import gate as gate_pairs
from harness.regression.pairs import sides as pair_sides
from harness.regression.pairs.request import PairsRequest
from harness.regression.pairs.sides import Side
from harness.suites import loader
from support import recorded_run
from support.processes import eventually, gone
from support.sandbox import Sandbox

SUITE = """
suite: gated
matrix:
  - model: tiny-llama
    task: toy-sentiment
    training: {steps: 12, batch: 4}
    evaluation: {items: 8}
    cells:
      - {id: a, method: lora, implementation: [reference, fused], config: {rank: 4}}
      - {id: untrained, method: frozen, training: {steps: 0}}
"""
COUNTED_PEAK = metrics.COUNTED_PEAK.quantity
MIB = 2**20


@dataclass
class FakeRuns:
    """Fake process runs: the new side's step takes `slower` times as long, and both have some noise.

    slower_merged: so does its merged forward pass. luck: another draw of the noise. counted_B: what tensors took, of the new
    side or the old one.
    """

    slower: float = 1.0
    slower_merged: float = 1.0
    noise: float = 0.01
    grown_B: int = 0
    new_status: Status = Status.OK
    old_fails_at: int = -1
    peak_noise_MiB: float = 0.1
    counted_B: Callable[[bool], int | None] = lambda new: None
    raises: BaseException | None = None
    ran: list[str] = field(default_factory=list)
    wrong: Callable[[Record], Record] = lambda record: record
    draw: int = 1
    cores: set[int] = field(default_factory=set)

    def __call__(self, side: Side, suite: Path, cell: Cell, folder: Path, options: object = ()) -> Record:
        self.ran.append(folder.name)
        self.cores.add(environment.physical_cores())
        if self.raises is not None and len(self.ran) > 20:
            raise self.raises
        new = folder.name.endswith("-new") and "canary" not in folder.name
        drawn = random.Random(f"{self.draw} {folder.name}")
        record = recorded_run.record("fused", recorded_run.cells()["fused"])
        assert record.measurements is not None
        assert record.measurements.training is not None
        factor = (self.slower if new else 1.0) * math.exp(drawn.gauss(0, self.noise))
        times = [second * factor for second in record.measurements.training.step_seconds]
        training = record.measurements.training.model_copy(update={"step_seconds": times})
        grown = round(drawn.gauss(0, self.peak_noise_MiB) * MIB) + (self.grown_B if new else 0)
        phases = [
            p.model_copy(update={"peak_memory_B": p.peak_memory_B + grown}) if p.name == "train" else p
            for p in record.phases
        ]
        counted = self.counted_B(new)
        memory = record.measurements.memory.model_copy(update={"counted_peak_B": counted})
        latency = [
            one.model_copy(update={"seconds": [s * self._latency(one.variant, new, drawn) for s in one.seconds]})
            for one in record.measurements.latency
        ]
        changes = {"training": training, "memory": memory, "latency": latency}
        measured = record.measurements.model_copy(update=changes)
        record = record.model_copy(update={"measurements": measured, "phases": phases})
        if new and self.new_status is not Status.OK:
            return recorded_run.failed(record, self.new_status)
        if folder.name.endswith(f"first-{self.old_fails_at:02}-old"):
            return recorded_run.failed(record)
        return self.wrong(record) if new else record

    def _latency(self, variant: str, new: bool, drawn: random.Random) -> float:
        slower = {"merged": self.slower_merged, "base": 2.0}.get(variant, 1.0) if new else 1.0
        return slower * math.exp(drawn.gauss(0, self.noise))


@pytest.fixture
def gated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return a function from FakeRuns to (exit code, stdout, document)."""

    def gate(fake: FakeRuns, **changes: object) -> tuple[Exit, str, dict]:
        suite = tmp_path / "gated.yaml"
        suite.write_text(SUITE, encoding="utf-8")
        monkeypatch.setattr(pair_sides, "run", fake)
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        requested = {"old": "reference", "new": "fused", "suite": str(suite), "out": out, "seed": 3}
        requested |= {"canaries": tmp_path / "canaries.jsonl"} | changes
        code = gate_pairs.gate(PairsRequest(**requested), as_json=False).exit  # type: ignore[arg-type]
        return code, capsys.readouterr().out, json.loads((out / gate_pairs.DOCUMENT).read_text())

    return gate


def test_the_first_pairs_prove_equal_sides_equal(gated) -> None:
    fake = FakeRuns()
    code, output, document = gated(fake)
    assert code == Exit.PASS
    (cell,) = document["cells"]
    assert cell["verdict"]["word"] == "same"
    assert cell["verdict"]["interval"][0] < cell["verdict"]["effect"] < cell["verdict"]["interval"][1]
    assert len(cell["pairs"]) == 6
    assert len(fake.ran) == 2 * 6 + 2 * 6  # and those of the canary
    assert "pass: none of 1 Cells is slower, larger or worse" in output


def test_a_side_has_its_own_environment_variables(gated) -> None:
    fake, given = FakeRuns(), {"old_variables": ("SPEED=1=2",), "new_variables": ("SPEED=3", "OTHER=")}
    _, _, document = gated(fake, canary=False, **given)
    assert document["old"]["is"] == "implementation reference with SPEED=1=2"
    assert document["new"]["is"] == "implementation fused with SPEED=3 OTHER="
    side = pair_sides.Side("a side").with_variables(("SPEED=1=2", "OTHER="))
    variables = pair_sides._variables(side)
    assert (variables["SPEED"], variables["OTHER"], variables["PATH"]) == ("1=2", "", os.environ["PATH"])
    command = PairsRequest(".", ".", **given).command()
    assert command.endswith("--old-variable SPEED=1=2 --new-variable SPEED=3 --new-variable OTHER=")


@pytest.mark.slow
def test_both_sides_begin_equally_often_in_an_order_fixed_by_the_seed(gated) -> None:
    def began(fake: FakeRuns) -> list[str]:
        return [name.rpartition("-")[2] for name in fake.ran[: 2 * 6 : 2]]

    one, again, other = FakeRuns(), FakeRuns(), FakeRuns()
    for fake, seed in ((one, 3), (again, 3), (other, 4)):
        gated(fake, seed=seed, canary=False)
    assert began(one) == began(again)
    assert sorted(began(one)) == ["new"] * 3 + ["old"] * 3
    assert {tuple(began(s)) for s in (one, other)} - {("old", "new") * 3}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(psutil.Process, "cpu_affinity"), reason="this system holds no process to a core")
def test_on_a_cpu_both_sides_have_one_core_by_default(gated) -> None:
    mine = environment.physical_cores()
    one, requested = FakeRuns(), FakeRuns()
    _, _, document = gated(one)
    gated(requested, cores=mine)
    assert (one.cores, requested.cores) == ({1}, {mine})
    assert len(document["cores"]) == 1
    assert environment.physical_cores() == mine


@pytest.mark.parametrize("slower", [1.05, 1.2])
def test_fresh_pairs_alone_find_a_slow_down(gated, slower: float) -> None:
    fake = FakeRuns(slower=slower)
    code, output, document = gated(fake)
    assert code == Exit.FAIL
    (cell,) = document["cells"]
    assert (cell["verdict"]["word"], cell["verdict"]["stage"], cell["verdict"]["n"]) == ("slower", "fresh", 10)
    low, high = cell["verdict"]["interval"]
    assert low < slower - 1 < high
    assert any("fresh-0" in name for name in fake.ran)
    assert "is slower" in output


def test_without_fresh_pairs_a_slow_down_stays_undecided(gated) -> None:
    fake = FakeRuns(slower=1.2)
    code, output, document = gated(fake, canary=False, fresh=False)
    (cell,) = document["cells"]
    assert (cell["verdict"]["word"], cell["verdict"]["stage"]) == ("inconclusive", "first")
    assert len(fake.ran) == 2 * 6
    assert code == Exit.PASS
    assert "neither slower nor proven the same" in output


def test_without_fresh_pairs_the_verdict_promises_none_and_no_power(gated) -> None:
    fake = FakeRuns(slower=1.2)
    _, output, document = gated(fake, canary=False, fresh=False)
    assert "--no-fresh ran no fresh pairs, and only those can find a slow-down" in output.splitlines()[-1]
    (cell,) = document["cells"]
    assert cell["verdict"]["sentence"].endswith("; --no-fresh ran no fresh pairs, and only those can find a slow-down")
    assert (cell["verdict"]["more"], cell["verdict"]["mde80"]) == (0, None)
    _, output, document = gated(FakeRuns(), canary=False, fresh=False)
    verdict = document["cells"][0]["verdict"]
    assert (verdict["word"], verdict["mde80"]) == ("same", None)
    assert "no-fresh" not in verdict["sentence"] + output


def test_a_speed_up_is_listed_and_passes(gated) -> None:
    code, _, document = gated(FakeRuns(slower=0.5))
    assert code == Exit.PASS
    assert document["cells"][0]["verdict"]["word"] == "faster"
    assert "does it still do the same work?" in document["cells"][0]["verdict"]["sentence"]


def test_a_slow_latency_is_found_where_the_step_is_unchanged(gated) -> None:
    """The latency of the bare base doubles, but is not judged: no adapter takes part in it."""
    code, output, document = gated(FakeRuns(slower_merged=1.05))
    assert code == Exit.FAIL
    (cell,) = document["cells"]
    assert cell["verdict"]["word"] == "same"
    found = {metric: time["verdict"]["word"] for metric, time in cell["latencies"].items()}
    assert found == {"latency_s/unmerged/forward/1x40": "same", "latency_s/merged/forward/1x40": "slower"}
    assert f"{cell['name']}, merged forward 1x40 is slower" in output.splitlines()[-1]
    merged = cell["latencies"]["latency_s/merged/forward/1x40"]
    assert 1.03 < merged["new_s"] / merged["old_s"] < 1.07
    assert (
        len([line for line in output.splitlines() if line.startswith(cell["name"])]) == 3
    )  # one row of the table each


@pytest.mark.slow
def test_one_time_may_be_judged_alone(gated) -> None:
    code, _, document = gated(FakeRuns(slower_merged=1.05), metric="step_s")
    assert (code, document["cells"][0]["latencies"]) == (Exit.PASS, {})
    code, _, document = gated(FakeRuns(slower_merged=1.05), metric="latency_s/merged/forward/1x40")
    assert (code, document["cells"][0]["verdict"]) == (Exit.FAIL, None)


def test_a_latency_that_the_new_side_lacks_is_a_finding(gated) -> None:
    def unmerged_only(record: Record) -> Record:
        assert record.measurements is not None
        saved = [one for one in record.measurements.latency if one.variant != "merged"]
        return record.model_copy(update={"measurements": record.measurements.model_copy(update={"latency": saved})})

    code, output, document = gated(FakeRuns(wrong=unmerged_only))
    assert code == Exit.FAIL
    assert list(document["cells"][0]["latencies"]) == ["latency_s/unmerged/forward/1x40"]
    assert "merged forward 1x40 is measured by the old side only" in output.splitlines()[-1]


@pytest.mark.slow
def test_undecided_pairs_do_not_pass_with_strict(gated) -> None:
    code, output, document = gated(FakeRuns(noise=0.5), strict=True)
    assert code == Exit.INCONCLUSIVE
    assert document["cells"][0]["verdict"]["n"] == 20
    assert "neither slower nor proven the same" in output


def test_memory_that_grew_in_every_run_is_found_and_noise_is_not(gated) -> None:
    assert gated(FakeRuns())[0] == Exit.PASS
    code, output, document = gated(FakeRuns(grown_B=2 * MIB))
    assert code == Exit.FAIL
    (finding,) = document["findings"]
    assert (finding["kind"], finding["what"]) == ("memory", "training peak above imports")
    assert "training peak above imports grew: old" in output


@pytest.mark.nightly
def test_one_disturbed_run_does_not_hide_memory_that_grew(gated) -> None:
    """Peaks differ by 1 MiB between processes, over the 26 pairs of an undecided time."""
    found = [gated(FakeRuns(noise=0.5, grown_B=3 * MIB, peak_noise_MiB=1.0, draw=draw))[0] for draw in range(4)]
    assert found == [Exit.FAIL] * 4
    found = [gated(FakeRuns(noise=0.5, peak_noise_MiB=1.0, draw=draw))[0] for draw in range(4)]
    assert found == [Exit.PASS] * 4


def test_two_mebibytes_of_tensors_are_found_in_any_process(gated) -> None:
    """Peaks of the process differ by 9 MiB, so that ranks do not detect the growth."""
    fake = FakeRuns(peak_noise_MiB=9.0, counted_B=lambda new: 100 * MIB + 2 * MIB * new)
    code, output, document = gated(fake, canary=False)
    assert code == Exit.FAIL
    found = {row["what"]: row for row in document["findings"]}
    row = found[COUNTED_PEAK]
    assert (row["kind"], row["word"], row["base"], row["new"]) == ("memory", "fail", 100 * MIB, 102 * MIB)
    assert found[PEAK]["word"] == "pass"
    assert (
        f"{COUNTED_PEAK} grew: counted, so growth by more than 65,536 B is a finding: old 104,857,600 B, new" in output
    )


def _peaks(*sides: tuple[int | None, int | None], source: str = "VmHWM") -> dict[str, ComparisonRow]:
    """Judge pairs of Records with these counts (old, new); return the rows of peaks by quantity."""

    def record(counted: int | None) -> Record:
        made = recorded_run.record("fused", recorded_run.cells()["fused"])
        assert made.measurements is not None
        memory = made.measurements.memory.model_copy(update={"counted_peak_B": counted, "source": source})
        return made.model_copy(update={"measurements": made.measurements.model_copy(update={"memory": memory})})

    records = [(record(old), record(new)) for old, new in sides]
    rows = judge([CellComparison("a", records, {}, "not timed")], Canaries(0, 0)).rows
    return {row.what: row for row in rows if row.what in (PEAK, COUNTED_PEAK)}


def test_counted_bytes_need_one_pair_and_no_test() -> None:
    for more, word in (
        (COUNTED_PEAK_B + 1, VerdictKind.FAIL),
        (COUNTED_PEAK_B, VerdictKind.PASS),
        (-2 * MIB, VerdictKind.PASS),
    ):
        row = _peaks((MIB, MIB + more))[COUNTED_PEAK]
        assert row.word is word
        assert "counted" in row.reason
    assert row.reason.startswith("shrank: ")


def test_a_counted_peak_on_a_gpu_may_not_grow() -> None:
    (row,) = _peaks((MIB, MIB + 1), source=ALLOCATED).values()
    assert (row.what, row.word) == (COUNTED_PEAK, VerdictKind.FAIL)
    assert set(_peaks((None, None), source=ALLOCATED)) == {PEAK}


def test_counts_that_differ_between_equal_process_runs_are_judged_by_ranks() -> None:
    old = [MIB * n for n in range(8, 14)]
    row = _peaks(*((b, b + 2 * MIB) for b in old))[COUNTED_PEAK]
    assert (row.word, "counted" in row.reason) == (VerdictKind.PASS, False)
    assert _peaks(*((b, b + 8 * MIB) for b in old))[COUNTED_PEAK].word is VerdictKind.FAIL


@pytest.mark.parametrize(
    ("sides", "output"),
    [
        ([(MIB, MIB), (MIB, None), (MIB, None)], "2 of 3 runs of the new side"),
        ([(MIB, MIB), (None, MIB)], "1 of 2 runs of the old side"),
        ([(MIB, None), (None, None)], "1 of 2 runs of the old side and 2 of 2 runs of the new side"),
    ],
)
def test_runs_without_counts_are_listed_and_leave_memory_undecided(
    sides: list[tuple[int | None, int | None]], output: str
) -> None:
    rows = _peaks(*sides)
    row = rows[COUNTED_PEAK]
    assert (row.word, row.reason) == (VerdictKind.INCONCLUSIVE, f"not compared: not counted in {output}")
    assert rows[PEAK].word is VerdictKind.PASS
    assert set(_peaks((None, None), (None, None))) == {PEAK}  # where torch cannot count
    assert set(_peaks(*sides, source=ALLOCATED)) == {PEAK}  # the counted peak is the same number


def test_a_missing_count_does_not_pass(gated) -> None:
    code, output, _ = gated(FakeRuns(counted_B=lambda new: None if new else MIB), canary=False)
    assert (code, output.splitlines()[-1].startswith("inconclusive: ")) == (Exit.PASS, True)
    assert f"{COUNTED_PEAK} not compared: not counted in 6 of 6 runs of the new side" in output.splitlines()[-1]
    assert (
        gated(FakeRuns(counted_B=lambda new: None if new else MIB), canary=False, strict=True)[0] == Exit.INCONCLUSIVE
    )


def test_cells_without_times_do_not_pass(gated) -> None:
    """One failed process run of the old side is no finding about the new side."""
    code, output, document = gated(FakeRuns(old_fails_at=5))
    assert code == Exit.NOTHING_COMPARED
    assert document["cells"][0]["verdict"] is None
    assert "the old side is error" in output


def test_one_cell_without_times_is_named() -> None:
    record = recorded_run.record("fused", recorded_run.cells()["fused"])
    same = decide([0.001, -0.001, 0.002, -0.002, 0.001, -0.001], [], Design())
    timed = CellComparison("timed", [(record, record)] * 6, {STEP: same})
    flaky = CellComparison("flaky", [(recorded_run.failed(record), record)], {}, "the old side is error")
    assert judge([timed], Canaries(0, 0)).exit == Exit.PASS
    judged = judge([timed, flaky], Canaries(0, 0))
    assert judged.exit == Exit.INFRASTRUCTURE
    assert judged.verdict.reason == "not timed: flaky (the old side is error)"


def test_a_side_without_a_record_is_named_with_its_cell(gated) -> None:
    code, _, document = gated(FakeRuns(slower=1.05, raises=HarnessError("revision 0123 gave no Record")))
    assert code == Exit.NOTHING_COMPARED
    assert document["cells"][0]["because"] == "revision 0123 gave no Record"


def test_interrupted_pairs_are_judged_and_stored(gated) -> None:
    code, _, document = gated(FakeRuns(slower=1.05, raises=KeyboardInterrupt()))
    assert document["cut"] == "ended by Ctrl-C"
    assert len(document["cells"][0]["pairs"]) == 10  # all first pairs and four fresh ones
    assert document["cells"][0]["verdict"]["word"] == "inconclusive"
    assert (code, document["exit"]) == (Exit.INFRASTRUCTURE, 4)


def _other_count(record: Record) -> Record:
    assert record.measurements is not None
    memory = record.measurements.memory.model_copy(update={"optimizer_B": record.measurements.memory.optimizer_B + 1})
    return record.model_copy(update={"measurements": record.measurements.model_copy(update={"memory": memory})})


def test_one_more_counted_byte_is_found(gated) -> None:
    code, output, _ = gated(FakeRuns(wrong=_other_count))
    assert code == Exit.FAIL
    assert "optimizer grew" in output


def test_a_refused_gate_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pairs"
    assert main(["gate", "--pairs", "no-such-thing", "fused", "--suite", "sentinels", "--out", str(out)]) == Exit.USAGE
    assert "no-such-thing" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_option_sets_the_seed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[PairsRequest] = []
    monkeypatch.setattr(
        gate_pairs, "gate", lambda one, as_json: requested.append(one) or SimpleNamespace(exit=Exit.PASS)
    )
    assert main(["gate", "--pairs", "reference", "fused", "--seed", str(seed)]) == Exit.PASS
    assert [one.seed for one in requested] == [seed]


def _elsewhere(record: Record) -> Record:
    changed = record.environment.model_copy(update={"software": {**record.environment.software, "torch": "9.9"}})
    return record.model_copy(update={"environment": changed})


def test_other_differences_between_the_sides_are_named_in_the_verdict(gated) -> None:
    code, output, document = gated(FakeRuns(wrong=_elsewhere))
    assert code == Exit.PASS
    assert document["residue"] == ["software torch: 2.9.1+cpu, 9.9 (6 of 6 pairs)"]
    assert "not the same: software torch" in output.splitlines()[-1]


def test_a_lower_gpu_clock_of_one_side_is_named(gated) -> None:
    def hot(record: Record) -> Record:
        end = GpuState(uuid="GPU-1", sm_clock_Hz=1_200_000_000, throttle=["software-thermal"])
        phases = [
            p.model_copy(update={"gpu": GpuPhase(start=end, end=end)}) if p.name == "train" else p
            for p in record.phases
        ]
        return record.model_copy(update={"phases": phases})

    _, _, document = gated(FakeRuns(wrong=hot))
    assert document["residue"] == [
        "GPU throttled in training by: nothing, software-thermal (6 of 6 pairs)",
        "SM clock at the end of training: unknown, 1,200 MHz",
    ]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (Status.NONCONFORMING, "parity"),
        (Status.UNTRAINED, "parity"),
        (Status.OOM, "outcome"),
        (Status.ERROR, "outcome"),
    ],
)
def test_a_failed_new_side_is_a_finding_and_gets_no_more_pairs(gated, status: Status, kind: str) -> None:
    fake = FakeRuns(new_status=status)
    code, output, document = gated(fake)
    assert code == Exit.FAIL
    assert {finding["kind"] for finding in document["findings"]} == {kind}
    assert document["cells"][0]["verdict"] is None
    assert len(fake.ran) == 2
    assert f"the new side is {status.value}" in output


def test_a_canary_that_cannot_be_written_is_refused_first_and_loses_no_pairs(
    gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRuns()
    with pytest.raises(StoreError, match="the canary cannot be written: Is a directory"):
        gated(fake, canaries=tmp_path)
    assert not fake.ran
    add = canary_file.add
    monkeypatch.setattr(canary_file, "add", lambda path, *facts: add(tmp_path, *facts))  # it has become a folder
    code, output, document = gated(FakeRuns(slower=1.2))
    assert (code, document["canary"]) == (Exit.FAIL, None)
    assert "slower" in output


@pytest.mark.slow
def test_too_many_alarms_of_canaries_close_the_gate(gated, tmp_path: Path) -> None:
    place = recorded_run.environment().id
    for number in range(40):
        canary_file.add(tmp_path / "canaries.jsonl", place, "0" * 16, [0.1 + 0.001 * (number + i) for i in range(6)])
    code, output, _ = gated(FakeRuns(slower=1.2))
    assert code == Exit.INFRASTRUCTURE
    assert "the gate is closed" in output
    # Canaries of another machine do not count.
    moved = (tmp_path / "canaries.jsonl").read_text().replace(place, "elsewhere")
    (tmp_path / "canaries.jsonl").write_text(moved)
    assert gated(FakeRuns(slower=1.2))[0] == Exit.FAIL


@pytest.mark.slow
def test_each_gate_adds_a_canary_and_torn_lines_are_named(
    gated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "canaries.jsonl"
    gated(FakeRuns())
    assert len(file.read_text().splitlines()) == 1
    newer = {**json.loads(file.read_text()), "schema": 2}
    file.write_text(file.read_text() + '{"at": "2026\n' + json.dumps(newer) + "\n")
    gated(FakeRuns())
    lines = file.read_text().splitlines()
    assert len(lines) == 4
    found, broken = canary_file.read(file, recorded_run.environment().id, 0.25)
    assert found.runs == 2
    assert broken[0].startswith(f"{file}:2: ")
    assert broken[1] == f"{file}:3: written with schema 2, this version reads up to 1"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_revisions_are_checked_out_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = tmp_path / "checkout"
    top.mkdir()
    _git(top, "init", "-q")
    commits = []
    for text in ("one", "two"):
        (top / "file").write_text(text)
        _git(top, "add", "file")
        _git(top, "commit", "-qm", text)
        commits.append(_git(top, "rev-parse", "HEAD"))
    (top / "file").write_text("three")
    monkeypatch.setattr(pair_sides.resources, "checkout", lambda: top)
    plan = loader.load("smoke").plan
    with pair_sides.opened(commits[0], pair_sides.HERE, plan) as (old, new):
        assert old.code is not None
        assert (old.code / "file").read_text() == "one"
        assert new.code == top
        assert "with uncommitted changes" in new.label
        gone = old.code
    assert not gone.exists()
    assert len(_git(top, "worktree", "list").splitlines()) == 1
    with pair_sides.opened("HEAD", "HEAD", plan) as (old, new):
        assert old == new  # A/A
    for wrong in ("no-such-revision", "--help"):
        with pytest.raises(UsageError, match="neither a revision"), pair_sides.opened("HEAD", wrong, plan):
            pass
    with pytest.raises(UsageError, match="is an implementation"), pair_sides.opened("fused", "HEAD", plan):
        pass


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork, which a lifeline needs")
def test_the_run_of_a_side_ends_with_a_gate_that_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    run = f"import os, pathlib, time; pathlib.Path({str(file)!r}).write_text(f'{{os.getpid()}}.'); time.sleep(600)"
    gate = "import os, sys; from harness.regression.pairs import sides; sides._ran(sys.argv[1:], os.environ)"
    with subprocess.Popen([sys.executable, "-c", gate, sys.executable, "-c", run]) as process:
        eventually(lambda: file.is_file() and file.read_text().endswith("."), "the side runs")
        pid = int(file.read_text().rstrip("."))
        assert not gone(pid)
        process.kill()
    eventually(lambda: gone(pid), "the run of the side is gone")


def test_git_that_is_missing_or_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_sides.resources, "checkout", lambda: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for repo in (None, tmp_path):
        with (
            pytest.raises(HarnessError, match=r"git cannot be run: ") as raised,
            pair_sides.opened("HEAD", pair_sides.HERE, loader.load("smoke").plan, repo),
        ):
            pass
        assert (raised.value.where, raised.value.hint) == (str(tmp_path), "install git")
    assert git.user() == ""
    (tmp_path / "git").write_text(f"#!{sys.executable}\nimport time; time.sleep(600)")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setattr(git, "_PATIENCE_S", 0.1)
    with pytest.raises(HarnessError, match=r"`git status` did not end within"):
        git.run(tmp_path, "status")


def test_a_revision_runs_with_its_own_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = tmp_path / "checkout"
    top.mkdir()
    _git(top, "init", "-q")
    for module in ("before", "after"):
        (top / "pyproject.toml").write_text(
            '[project]\nname = "peft-harness"\nversion = "1"\n'
            f'[project.entry-points."harness.implementations"]\nours = "{module}"\n'
        )
        _git(top, "add", ".")
        _git(top, "commit", "-qm", module)
    monkeypatch.setattr(pair_sides.resources, "checkout", lambda: top)
    with pair_sides.opened("HEAD~1", pair_sides.HERE, loader.load("smoke").plan) as (old, new):
        assert new.metadata is None
        points = (
            "from importlib.metadata import distribution as d; print([e.value for e in d('peft-harness').entry_points])"
        )
        command = [sys.executable, "-P", "-c", points]
        done = subprocess.run(command, env=pair_sides._variables(old), capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "['before']"


def test_a_revision_without_a_version_has_the_installed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = '[project.entry-points."harness.implementations"]\nours = "a"\n'
    for name, version in (("pytest", importlib.metadata.version("pytest")), ("installed-nowhere", "0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pyproject.toml").write_text(f'[project]\nname = "{name}"\ndynamic = ["version"]\n{points}')
        pair_sides._write_metadata(tmp_path / name)
        (found,) = importlib.metadata.distributions(path=[f"{tmp_path / name}.metadata"])
        assert (found.name, found.version) == (name, version)


def test_a_revision_whose_metadata_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project")
    with pytest.raises(HarnessError, match=r"pyproject.toml of revision .* is no valid TOML: ") as raised:
        pair_sides._write_metadata(tmp_path)
    assert "correct the file" in raised.value.hint


def test_other_output_does_not_hide_the_packages_of_a_side_and_a_failure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "guest").mkdir()
    (tmp_path / "guest" / "__init__.py").touch()
    info = tmp_path / "guest-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guest\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[harness.implementations]\nguest = guest\n")

    def packages(at_start: str) -> frozenset[str]:
        (tmp_path / "sitecustomize.py").write_text(f"import os, sys, time; {at_start}")
        return external_repo.packages("a side", tmp_path, {**os.environ, "PYTHONPATH": str(tmp_path)})

    assert packages("print('hello')") == {"guest"}
    failed = "the plug-ins of a side cannot be listed: "
    with pytest.raises(HarnessError, match=f"{failed}no driver"):
        packages("print('hello'); print('first\\nno driver', file=sys.stderr, flush=True); os._exit(3)")
    with pytest.raises(HarnessError, match=f"{failed}no answer, exit code 3"):
        packages("os._exit(3)")
    monkeypatch.setattr(external_repo, "_PATIENCE_S", 0.1)
    with pytest.raises(HarnessError, match=f"{failed}no answer within 0.1 s"):
        packages("time.sleep(600)")


_PLUGIN = """
from harness import Unsupported, implements

@implements("lora", name="raises")
def implementations(model, config, generator):
    raise Unsupported("this is revision {}")
"""


@pytest.mark.nightly
def test_revisions_of_an_external_repository_run(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("PYTHONPATH", "PEFT_HARNESS_CACHE"):
        monkeypatch.setenv(name, sandbox.environment[name])  # the plug-in is installed from another folder
    monkeypatch.syspath_prepend(str(sandbox.folder / "plugin"))
    top = tmp_path / "guest"
    (top / "kernels" / "src").mkdir(parents=True)
    _git(top, "init", "-q")
    for number in ("one", "two"):
        (top / "kernels" / "src" / "misbehaving.py").write_text(_PLUGIN.format(number))
        _git(top, "add", ".")
        _git(top, "commit", "-qm", number)
    suite = Path(sandbox.suite("{implementation: raises}", "{implementation: reference}"))
    plan = loader.load(suite).plan
    with pair_sides.opened("HEAD~1", pair_sides.HERE, plan, top / "kernels") as sides:
        assert [pair.old for pair in pair_sides.pairs(plan, naming.full(plan.cells), sides)] == [plan.cells[0]]
        ours = loader.load("sentinels").plan
        with pytest.raises(UsageError, match="no Cell of this suite is computed by misbehaving"):
            pair_sides.pairs(ours, naming.full(ours.cells), sides)
        output = [pair_sides.run(side, suite, plan.cells[0], tmp_path / str(i)).because for i, side in enumerate(sides)]
    assert ["revision one" in output[0], "revision two" in output[1]] == [True, True], output
    strange = pytest.raises(HarnessError, match=r"holds no package of an installed plug-in; .*misbehaving from ")
    with strange, pair_sides.opened("HEAD~1", "HEAD", plan, top):
        pass
    with pytest.raises(UsageError, match="is in no git checkout"), pair_sides.opened("a", "b", plan, tmp_path):
        pass
    with pytest.raises(UsageError, match="`raises` is not a revision of"), pair_sides.opened("raises", ".", plan, top):
        pass


def test_a_suite_without_training_is_refused(gated) -> None:
    with pytest.raises(UsageError, match="no Cell fits"):
        gated(FakeRuns(), only="id=untrained")
    with pytest.raises(UsageError, match="fused"):
        gated(FakeRuns(), old="reference", new="hf-peft")


# ---- outputs shared with the gate against a baseline


@dataclass
class GateOutputs:
    code: Exit
    junit: ET.Element
    markdown: str
    annotations: list[str]

    def tags(self, suite: str) -> list[str]:
        """Return a tag for each Cell in one suite of the JUnit file; empty for passed Cells."""
        (found,) = [one for one in self.junit if one.get("name") == suite]
        return [case[0].tag if len(case) else "" for case in found.iter("testcase")]


@pytest.fixture
def outputs_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return a function from FakeRuns to the outputs of the command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    Path("gated.yaml").write_text(SUITE, encoding="utf-8")

    def run_gate(fake: FakeRuns, *more: str) -> GateOutputs:
        monkeypatch.setattr(pair_sides, "run", fake)
        files = ["--junit", "a.xml", "--markdown", "a.md", "--annotations"]
        code = main(["gate", "--pairs", "reference", "fused", "--suite", "gated.yaml", "--seed", "3", *files, *more])
        notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("::")]
        return GateOutputs(Exit(code), ET.parse("a.xml").getroot(), Path("a.md").read_text(encoding="utf-8"), notes)

    return run_gate


def test_every_output_has_a_slow_down(outputs_of) -> None:
    found = outputs_of(FakeRuns(slower=1.2))
    assert found.code == Exit.FAIL
    assert found.tags("speed") == ["failure"]
    (line,) = [line for line in found.markdown.splitlines() if "| step |" in line]
    assert "| fail: slower by more than 1 %" in line
    assert "is found with 80 % power" in line
    assert found.markdown.startswith("## ✗ implementation fused against implementation reference: fail")
    assert "A/A canary alarmed" in found.markdown
    (note,) = found.annotations
    assert note.startswith("::error title=peft-harness gate%3A speed::tiny-llama")


def test_every_output_marks_undecided_rows(outputs_of) -> None:
    found = outputs_of(FakeRuns(noise=0.5))
    assert found.code == Exit.PASS
    assert found.tags("speed") == ["skipped"]
    assert "| inconclusive: " in found.markdown
    assert [note.partition(" ")[0] for note in found.annotations] == ["::warning"] * 3  # of the step and two latencies


def test_every_output_has_findings_other_than_times(outputs_of) -> None:
    found = outputs_of(FakeRuns(wrong=_other_count))
    assert (found.code, found.tags("memory").count("failure"), found.tags("speed")) == (Exit.FAIL, 1, [""])
    assert any("memory::" in note and "optimizer" in note for note in found.annotations)


def test_no_output_calls_an_interrupted_gate_a_pass(outputs_of) -> None:
    found = outputs_of(FakeRuns(raises=KeyboardInterrupt()))  # all pairs are complete, those of the canary are not
    assert found.code == Exit.INFRASTRUCTURE
    assert found.tags("missing") == ["error"]
    assert "not-run" in found.markdown.splitlines()[0]
    assert any("ended by Ctrl-C" in note for note in found.annotations)


def test_times_of_a_closed_gate_are_no_finding_in_any_output(outputs_of, tmp_path: Path) -> None:
    for number in range(40):
        ratios = [0.1 + 0.001 * (number + i) for i in range(6)]
        canary_file.add(tmp_path / canary_file.FILE, recorded_run.environment().id, "0" * 16, ratios)
    found = outputs_of(FakeRuns(slower=1.2))
    assert (found.code, found.tags("speed")) == (Exit.INFRASTRUCTURE, ["error"])
    assert "the gate is closed" in found.markdown


def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(gated) -> None:
    fake = FakeRuns()
    with pytest.raises(UsageError, match="there is no folder nowhere"):
        gated(fake, outputs=Outputs(junit=Path("nowhere") / "a.xml"))
    with pytest.raises(UsageError, match="both name a"):
        gated(fake, outputs=Outputs(junit=Path("a"), markdown=Path("a")))
    assert not fake.ran


@pytest.mark.parametrize("lost", ["pairs.json", "a.xml", "a.md"])
def test_a_file_that_cannot_be_written_after_all_loses_neither_the_verdict_nor_the_others(
    lost: str, gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = files.write_atomic

    def written(path: Path, data: bytes) -> None:
        if path.name == lost:
            raise StoreError("the disk is full", where=str(path))
        write(path, data)

    monkeypatch.setattr(files, "write_atomic", written)
    monkeypatch.setattr(gate_pairs, "write_atomic", written)
    out, outputs = tmp_path / "out", Outputs(tmp_path / "a.xml", tmp_path / "a.md")
    with pytest.raises(StoreError, match="the disk is full"):
        gated(FakeRuns(), out=out, outputs=outputs)
    assert "pass: none of 1 Cells is slower" in capsys.readouterr().out
    found = [file.name for file in (out / "pairs.json", tmp_path / "a.xml", tmp_path / "a.md") if file.is_file()]
    assert found == [name for name in ("pairs.json", "a.xml", "a.md") if name != lost]
