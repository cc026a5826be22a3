"""A run as its user sees it: what is measured, what a misbehaving Cell leaves, what survives a kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.assets import fetch, table
from harness.cell.job import Job
from harness.cli import main
from harness.conformance.tolerance_constants import EPSILON, FOOTPRINT_LEDGER
from harness.errors import Exit
from harness.records import store
from harness.records.manifest import Footer
from harness.records.record import Outcome, Record, Status, TrainingMeasured
from harness.report import html
from harness.runner import attempt, worker
from harness.runner.executors.local import Local
from harness.runner.progress import Progress
from harness.suites import loader
from support import recorded_run
from support.processes import PATIENCE_S, eventually, gone
from support.sandbox import Finished, Sandbox, make_sandbox

PHASES = [
    "start-up", "load", "data", "predict", "attach", "parity", "warm-up", "train", "count", "save", "evaluate", "latency",
]  # fmt: skip


# --- the smoke suite -------------------------------------------------------------------------------------------------


def _source(name: str) -> table.Source:
    return table.resolve(name, loader.load("smoke").sources, Path())


def _cells(run: store.Run, method: str = "lora") -> list[Record]:
    return [r for r in run.latest().values() if r.cell.method == method]


def _trained(record: Record) -> TrainingMeasured:
    assert record.measurements is not None, record.because
    assert record.measurements.training is not None
    return record.measurements.training


def test_smoke_passes(smoke: tuple[Finished, store.Run]) -> None:
    finished, run = smoke
    assert (finished.code, run.broken, run.missing()) == (Exit.PASS, {}, []), finished.err
    assert [r.status for r in run.records] == [Status.OK] * len(run.manifest.cells)
    assert "pass: both implementations of LoRA compute the same training run" in finished.out
    assert "Traceback" not in finished.err
    assert finished.err.count(" ok ") == len(run.records)  # one line a Cell, and standard output is for the summary
    assert finished.out.splitlines()[-1] == f"report: {Path('run', 'report.html')}"


def test_smoke_peaks_are_as_predicted(smoke: tuple[Finished, store.Run]) -> None:
    """Of every Cell that trains: so nothing of the gate's, such as its copy of the model, is there any more."""
    _, run = smoke
    trained = [r.measurements.memory for r in run.records if r.measurements and r.cell.training.steps]
    assert trained
    for memory in trained:
        assert memory.predicted is not None
        assert memory.predicted.peak_B is not None, memory.predicted.no_peak
        assert memory.counted_peak_B is not None
        assert abs(memory.predicted.peak_B - memory.counted_peak_B) <= FOOTPRINT_LEDGER * memory.counted_peak_B


def test_smoke_report_says_how_torch_was_built(smoke: tuple[Finished, store.Run]) -> None:
    _, run = smoke
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "; CPU capability usage: " in page


def test_smoke_report_shows_every_cell(smoke: tuple[Finished, store.Run]) -> None:
    _, run = smoke
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert [c.cell_id for c in run.manifest.cells if c.cell_id not in page] == []


def test_smoke_keeps_its_suite_as_it_was_read(smoke: tuple[Finished, store.Run]) -> None:
    """The file may be gone or changed when somebody wants to repeat the run."""
    _, run = smoke
    text = run.manifest.suite_text
    assert hashlib.sha256(text.encode()).hexdigest() == run.manifest.suite_sha256
    assert escape(text[:200]) in (run.path / "report.html").read_text(encoding="utf-8")


def adds_up(footer: Footer) -> bool:
    """All times are differences of readings of one clock, each rounded in its last place."""
    parts = [footer.seconds_in_cells, *footer.seconds_outside.values()]
    readings = 2 * (len(parts) + sum(footer.counts.values()))
    return abs(footer.seconds_total - sum(parts)) <= readings * EPSILON["float64"] * time.monotonic()


def test_smoke_footer_adds_up(smoke: tuple[Finished, store.Run]) -> None:
    _, run = smoke
    footer = run.footer
    assert footer is not None
    assert (footer.how, footer.counts, footer.missing) == ("finished", {"ok": len(run.records)}, [])
    assert adds_up(footer)
    assert footer.seconds_in_cells >= sum(r.duration_s for r in run.records)


def test_smoke_phases_come_in_order(smoke: tuple[Finished, store.Run]) -> None:
    for record in smoke[1].records:
        trained = record.cell.training.steps > 0
        assert [p.name for p in record.phases] == [
            p for p in PHASES if trained or p not in ("warm-up", "train", "count")
        ]
        assert all(p.peak_memory_B and p.end_memory_B for p in record.phases)
        inside = sum(p.seconds for p in record.phases)
        assert inside <= record.duration_s


def test_smoke_keeps_every_sample(smoke: tuple[Finished, store.Run]) -> None:
    for record in _cells(smoke[1]):
        assert record.measurements is not None
        training = record.measurements.training
        assert training is not None
        steps, batch = record.cell.training.steps, record.cell.training.batch
        for samples in (training.losses, training.step_seconds, training.tokens, training.gradient_norms):
            assert len(samples) == steps
        assert all(s > 0 for s in training.step_seconds)
        assert 0 < training.timing_warmup < steps
        for real, padded in zip(training.tokens, training.padded_tokens, strict=True):
            assert batch < real <= padded <= batch * record.cell.training.max_tokens
            assert padded % batch == 0
        assert sum(training.tokens) < sum(training.padded_tokens)
        assert sum(training.step_seconds) < next(p.seconds for p in record.phases if p.name == "train")
    orders = {(*_trained(r).tokens, _trained(r).data_order_sha256) for r in _cells(smoke[1])}
    assert len(orders) == 1  # the same data, in the same order, for every implementation and dtype
    starts: dict[str, set[str]] = {}
    for record in _cells(smoke[1]):
        starts.setdefault(record.cell.dtype, set()).add(_trained(record).initial_state_sha256)
    assert sorted(map(len, starts.values())) == [1, 1]
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in set.union(*starts.values()))


def test_smoke_says_how_busy_the_machine_was(smoke: tuple[Finished, store.Run]) -> None:
    for record in smoke[1].records:
        assert all(p.load_start is not None and p.load_end is not None for p in record.phases[1:])
        variables = record.environment.extra["variables"]
        assert isinstance(variables, dict)
        assert variables.get("OMP_WAIT_POLICY") == os.environ.get("OMP_WAIT_POLICY")
    for record in _cells(smoke[1]):
        trained = _trained(record)
        assert trained.cpu_seconds is not None
        assert record.environment.threads is not None
        # No thread can have run for longer than the clock; what other threads than torch's do is little.
        assert 0 < trained.cpu_seconds < sum(trained.step_seconds) * (record.environment.threads + 1)
        assert trained.optimizer["name"] == "AdamW"


def _adapted_shapes(model: Path, targets: list[str]) -> list[tuple[int, int]]:
    config = json.loads((model / "config.json").read_text())
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    narrow = hidden // heads * config["num_key_value_heads"]
    shapes = {"q_proj": (hidden, hidden), "v_proj": (hidden, narrow), "down_proj": (inner, hidden)}
    return [shapes[name] for name in targets] * config["num_hidden_layers"]


def test_smoke_ledger_is_exact(smoke: tuple[Finished, store.Run], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(cache))
    model = fetch.ensure(_source("tiny-llama"))
    for record in _cells(smoke[1]):
        assert record.measurements is not None
        memory, counted = record.measurements.memory, record.measurements.parameters
        shapes = _adapted_shapes(model, record.cell.config["targets"])  # type: ignore[arg-type]
        rank: Any = record.cell.config["rank"]
        assert counted.adapter == counted.trainable == rank * sum(sum(shape) for shape in shapes)
        size = {"float32": 4, "float64": 8}[record.cell.dtype]
        assert memory.adapter_B == memory.gradients_B == size * counted.adapter
        # Two moments, and for each tensor (an A and a B a layer) the counter of steps, which torch keeps in float32.
        assert memory.optimizer_B == 2 * size * counted.adapter + 4 * 2 * len(shapes)
        # Weights and the rotary frequencies, which stay float32 and are kept twice.
        frozen = size * (counted.total - counted.adapter)
        assert memory.weights_B >= frozen
        assert memory.weights_B - frozen < 4 * 2 * model_head_size(model)
        # At one time there were at least all of these; and no more than them and what texts as long as can be would keep.
        assert memory.counted_peak_B is not None
        assert memory.predicted is not None
        taken = memory.weights_B + memory.adapter_B + memory.gradients_B + memory.optimizer_B
        assert taken < memory.counted_peak_B < memory.predicted.total_B
    (untrained,) = _cells(smoke[1], "frozen")
    assert untrained.measurements is not None
    ledger = untrained.measurements.memory
    assert (ledger.adapter_B, ledger.gradients_B, ledger.optimizer_B) == (0, 0, 0)
    assert ledger.counted_peak_B is None
    assert untrained.measurements.parameters.trainable == 0


def model_head_size(model: Path) -> int:
    config = json.loads((model / "config.json").read_text())
    return int(config["hidden_size"] // config["num_attention_heads"])


def test_smoke_times_base_unmerged_and_merged(smoke: tuple[Finished, store.Run]) -> None:
    for record in smoke[1].records:
        assert record.measurements is not None
        found = {(m.variant, m.kind): m for m in record.measurements.latency if m.batch == 1}
        assert set(found) == {(v, k) for v in ("base", "unmerged", "merged") for k in ("prefill", "decode")}
        for (variant, _), latency in found.items():
            if record.cell.method == "frozen" and variant != "base":
                assert latency.seconds == []
                assert latency.because
            else:
                assert len(latency.seconds) > 1
                assert min(latency.seconds) > 0


def test_smoke_scores_the_same_items(smoke: tuple[Finished, store.Run]) -> None:
    ids = set()
    for record in smoke[1].records:
        assert record.measurements is not None
        accuracy = record.measurements.accuracy
        assert accuracy is not None
        assert len(accuracy.items) == len({i.id for i in accuracy.items}) == record.cell.evaluation.items
        assert {i.correct for i in accuracy.items} <= {0, 1}
        assert accuracy.value == sum(i.correct for i in accuracy.items) / len(accuracy.items)
        assert 0 <= accuracy.low < accuracy.value < accuracy.high <= 1
        assert accuracy.scored_by.startswith("lm-eval ")
        ids.add(tuple(i.id for i in accuracy.items))
    assert len(ids) == 1


def test_smoke_names_code_data_and_checks(smoke: tuple[Finished, store.Run]) -> None:
    _, run = smoke
    for record in run.records:
        assert record.environment.id == run.manifest.environment.id
        assert record.environment.code_version == run.manifest.environment.code_version
        assert record.environment.software["torch"]
        build = record.environment.extra["torch_build"]
        assert any(line.startswith("CPU capability usage: ") for line in build)
        assert not any("settings" in line or line.endswith(":") for line in build)
        assert len(record.environment.extra["torch_commit"]) == 40
        assert all(re.fullmatch("[0-9a-f]{64}", asset.sha256) for asset in record.assets)
        assert [asset.name for asset in record.assets] == ["tiny-llama", "toy-sentiment", "toy-sentiment"]
        assert record.provider is not None
        assert record.provider.distribution == "peft-harness"
        assert Counter(c.outcome for c in record.checks)[Outcome.PASS] >= 3


def test_every_implementation_starts_from_the_same_loss(smoke: tuple[Finished, store.Run]) -> None:
    first = {r.cell.implementation: _losses(r)[0] for r in _cells(smoke[1]) if r.cell.dtype == "float32"}
    assert set(first) == {"reference", "fused"}
    assert len(set(first.values())) == 1


# --- implementations that misbehave ----------------------------------------------------------------------------------

FAULTS = ("killed", "crashes", "exits", "leaves", "starved", "missing", "raises", "greedy", "wrong", "nan")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Finished, store.Run]:
    """One run of all that misbehave, and after them the smoke suite's LoRA with two seeds."""
    sandbox = make_sandbox(tmp_path_factory.mktemp("faults"), cache)
    suite = sandbox.suite(
        f"{{id: fault, implementation: [{', '.join(FAULTS)}]}}", "{id: fine, implementation: reference, seed: [0, 1]}"
    )
    finished = sandbox.command("run", suite, "--out", "run")
    assert sandbox.run_folder.is_dir(), finished.err
    return finished, sandbox.read()


def _of(run: store.Run, implementation: str) -> Record:
    (record,) = (r for r in run.latest().values() if r.cell.implementation == implementation)
    return record


def _losses(record: Record) -> list[float]:
    return _trained(record).losses


@pytest.mark.parametrize(
    ("name", "status", "because", "kind", "phase"),
    [
        ("raises", Status.ERROR, r"RuntimeError: attaching \\udcff went wrong", "RuntimeError", "attach"),
        ("greedy", Status.OOM, "the host's memory ran out: .*allocate", "RuntimeError", "attach"),
        ("starved", Status.OOM, "the host's memory ran out", "MemoryError", "start-up"),
        ("wrong", Status.NONCONFORMING, "lora/forward/float32/warm failed: .*error .* allowed", None, "parity"),
        ("nan", Status.NONCONFORMING, "loss nan .* at step 2", "Diverged", "train"),
        ("killed", Status.LOST, "killed by SIGKILL in phase start-up", "SIGKILL", "start-up"),
        ("crashes", Status.LOST, "killed by SIGSEGV in phase start-up", "SIGSEGV", "start-up"),
        ("exits", Status.LOST, "exit code 1", "exit 1", "start-up"),
        ("leaves", Status.LOST, "exit code 7", "exit 7", "start-up"),
    ],
)
def test_a_fault_is_an_outcome(
    faults: tuple[Finished, store.Run], name: str, status: Status, because: str, kind: str | None, phase: str
) -> None:
    record = _of(faults[1], name)
    assert (record.status, record.measurements) == (status, None), record
    assert re.search(because, record.because), record.because
    assert record.failure is not None
    assert kind in (record.failure.kind, None)
    assert record.failure.phase == phase
    assert record.phases == [] or record.phases[-1].name == phase
    assert record.cell.label in faults[0].err
    assert record.cell_id in (faults[1].path / "report.html").read_text(encoding="utf-8")


def test_a_fault_says_what_a_reader_needs(faults: tuple[Finished, store.Run]) -> None:
    def failure(name: str) -> Any:
        return _of(faults[1], name).failure

    assert "misbehaving.py" in failure("raises").traceback
    assert failure("greedy").requested_B == 2**26
    # It had been given some pieces, and the Record's last peak holds them.
    (start,) = (p for p in _of(faults[1], "greedy").phases if p.name == "start-up")
    assert start.end_memory_B is not None
    assert failure("greedy").last_peak_B > start.end_memory_B + 4 * 2**26
    assert "last words" in failure("leaves").message  # what the worker printed last
    assert "no licence" in failure("exits").message
    assert any(c.outcome is Outcome.FAIL for c in _of(faults[1], "wrong").checks)


def test_what_cannot_be_imported_is_skipped(faults: tuple[Finished, store.Run]) -> None:
    record = _of(faults[1], "missing")
    assert (record.status, record.measurements, record.failure) == (Status.SKIPPED, None, None)
    assert "needs misbehaving_missing, which cannot be imported" in record.because


def test_the_other_cells_do_not_notice(faults: tuple[Finished, store.Run]) -> None:
    finished, run = faults
    assert (run.missing(), run.broken) == ([], {})
    assert [r.status for r in run.latest().values() if r.cell.implementation == "reference"] == [Status.OK] * 2
    assert run.footer is not None
    expected = {"lost": 4, "oom": 2, "skipped": 1, "error": 1, "nonconforming": 2, "ok": 2}
    assert (run.footer.how, run.footer.counts) == ("finished", expected)
    assert finished.code == Exit.FAIL  # a nonconforming Cell is a finding, whatever else went wrong
    assert "Traceback" not in finished.err


def test_a_rerun_gives_the_same_losses_to_the_last_bit(
    smoke: tuple[Finished, store.Run], faults: tuple[Finished, store.Run]
) -> None:
    zero, one = (r for r in faults[1].latest().values() if r.cell.implementation == "reference")
    earlier = smoke[1].latest()[zero.cell_id]
    assert (zero.cell.seed, one.cell.seed) == (0, 1)
    assert earlier.run != zero.run
    assert _losses(zero) == _losses(earlier)
    assert _trained(zero).gradient_norms == _trained(earlier).gradient_norms
    assert _losses(one)[0] != _losses(zero)[0]
    for what in ("data_order_sha256", "initial_state_sha256"):
        seen = {run: getattr(_trained(r), what) for run, r in {"zero": zero, "earlier": earlier, "one": one}.items()}
        assert seen["zero"] == seen["earlier"] != seen["one"]


# --- time-out, kill, Ctrl-C, resume ----------------------------------------------------------------------------------


def test_a_hanging_worker_is_killed_with_its_children(sandbox: Sandbox) -> None:
    finished = sandbox.command(
        "run", sandbox.suite("{implementation: hangs}"), "--out", "run", "--timeout", "8"
    )  # fmt: skip
    pids = sandbox.hanging()
    eventually(lambda: all(map(gone, pids)), "the worker and its child are gone")
    (record,) = sandbox.read().records
    assert (record.status, record.measurements) == (Status.TIMEOUT, None)
    assert record.because == "not done after 8 s, in phase start-up"
    assert record.duration_s >= 8
    assert finished.code == Exit.INFRASTRUCTURE
    assert sandbox.read().footer is not None


@dataclass(frozen=True)
class Stage:
    """What a run looked like after something had happened to it."""

    finished: Finished
    run: store.Run
    page: str


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Stage]:
    """One run of two Cells, of which the second hangs: ended in every way, resumed each time, in the end let finish."""
    sandbox = make_sandbox(tmp_path_factory.mktemp("story"), cache)
    suite = sandbox.suite("{implementation: reference}", "{implementation: hangs}")
    stages: dict[str, Stage] = {}

    def stage(
        name: str,
        process: subprocess.Popen[str],
        blow: signal.Signals | None,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        began = time.monotonic()
        pids = sandbox.hanging() if blow else []
        if meanwhile:
            meanwhile()
        if blow:
            for pid in pids[:1] if blow is signal.SIGTERM else []:
                os.kill(pid, blow)  # a batch system tells every process of a job, in any order
            process.send_signal(blow)
        finished = sandbox.finish(process, began)
        eventually(lambda: all(map(gone, pids)), "the worker and its child are gone")
        page = sandbox.run_folder / "report.html"
        stages[name] = Stage(finished, sandbox.read(), page.read_text(encoding="utf-8") if page.exists() else "")
        page.unlink(missing_ok=True)

    stage("interrupted", sandbox.start("run", suite, "--out", "run"), signal.SIGINT)
    stage("killed", sandbox.start("run", suite, "--resume", "run"), signal.SIGKILL)
    stage("reported", sandbox.start("report", "run"), None)
    first = sandbox.start("run", suite, "--resume", "run")
    stage(
        "terminated",
        first,
        signal.SIGTERM,
        lambda: stage("second", sandbox.start("run", suite, "--resume", "run"), None),
    )
    (sandbox.run_folder / "footer.json").write_bytes(b"")
    stage("torn", sandbox.start("report", "run"), None)
    (sandbox.folder / "behave").touch()
    stage("resumed", sandbox.start("run", suite, "--resume", "run"), None)
    return stages


def test_ctrl_c_ends_cleanly_with_a_report_of_what_there_is(story: dict[str, Stage]) -> None:
    stage = story["interrupted"]
    first, second = stage.run.manifest.cells
    assert stage.finished.code == Exit.INFRASTRUCTURE
    assert "interrupted: finished Cells are saved" in stage.finished.err
    assert "Traceback" not in stage.finished.err
    assert [(r.cell_id, r.status) for r in stage.run.records] == [(first.cell_id, Status.OK)]
    assert stage.run.footer is not None
    assert (stage.run.footer.how, stage.run.footer.missing) == ("interrupted", [second.cell_id])
    assert stage.run.footer.seconds_in_cells > stage.run.records[0].duration_s
    assert first.cell_id in stage.page
    assert "the run is interrupted" in stage.finished.out


def test_a_killed_runner_loses_nothing_that_was_finished(story: dict[str, Stage]) -> None:
    stage = story["killed"]
    assert stage.finished.code == -signal.SIGKILL
    assert stage.run.records == story["interrupted"].run.records
    assert (stage.run.footer, stage.run.broken) == (None, {})


def test_a_run_without_footer_is_reported_as_incomplete(story: dict[str, Stage]) -> None:
    stage = story["reported"]
    assert stage.finished.code == Exit.INFRASTRUCTURE
    assert "the run is incomplete" in stage.finished.out
    assert "incomplete" in stage.page


def test_resume_measures_only_what_is_missing(story: dict[str, Stage]) -> None:
    stage = story["resumed"]
    first, second = stage.run.manifest.cells
    assert stage.finished.code == Exit.PASS, stage.finished.err
    assert "has an ok Record" in stage.finished.err
    # Three attempts were cut off and left their logs; their numbers are used up.
    assert [(r.cell_id, r.attempt, r.status) for r in stage.run.latest().values()] == [
        (first.cell_id, 1, Status.OK),
        (second.cell_id, 4, Status.OK),
    ]
    assert len(stage.run.records) == 2
    assert stage.run.footer is not None
    assert (stage.run.footer.how, stage.run.footer.missing, stage.run.footer.counts) == ("finished", [], {"ok": 2})
    assert all(r.id.split(".")[0] in stage.page for r in stage.run.records)


def test_the_times_of_a_resumed_run_are_its_own(story: dict[str, Stage]) -> None:
    stage = story["resumed"]
    kept, made = stage.run.latest().values()
    footer = stage.run.footer
    assert footer is not None
    assert footer.kept == 1
    assert made.duration_s <= footer.seconds_in_cells < made.duration_s + kept.duration_s
    assert adds_up(footer)
    assert (
        f"this resumed part took {footer.seconds_total:.1f} s; the Cells of the whole run took "
        f"{kept.duration_s + made.duration_s:.1f} s, 1 of them measured earlier"
    ) in stage.finished.err
    first = story["interrupted"]
    assert first.run.footer is not None
    assert first.run.footer.kept == 0
    assert "resumed part" not in first.finished.err


def test_sigterm_ends_a_run_as_ctrl_c_does(story: dict[str, Stage]) -> None:
    stage = story["terminated"]
    first, second = stage.run.manifest.cells
    assert stage.finished.code == Exit.INFRASTRUCTURE
    assert "interrupted by SIGTERM: finished Cells are saved" in stage.finished.err
    assert "Traceback" not in stage.finished.err
    assert [(r.cell_id, r.status) for r in stage.run.records] == [(first.cell_id, Status.OK)]
    assert stage.run.footer is not None
    assert (stage.run.footer.how, stage.run.footer.missing) == ("interrupted", [second.cell_id])
    assert first.cell_id in stage.page
    assert "the run is interrupted" in stage.finished.out


def test_a_second_runner_is_sent_away(story: dict[str, Stage]) -> None:
    stage = story["second"]
    assert stage.finished.code == Exit.USAGE
    message = _one_message(stage.finished.err)
    assert re.search(r"run: another peft-harness is writing to this run: process \d+ on ", message)
    assert "hint: " in message
    assert stage.finished.out == ""
    assert stage.run.records == story["killed"].run.records


def test_a_run_with_a_torn_footer_is_reported_and_resumed(story: dict[str, Stage]) -> None:
    torn = story["torn"]
    assert torn.finished.code == Exit.INFRASTRUCTURE
    assert "the run is incomplete" in torn.finished.out
    assert "unreadable: footer.json: not a whole Footer" in torn.finished.out
    assert torn.run.manifest.cells[0].cell_id in torn.page
    assert "is incomplete: its footer.json cannot be read" in story["resumed"].finished.err


_HOLD = """
import os, subprocess, sys, time
from harness.process.lifeline import die_with_parent
watched, events = map(int, sys.argv[1:])
die_with_parent(watched, events)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
os.write(events, f"{child.pid}\\n".encode())
if os.environ.get("LEAVE"):
    os._exit(0)
time.sleep(600)
"""


@pytest.fixture
def held(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """A process that holds a lifeline; (process, the lifeline's other end, where it writes its child's pid)."""
    watched, line = os.pipe()
    events, out = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(watched), str(out)], pass_fds=(watched, out), start_new_session=True,
        env={**os.environ, **getattr(request, "param", {})},
    )  # fmt: skip
    os.close(watched)
    os.close(out)
    yield process, line, events
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    os.close(events)


def test_a_lifeline_that_was_cut_before_it_was_held(held: tuple[subprocess.Popen[bytes], int, int]) -> None:
    process, line, _ = held
    os.close(line)  # Python has not even started there
    eventually(lambda: process.poll() is not None, "the process has ended")
    assert process.returncode == -signal.SIGKILL


def test_a_cut_lifeline_takes_the_children_along(held: tuple[subprocess.Popen[bytes], int, int]) -> None:
    process, line, events = held
    child = int(os.read(events, 100))
    assert not gone(child)
    assert process.poll() is None
    os.close(line)
    eventually(lambda: process.poll() is not None and gone(child), "both are gone")


@pytest.mark.parametrize("held", [{"LEAVE": "1"}], indirect=True)
def test_the_end_of_a_worker_is_seen_while_its_lifeline_stands(
    held: tuple[subprocess.Popen[bytes], int, int],
) -> None:
    process, line, events = held
    child = int(os.read(events, 100))
    # The watcher does not keep the pipe open.
    assert select.select([events], [], [], PATIENCE_S)[0]
    assert os.read(events, 1) == b""
    process.wait()
    os.close(line)
    eventually(lambda: gone(child), "the child of a worker that has ended is gone too")


# --- the run around its Cells ----------------------------------------------------------------------------------------


@pytest.fixture
def inside(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """The plug-in and the cache for runs inside this process; workers are started as ever."""
    for name, value in sandbox.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(sandbox.folder / "plugin")
    monkeypatch.chdir(sandbox.folder)
    return sandbox


# Cells that take a second: they end before torch is imported.
QUICK = "{implementation: [missing, leaves]}"


def _one_message(err: str) -> str:
    assert "Traceback" not in err
    assert err.count("peft-harness: ") == 1, err
    return err[err.index("peft-harness: ") :]


def test_ctrl_c_between_cells(
    inside: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = store.RunFolder.next_attempt, []

    def next_attempt(self: store.RunFolder, cell_id: str) -> int:
        calls.append(cell_id)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, cell_id)

    monkeypatch.setattr(store.RunFolder, "next_attempt", next_attempt)
    code = main(["run", inside.suite(QUICK), "--out", "run"])
    run = inside.read()
    assert code == Exit.INFRASTRUCTURE
    assert run.footer is not None
    assert (run.footer.how, len(run.footer.missing), len(run.records)) == ("interrupted", 1, 1)
    assert (run.path / "report.html").is_file()
    assert "interrupted: finished Cells are saved" in capsys.readouterr().err


def test_ctrl_c_while_fetching(
    inside: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ensure(*_: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "ensure", ensure)
    assert main(["run", inside.suite(QUICK), "--out", "run"]) == Exit.INFRASTRUCTURE
    assert "interrupted" in _one_message(capsys.readouterr().err)
    assert not inside.run_folder.exists()


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), OSError(28, "No space left on device")])
def test_a_report_that_fails_loses_no_result(
    inside: Sandbox, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def render(*_: object) -> str:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(html, "render", render)
        assert main(["run", inside.suite("{implementation: missing}"), "--out", "run"]) == Exit.INFRASTRUCTURE
    printed = capsys.readouterr()
    message = _one_message(printed.err)
    assert "all Cells are measured and saved" in message
    assert str(error) in message
    assert "skipped" in printed.out  # the summary is there all the same
    run = inside.read()
    assert run.footer is not None
    assert (run.footer.how, len(run.records)) == ("finished", 1)
    hint = re.search(r"`peft-harness (report .*)`", message)
    assert hint is not None
    main(hint[1].split())
    assert (run.path / "report.html").is_file()


def test_a_run_folder_that_breaks(inside: Sandbox, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["run", inside.suite("{implementation: [missing, vandal, leaves]}"), "--out", "run"])
    assert code == Exit.INFRASTRUCTURE
    assert "cannot write" in _one_message(capsys.readouterr().err)
    run = inside.read()
    assert run.footer is not None
    assert run.footer.how == "failed"
    (finished,) = (run.path / "gone").glob("*.json")
    assert store.read_record(finished).status is Status.SKIPPED


def test_a_tool_that_only_says_that_it_is_at_work_is_quoted_once(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress([])
    for _ in range(3):
        progress.fetching("tiny-llama: making", 0, None)
    progress.fetching("toy-sentiment: making", 0, None)
    assert capsys.readouterr().err.splitlines() == ["tiny-llama: making", "toy-sentiment: making"]


def test_latencies_that_there_was_no_memory_for_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    (cell,) = [one for name, one in recorded_run.cells().items() if name == "fused"]
    good = recorded_run.record("fused", cell)
    assert good.measurements is not None
    lost = [one.model_copy(update={"because": "out of memory: 2.00 GiB"}) for one in good.measurements.latency]
    short = good.model_copy(update={"measurements": good.measurements.model_copy(update={"latency": lost})})
    progress = Progress([cell])
    progress.end(good)
    progress.end(short)
    before, after = capsys.readouterr().err.splitlines()
    assert after == f"{before}  no latencies: out of memory: 2.00 GiB"


def test_a_worker_that_cannot_be_started(
    inside: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tiny-llama", "toy-sentiment"):
        fetch.ensure(_source(name))  # by a child process, as long as there are any

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    open_files = []
    for folder in ("first", "run"):  # what is opened once and kept is no leak; what each run leaves open is
        assert main(["run", inside.suite(QUICK), "--out", folder]) == Exit.INFRASTRUCTURE
        assert "cannot start a worker: Resource temporarily unavailable" in _one_message(capsys.readouterr().err)
        open_files.append(psutil.Process().num_fds())
    assert open_files[1] <= open_files[0]
    footer = inside.read().footer
    assert footer is not None
    assert footer.how == "failed"


def test_a_bug_in_the_middle_of_a_run_says_what_is_kept(sandbox: Sandbox) -> None:
    code = (
        "import sys\nfrom harness import cli; from harness.records import store\n"
        "def write_record(*_): raise KeyError('ours')\nstore.RunFolder.write_record = write_record\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", sandbox.suite("{implementation: leaves}"), "--out", "run"],
        cwd=sandbox.folder, env=sandbox.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == Exit.INFRASTRUCTURE
    assert "Traceback" in done.stderr
    message = done.stderr[done.stderr.index("peft-harness: ") :]
    assert "this is a bug of peft-harness, not of what you asked: KeyError: 'ours'" in message
    assert "finished Cells are saved in run; `peft-harness report run` shows them" in message
    footer = sandbox.read().footer
    assert footer is not None
    assert footer.how == "failed"


@pytest.mark.parametrize(("options", "code"), [([], Exit.PASS), (["--strict"], Exit.INCONCLUSIVE)])
def test_strict_does_not_pass_an_open_question(
    inside: Sandbox, options: list[str], code: Exit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: Local, works: Iterator[Job], terms: attempt.RunContext, __: object) -> Iterator[Record]:
        for work in works:
            record = recorded_run.record("reference", work.cell, work.run)
            terms.folder.write_record(record)
            yield record

    monkeypatch.setattr(Local, "run", run)
    # The float64 run, which the others are to be compared with, is left out.
    assert main(["run", "smoke", "--only", "method=lora,dtype=float32", "--out", "run", *options]) == code


def test_signals_are_heard_only_while_a_run_goes_on(inside: Sandbox) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    main(["run", inside.suite("{implementation: missing}"), "--out", "run"])
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)) == before


@pytest.mark.parametrize("given", [None, "active", "passive"])
def test_how_threads_wait_is_left_to_the_user(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Passive threads would not hold up other jobs, but made training steps half as long again on an idle machine.
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert attempt._worker_environment().get("OMP_WAIT_POLICY") == given


def test_a_reader_of_the_progress_that_leaves(sandbox: Sandbox) -> None:
    process = sandbox.start("run", sandbox.suite(QUICK), "--out", "run")
    assert process.stderr is not None
    process.stderr.close()
    process.stderr = None
    sandbox.finish(process, time.monotonic())
    run = sandbox.read()
    assert run.footer is not None
    assert (run.footer.how, len(run.records), process.returncode) == ("finished", 2, Exit.INFRASTRUCTURE)


def test_what_cannot_be_written_is_refused_before_anything_is_fetched(
    inside: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = inside.suite("{implementation: missing}")
    assert main(["run", suite, "--out", "run"]) == Exit.NOTHING_COMPARED
    before = sorted((p, p.stat().st_mtime_ns) for p in inside.run_folder.rglob("*"))
    capsys.readouterr()

    def ensure(*_: object) -> Path:
        raise AssertionError("fetched")

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "ensure", ensure)
        for options, says in (
            (["--out", "run"], "holds a run already"),
            (["--out", "other", "--resume", "run"], "stays in its folder"),
            (["--resume", "nowhere"], "no run 'nowhere'"),
        ):
            assert main(["run", suite, *options]) == Exit.USAGE
            assert says in _one_message(capsys.readouterr().err)
        other = inside.suite(QUICK)
        assert main(["run", other, "--resume", "run"]) == Exit.USAGE
        assert "1 Cells of this suite are not in that run" in _one_message(capsys.readouterr().err)
    assert main(["run", suite, "--out", f"{suite}/run"]) == Exit.USAGE  # below a file
    assert "cannot make the run folder" in _one_message(capsys.readouterr().err)
    assert sorted((p, p.stat().st_mtime_ns) for p in inside.run_folder.rglob("*")) == before


def test_fetched_data_that_do_not_fit_are_refused_before_the_first_cell(
    inside: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = fetch.ensure

    def spoilt(source: table.Source, *show: Any) -> Path:
        path = real(source, *show)
        if source.rows is None or not show:  # without progress: by the suite's reader, which looks at local files
            return path
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        bad = inside.folder / "bad.jsonl"
        bad.write_text("".join([*lines[:3], '{"text": "so so", "label": 2}\n', *lines[3:]]), encoding="utf-8")
        return bad

    monkeypatch.setattr(fetch, "ensure", spoilt)
    assert main(["run", inside.suite(QUICK), "--out", "run"]) == Exit.USAGE
    message = _one_message(capsys.readouterr().err)
    assert "bad.jsonl:4: label 2 of row" in message
    assert "hint: " in message
    assert not inside.run_folder.exists()


def test_a_clock_that_is_set_back(inside: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["run", inside.suite("{implementation: missing}"), "--out", "run"])
    run = inside.read()
    data = _source("toy-sentiment")
    asset = {"path": "unused", "source": data, "use": fetch.use(data)}
    facts = {"name": "toy", "spec": {}, "labels": 2, "test": 1, "shuffle_seed": 0, "use": fetch.use(data)}
    work = Job.model_validate(
        {"run": run.manifest.run, "folder": "run", "attempt": 2, "cell": run.manifest.cells[0], "model": asset,
         "data": asset, "task": facts, "device": "cpu", "launched": time.time() + 3600}
    )  # fmt: skip
    record = worker.attempt(work, lambda *_, **__: None)
    assert record.status is Status.SKIPPED
    assert 0 <= record.duration_s < 3600
