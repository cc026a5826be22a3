"""Records that rest on the parity gate of another Record: its checks count for them, and without it they do not count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.analysis.comparison import against_baseline
from harness.analysis.run_facts import analyse
from harness.errors import Exit
from harness.records import store
from harness.records.gate import Gate
from harness.records.record import Outcome, Record
from harness.report import terminal, view
from harness.report.export import frames
from support import recorded_run

CELLS = recorded_run.cells()
TAKEN, RESTING = CELLS["reference"], CELLS["fused"]
KEY = "0123456789abcdef"


def share(name: str, record: Record) -> Record:
    """Let `fused` rest on the gate of `reference`: its first eight checks. The others follow the training."""
    if name == "reference":
        return record.model_copy(update={"gate": Gate(key=KEY, checks=8)})
    if name == "fused":
        gate = Gate(key=KEY, record=f"{TAKEN.cell_id}.1")
        return record.model_copy(update={"gate": gate, "checks": record.checks[8:]})
    return record


@pytest.fixture
def run(tmp_path: Path) -> store.Run:
    return recorded_run.write_run(tmp_path / "run", change=share)


def path_of(run: store.Run) -> Path:
    return run.path / "cells" / f"{TAKEN.cell_id}.1.json"


def test_the_checks_of_a_shared_gate_count_once_and_for_both(run: store.Run, tmp_path: Path) -> None:
    latest = run.latest()
    taken, resting = latest[TAKEN.cell_id], latest[RESTING.cell_id]
    assert resting.checks[:8] == taken.checks[:8]
    alone = analyse(recorded_run.write_run(tmp_path / "alone"))
    parity, before = analyse(run).verdict.parity, alone.verdict.parity
    assert (parity.shared, before.shared) == (1, 0)
    assert parity.passed == before.passed - sum(c.outcome is Outcome.PASS for c in taken.checks[:8])
    lines = "\n".join(terminal.summary(analyse(run)))
    assert f"{parity.passed} checks of the computation passed, 0 failed, {parity.skipped} skipped" in lines
    assert "1 Cell with the gate of another" in lines
    numbers = frames.of([run])
    rests = numbers.cells.set_index("cell_id")["gate_record"].dropna()
    assert rests.to_dict() == {RESTING.cell_id: taken.id}
    # Nothing is missing beside a run in which each Cell took its own gate.
    against = against_baseline.judge(alone, analyse(run))
    assert not [row for row in against.rows if "not tried now" in row.reason]


def test_an_adapter_without_a_reference_shows_no_speed_by_a_shared_gate_either(tmp_path: Path) -> None:
    skip = recorded_run.checks(TAKEN)[0].model_copy(
        update={"check": "peft/reference/float32/init", "outcome": Outcome.SKIPPED, "detail": "no reference"}
    )

    def unreferenced(name: str, record: Record) -> Record:
        shared = share(name, record)
        return shared.model_copy(update={"checks": [skip, *shared.checks]}) if name == "reference" else shared

    run = recorded_run.write_run(tmp_path / "run", change=unreferenced)
    cells = frames.of([run]).cells.set_index("cell_id")
    assert cells["no_speed"][RESTING.cell_id] == "no speed without parity: no reference"


@pytest.mark.parametrize("footer", [True, False])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("torn")])
def test_without_the_record_that_it_rests_on_a_record_does_not_count(
    tmp_path: Path, damage: Callable[[Path], object], footer: bool
) -> None:
    run = recorded_run.write_run(tmp_path / "run", change=share, footer=footer)
    damage(path_of(run))
    again = store.read_run(run.path)
    name = f"cells/{RESTING.cell_id}.1.json"
    assert list(again.ungated) == [name]
    assert RESTING.cell_id not in again.latest()
    assert RESTING.cell_id not in again.missing()
    facts = analyse(again)
    assert facts.status(RESTING) == "ungated"
    assert facts.verdict.counts["ungated"] == 1
    says = f"{name} rests on the parity gate of Record {TAKEN.cell_id}.1, which is missing or was changed"
    assert f"ungated: {says}, and does not count" in terminal.summary(facts)
    alerts = view.build([facts])["runs"][0]["alerts"]
    assert [says] in [alert["items"] for alert in alerts]
    assert RESTING.cell_id not in set(frames.of([again]).cells["cell_id"])


def test_a_run_whose_only_fault_is_a_lost_gate_is_incomplete(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "run", change=share, only=["fused"])
    verdict = analyse(run).verdict
    assert (verdict.exit, verdict.verdict.reason) == (Exit.NOTHING_COMPARED, "no Cell was measured")
    run = recorded_run.write_run(tmp_path / "more", change=share, only=["fused", "head"])
    verdict = analyse(run).verdict
    assert verdict.exit is Exit.INFRASTRUCTURE
    assert verdict.verdict.reason == "1 Cell whose parity gate is lost"


def test_a_gate_with_another_key_is_no_gate(tmp_path: Path) -> None:
    def other(name: str, record: Record) -> Record:
        shared = share(name, record)
        return shared.model_copy(update={"gate": Gate(key="f" * 16, checks=8)}) if name == "reference" else shared

    assert RESTING.cell_id not in recorded_run.write_run(tmp_path / "run", change=other).latest()
