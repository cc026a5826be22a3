"""Implementations that misbehave: each ends as an outcome, and the other Cells do not notice."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from harness.errors import Exit
from harness.records import store
from harness.records.record import Outcome, Record, Status
from support.once import once
from support.run_records import cells, losses, trained
from support.sandbox import Finished, make_fork_sandbox

pytestmark = pytest.mark.e2e

FAULTS = ("killed", "crashes", "exits", "leaves", "starved", "missing", "raises", "greedy", "wrong", "nan")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Finished, store.Run]:
    """One run of all that misbehave, and after them the smoke suite's LoRA with another seed."""

    def make(folder: Path) -> dict[str, Any]:
        sandbox = make_fork_sandbox(folder, cache)
        suite = sandbox.suite(
            f"{{id: fault, implementation: [{', '.join(FAULTS)}]}}", "{id: fine, implementation: reference, seed: 1}"
        )
        return asdict(sandbox.command("run", suite, "--out", "run"))

    folder, finished = once(tmp_path_factory, "faults", make)
    assert (folder / "run").is_dir(), finished["err"]
    return Finished(**finished), store.read_run(folder / "run")


def _of(run: store.Run, implementation: str) -> Record:
    (record,) = (r for r in run.latest().values() if r.cell.implementation == implementation)
    return record


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
    assert [r.status for r in run.latest().values() if r.cell.implementation == "reference"] == [Status.OK]
    assert run.footer is not None
    expected = {"lost": 4, "oom": 2, "skipped": 1, "error": 1, "nonconforming": 2, "ok": 1}
    assert (run.footer.how, run.footer.counts) == ("finished", expected)
    assert finished.code == Exit.FAIL  # a nonconforming Cell is a finding, whatever else went wrong
    assert "Traceback" not in finished.err


@pytest.mark.nightly
def test_another_seed_gives_other_losses(smoke: tuple[Finished, store.Run], faults: tuple[Finished, store.Run]) -> None:
    one = _of(faults[1], "reference")
    (zero,) = (r for r in cells(smoke[1]) if (r.cell.implementation, r.cell.dtype) == ("reference", "float32"))
    assert (zero.cell.seed, one.cell.seed) == (0, 1)
    assert zero.cell.training == one.cell.training
    assert losses(one)[0] != losses(zero)[0]
    assert trained(one).data_order_sha256 != trained(zero).data_order_sha256
    assert trained(one).initial_state_sha256 != trained(zero).initial_state_sha256
