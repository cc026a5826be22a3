"""The command `history detect`: series that are no longer measured, and their acceptance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from harness.analysis import tracked_metrics
from harness.cli import main
from harness.errors import Exit
from harness.records.memory import ALLOCATED
from harness.regression.history import night_files
from support import histories, recorded_run
from support.histories import CELLS, FIRST, detect


def losing(what: str, cell: str = FIRST) -> histories.Values:
    """Return values of ten nights; on the ninth, a Cell lacks some."""

    def values(of: str, index: int, _: int) -> Mapping[str, float] | str:
        found = {"adapter_B": 1000.0, "accuracy": 0.8, "parameters": 10.0}
        if of != cell or index < 8:
            return found
        if what == "accuracy":
            del found["accuracy"]
        return "oom" if what == "oom" else found

    return values


def drop(folder: Path, cell: str, since: int, until: int) -> None:
    """Remove a Cell from some nights, like a suite that no longer has it."""
    for index in range(since, until):
        night = night_files.read_night(folder / f"{histories.night(index)}.jsonl", {})
        assert night is not None
        night.rows = [row for row in night.rows if row["cell"] != cell]
        night_files.write_night(folder, night)


@pytest.mark.parametrize(
    ("what", "metric", "reported"),
    [
        ("cell", "*", f"gone: no Record of these Cells on {histories.night(9)}, last on {histories.night(7)}, place "),
        (
            "accuracy",
            "accuracy",
            f"gone: accuracy of these Cells on {histories.night(9)}, last on {histories.night(7)}, place ",
        ),
        ("oom", "*", f"oom on {histories.night(9)}, ok on {histories.night(7)}"),
    ],
)
def test_a_missing_series_is_named_until_it_is_accepted_or_back(
    what: str, metric: str, reported: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = histories.write(tmp_path / "h", CELLS, losing(what), nights=10)
    if what == "cell":
        drop(folder, FIRST, 8, 10)
    command = ["history", "detect", "--dir", str(folder)]
    assert main(command) == Exit.INFRASTRUCTURE
    lines = capsys.readouterr().out.splitlines()
    (at,) = [number for number, line in enumerate(lines) if reported in line]
    assert f"({FIRST})" in lines[at if what == "oom" else at + 1]
    other = list(CELLS)[1]
    assert main([*command, "--cell", other]) == Exit.PASS
    capsys.readouterr()
    # A reset on the night of the last value accepts no later loss.
    reset = ["history", "reset", FIRST, metric, "--reason", "dropped", "--author", "A", "--dir", str(folder), "--night"]
    assert main([*reset, histories.night(7)]) == Exit.PASS
    assert main(command) == Exit.INFRASTRUCTURE
    assert main([*reset, histories.night(8)]) == Exit.PASS
    code, found = detect(folder, capsys)
    assert (code, found["stopped"], found["gone"]) == (Exit.PASS, [], [])


def test_a_cell_that_is_back_is_not_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = histories.write(tmp_path / "h", CELLS, losing("nothing"), nights=10)
    drop(folder, FIRST, 5, 9)
    assert detect(folder, capsys)[0] == Exit.PASS


def test_another_place_makes_no_series_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The last nights are another machine's, which has fewer Cells from its beginning on.
    newer = histories.PLACE | {"CPU": "Example 2-core"}
    folder = histories.write(
        tmp_path / "h", CELLS, losing("nothing"), nights=10, place=lambda i: newer if i >= 6 else histories.PLACE
    )
    drop(folder, FIRST, 6, 10)
    code, found = detect(folder, capsys)
    assert (code, found["gone"]) == (Exit.PASS, [])


def test_a_regression_outranks_a_missing_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = histories.write(
        tmp_path / "h", CELLS, lambda c, i, _: {"adapter_B": 1001 if c == FIRST and i else 1000}, nights=4
    )
    drop(folder, list(CELLS)[1], 3, 4)
    code, found = detect(folder, capsys)
    assert code == Exit.FAIL
    assert [(one["cell"], one["metrics"]) for one in found["gone"]] == [(list(CELLS)[1], ["adapter_B"])]


def test_a_cell_that_is_no_longer_measured_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = histories.noisy(7)
    folder = histories.write(
        tmp_path / "h", CELLS, lambda c, i, p: "oom" if c == FIRST and i == 9 else usual(c, i, p), nights=10
    )
    (stopped,) = detect(folder, capsys)[1]["stopped"]
    assert (stopped["cell"], stopped["status"], stopped["ok"]) == (FIRST, "oom", histories.night(8))


def test_the_counted_peak_may_be_missing_on_some_nights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is counted only where memory has room for a copy of the tensors that the step changes."""

    def values(cell: str, index: int, _: int) -> dict[str, float]:
        return {"adapter_B": 8} | ({} if cell == FIRST and index == 9 else {"counted_peak_B": 2**30})

    code, found = detect(histories.write(tmp_path / "h", CELLS, values, nights=10), capsys)
    assert (code, found["gone"]) == (Exit.PASS, [])


@pytest.mark.parametrize(("source", "saved"), [(ALLOCATED, False), ("resident, sampled", True)])
def test_a_gpu_peak_is_one_series(source: str, saved: bool) -> None:
    record = recorded_run.record("fused", recorded_run.cells()["fused"])
    assert record.measurements is not None
    memory = record.measurements.memory.model_copy(update={"counted_peak_B": 5, "source": source})
    measured = record.measurements.model_copy(update={"memory": memory})
    values = tracked_metrics.tracked(record.model_copy(update={"measurements": measured})).values
    assert ("counted_peak_B" in values, "training_peak_B" in values) == (saved, True)
