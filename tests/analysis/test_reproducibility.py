from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.analysis.comparison import reproducibility
from harness.analysis.run_facts import analyse, analyse_all
from harness.cli import main
from harness.errors import Exit
from harness.records.record import Provider, Record
from harness.records.store import Run
from harness.report import html, reruns, view
from support import recorded_run

Change = Callable[[str, Record], Record | None]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return recorded_run.write_run(tmp_path_factory.mktemp("first") / "first", run="first")


def _nudged(name: str, r: Record) -> Record:
    """Change one Cell's loss at step 7 by one bit."""
    if name != "fused":
        return r
    assert r.measurements is not None
    assert r.measurements.training is not None
    values = r.measurements.training.losses[:]
    values[7] = math.nextafter(values[7], 1.0)
    return recorded_run.with_losses(r, values).model_copy(update={"notes": ["a note about something else"]})


def _trained(r: Record, **changes: Any) -> Record:
    assert r.measurements is not None
    if r.measurements.training is None:
        return r
    training = r.measurements.training.model_copy(update=changes)
    return r.model_copy(update={"measurements": r.measurements.model_copy(update={"training": training})})


def _again(folder: Path, change: Change) -> Run:
    return recorded_run.write_run(folder, run=folder.name, change=change)


def _unequal(runs: list[Run]) -> reproducibility.Rerun:
    (unequal,) = [r for r in reproducibility.reruns(runs) if not r.equal]
    return unequal


def test_a_rerun_is_equal_to_the_last_bit(first: Run, tmp_path: Path) -> None:
    found = reproducibility.reruns([first, recorded_run.write_run(tmp_path / "b", run="b")])
    assert len(found) == 10
    assert all(r.equal and not r.causes and not r.unexplained for r in found)
    assert {r.same_losses for r in found if "zero-shot" in r.label} == {None}
    assert reproducibility.judge(found) is Exit.PASS


def test_one_bit_without_a_cause_is_a_failure_from_its_step(first: Run, tmp_path: Path) -> None:
    unequal = _unequal([first, _again(tmp_path / "b", _nudged)])
    assert (unequal.first_step, unequal.same_losses, unequal.same_items) == (7, False, True)
    assert (unequal.causes, unequal.unexplained) == ((), True)
    assert reproducibility.judge([unequal]) is Exit.FAIL


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"environment": recorded_run.environment(threads=4)}, "threads: 2, 4"),
        ({"environment": recorded_run.environment(code_version="d" * 64)}, f"code version: {'c' * 12}, {'d' * 12}"),
        ({"environment": recorded_run.environment(machine={})}, "machine cpu: Example 4-core, none"),
        ({"assets": recorded_run.assets("b" * 64)}, f"minilm-l6: sha256 {'a' * 12}, {'b' * 12}"),
        ({"device": "cuda"}, "device: not recorded, cuda"),
        ({"provider": Provider(distribution="acme", version="2")}, "implementation from: peft-harness 1.0, acme 2"),
    ],
)
def test_other_circumstances_are_the_cause(first: Run, tmp_path: Path, changes: dict[str, Any], cause: str) -> None:
    moved = lambda n, r: _nudged(n, r).model_copy(update=changes)  # noqa: E731
    unequal = _unequal([first, _again(tmp_path / "c", moved)])
    assert cause in unequal.causes
    assert not unequal.unexplained
    assert reproducibility.judge([unequal]) is Exit.PASS
    assert reproducibility.judge([unequal], strict=True) is Exit.INCONCLUSIVE


def test_an_equal_rerun_elsewhere_needs_no_cause(first: Run, tmp_path: Path) -> None:
    moved = lambda _, r: r.model_copy(update={"environment": recorded_run.environment(threads=4)})  # noqa: E731
    found = reproducibility.reruns([first, _again(tmp_path / "c", moved)])
    assert all(r.equal and r.causes == () for r in found)


@pytest.mark.parametrize(
    ("field", "sentence"),
    [("initial_state_sha256", "initial state: 1111, 2222"), ("data_order_sha256", "order of the data: 1111, 2222")],
)
def test_a_difference_determined_by_the_seed_explains_nothing(tmp_path: Path, field: str, sentence: str) -> None:
    one = _again(tmp_path / "one", lambda _, r: _trained(r, **{field: "1111"}))
    two = _again(tmp_path / "two", lambda n, r: _trained(_nudged(n, r), **{field: "2222"}))
    unequal = _unequal([one, two])
    assert (unequal.seeded, unequal.unexplained) == ((sentence,), True)
    old = _again(tmp_path / "old", _nudged)
    assert _unequal([one, old]).seeded == ()


def test_two_reruns_elsewhere_are_compared_with_each_other(first: Run, tmp_path: Path) -> None:
    moved = lambda n, r: r.model_copy(update={"environment": recorded_run.environment(threads=4)})  # noqa: E731
    both = lambda n, r: moved(n, _nudged(n, r))  # noqa: E731
    runs = [first, _again(tmp_path / "b", both), _again(tmp_path / "c", moved)]
    assert _unequal(runs).unexplained
    assert not _unequal(runs[:2]).unexplained


def test_failed_attempts_and_copies_are_no_reruns(first: Run, tmp_path: Path) -> None:
    good = recorded_run.record("fused", recorded_run.cells()["fused"], attempt=2)
    run = recorded_run.write_run(
        tmp_path / "r", only=["fused"], change=lambda _, r: recorded_run.failed(r), extra=[good]
    )
    assert reproducibility.reruns([run]) == ()
    assert reproducibility.reruns([first, first]) == ()
    assert reproducibility.judge([]) is Exit.NOTHING_COMPARED


# ---- what a user sees


@pytest.mark.parametrize(
    ("change", "code", "expected"),
    [
        (lambda _, r: r, 0, ["✓ reproducibility: 10 repeated Cells gave the same losses", "✓ minilm-l6 lora r=8 [fused]"]),
        (_nudged, 1, ["differs without a known cause", "✗ minilm-l6 lora r=8 [fused]: losses differ from step 7",
                      "no known cause: same machine"]),
        (lambda n, r: _nudged(n, r).model_copy(update={"environment": recorded_run.environment(threads=4)}), 0,
         ["? minilm-l6 lora r=8 [fused]: losses differ from step 7", "threads: 2, 4"]),
    ],
)  # fmt: skip
def test_report_compares_two_runs(
    first: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Change, code: int, expected: list[str]
) -> None:
    again = _again(tmp_path / "again", change)
    assert main(["report", str(first.path), str(again.path), "-o", str(tmp_path / "r.html")]) == code
    shown = capsys.readouterr().out
    assert [words for words in expected if words not in shown] == []


def test_report_of_runs_that_share_no_cell_compared_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [recorded_run.write_run(tmp_path / n, run=n, only=[n]) for n in ("head", "full")]
    assert main(["report", *(str(r.path) for r in runs), "-o", str(tmp_path / "r.html")]) == 5
    assert "no Cell has two ok Records" in capsys.readouterr().out
    assert main(["report", str(runs[0].path), "-o", str(tmp_path / "r.html")]) == 0
    assert "reproducibility" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_shows_what_differs_and_why(first: Run, tmp_path: Path) -> None:
    unequal = _again(tmp_path / "unequal", _nudged)
    assert view.build([analyse(first)])["reproducibility"] is None
    runs = [first, unequal]
    again = reproducibility.possible_reruns(runs)
    section = view.build(analyse_all(runs), again)["reproducibility"]
    assert section["word"] == "fail"
    assert [r["losses"] for r in section["rows"] if r["tone"] == "bad"] == ["differ from step 7"]
    assert "no known cause: same machine" in html.render(analyse_all(runs), again)


def test_cells_measured_once_are_counted(first: Run, tmp_path: Path) -> None:
    part = recorded_run.write_run(tmp_path / "part", run="part", only=["fused", "head"])
    assert (
        "8 others have no second ok Record"
        in reruns.section([first, part], reproducibility.reruns([first, part]))["sentence"]
    )
