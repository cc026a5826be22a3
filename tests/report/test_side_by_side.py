"""`report A B`: the common Cells of two runs side by side, judged by the rules of `gate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.analysis import run_facts
from harness.records.record import Record
from harness.report import html, side_by_side
from support import recorded_run


def _more_memory(name: str, record: Record) -> Record:
    """Let the saved adapter of one Cell grow, which is a finding at the first byte."""
    if name != "fused" or record.measurements is None:
        return record
    memory = record.measurements.memory
    grown = memory.model_copy(update={"adapter_B": (memory.adapter_B or 0) + 4096})
    return record.model_copy(update={"measurements": record.measurements.model_copy(update={"memory": grown})})


def _pair(tmp_path: Path, **second: Any) -> dict[str, Any]:
    runs = [recorded_run.write_run(tmp_path / "a", run="a"), recorded_run.write_run(tmp_path / "b", run="b", **second)]
    (found,) = side_by_side.section(run_facts.analyse_all(runs))
    return found


def test_equal_runs_have_no_finding(tmp_path: Path) -> None:
    found = _pair(tmp_path)
    assert [found["word"], found["findings"], found["around"]] == ["pass", [], []]
    assert found["sentence"] == "10 common Cells: no finding, by the rules of peft-harness gate."
    (group,) = found["table"]["groups"]
    fused = next(row for row in group["rows"] if row["name"].endswith("lora r=8 [fused]"))
    assert [field["text"] for field in fused["fields"][:6]] == ["81.0", "81.0", "+0.0", "396", "396", "+0.0"]


def test_a_growth_is_a_finding_with_both_values(tmp_path: Path) -> None:
    found = _pair(tmp_path, change=_more_memory)
    assert found["word"] == "fail"
    (finding,) = found["findings"]
    assert finding["name"].endswith("lora r=8 [fused]")
    assert finding["text"].startswith("adapter; ")
    assert " → " in finding["text"]


def test_cells_of_one_run_only_are_counted_and_are_no_finding(tmp_path: Path) -> None:
    found = _pair(tmp_path, only=["full", "head"])
    assert [found["word"], found["findings"]] == ["pass", []]
    assert found["sentence"].endswith("8 Cells only in the first run.")


def test_runs_without_a_common_cell_compare_nothing(tmp_path: Path) -> None:
    runs = [recorded_run.write_run(tmp_path / name, run=name, only=[name]) for name in ("full", "head")]
    (found,) = side_by_side.section(run_facts.analyse_all(runs))
    assert [found["word"], found["table"]] == ["not-run", None]


@pytest.mark.parametrize("runs", [1, 2])
def test_the_page_of_two_runs_has_the_comparison(tmp_path: Path, runs: int) -> None:
    read = [recorded_run.write_run(tmp_path / str(i), run=f"run-{i}", only=["full"]) for i in range(runs)]
    page = html.render(run_facts.analyse_all(read))
    assert ("run-1 against run-0" in page) is (runs == 2)
