"""Work of the harness for each Cell beyond the method's own, counted over many Cells of a stub worker."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from harness.console import print_lines
from harness.records import store
from harness.runner.executors.local import Local
from support import stub_attempts

_COUNTED = {"open": "files opened", "subprocess.Popen": "processes started", "os.scandir": "folders listed"}
_counts: Counter[str] = Counter()
_counting = False


def _hook(event: str, _: object) -> None:
    if _counting and event in _COUNTED:
        _counts[event] += 1


def _count(folder: Path, cells: int) -> tuple[Counter[str], int]:
    """Run so many Cells. Return what this process did for them, and by how many bytes its Python objects grew."""
    global _counting
    run = stub_attempts.Stubbed(folder, cells)
    command, ended = run.command(), 0
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    _counts.clear()
    _counting = True
    try:
        last = run.folder.last_attempts()
        for record in Local(1, command).run(run.works(last=last), run.terms, _Nobody()):
            ended += 1
            del record
    finally:
        _counting = False
    counted = Counter(_counts)
    gc.collect()
    assert ended == cells
    assert len(store.read_run(run.folder.path).records) == cells
    return counted, tracemalloc.get_traced_memory()[0] - before


class _Nobody:
    def begin(self, cell: object) -> None: ...
    def event(self, cell: object, event: object) -> None: ...
    def tick(self) -> None: ...


@pytest.mark.nightly
@pytest.mark.slow
def test_each_cell_costs_the_runner_the_same_and_leaves_nothing_in_memory(tmp_path: Path) -> None:
    sys.addaudithook(_hook)
    tracemalloc.start()
    try:
        _count(tmp_path / "first", 5)  # imports and caches
        few, few_B = _count(tmp_path / "few", 50)
        many, many_B = _count(tmp_path / "many", 200)
    finally:
        tracemalloc.stop()
    per_cell = {what: (many[event] - few[event]) / 150 for event, what in _COUNTED.items()}
    print_lines([f"{what} per Cell: {number:g}" for what, number in per_cell.items()])
    print_lines([f"bytes kept per Cell: {(many_B - few_B) / 150:.0f}"])
    assert per_cell["processes started"] == 1
    assert {what: number for what, number in per_cell.items() if number != int(number)} == {}
    assert many["os.scandir"] == few["os.scandir"]
    record_B = min(path.stat().st_size for path in tmp_path.glob("many/run/cells/*.json"))
    assert many_B - few_B < 150 * record_B  # no Record stays in memory
