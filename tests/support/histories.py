"""Histories for tests, in the format of `history add`, with values that each test chooses or draws at random."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from harness.analysis import tracked_metrics
from harness.cli import main
from harness.records.record import Cell
from harness.regression.history import night_files
from harness.regression.history.night_files import AttemptRow, Night, RunHeader
from support import recorded_run

PLACE = {"device": "cpu", "CPU": "Example 4-core", "torch": "2.13.0", "threads": "2"}
SHAS = ("a" * 40, "b" * 40)
Values = Callable[[str, int, int], Mapping[str, float] | str]


def night(index: int) -> str:
    """Return the date of a night, counted from 0."""
    return (date(2026, 1, 1) + timedelta(days=index)).isoformat()


def many(count: int) -> dict[str, Cell]:
    """Return `count` Cells of one recipe, by cell_id."""
    made = (recorded_run.cells(seed)["fused"] for seed in range(count))
    return {cell.cell_id: cell for cell in made}


def write(
    folder: Path,
    cells: Mapping[str, Cell],
    values: Values,
    *,
    nights: int,
    passes: int = 3,
    place: Callable[[int], dict[str, str]] = lambda _: PLACE,
    revision: Callable[[int], str] = lambda _: SHAS[0],
) -> Path:
    """Write a history.

    values: returns the values of a pass, or its status if it did not end ok; called with cell_id, night and pass.
    """
    folder.mkdir(parents=True, exist_ok=True)
    night_files.write_cells(folder, {i: cell.model_dump(mode="json") for i, cell in cells.items()})
    for index in range(nights):
        where = place(index)
        on = tracked_metrics.place_id(where)
        runs = {f"run-{index}-{p}": head(index, p, revision(index)) for p in range(passes)}
        rows: list[AttemptRow] = []
        for p, run in enumerate(runs):
            for cell_id in cells:
                got = values(cell_id, index, p)
                what = {"status": got} if isinstance(got, str) else {"values": dict(got)}
                rows.append({"cell": cell_id, "run": run, "attempt": 1, "on": on} | what)
        night_files.write_night(folder, Night(night(index), runs, {on: where}, rows))
    return folder


def head(index: int, number: int, revision: str) -> RunHeader:
    return {
        "run": f"run-{index}-{number}", "started": f"{night(index)}T0{number}:00:00Z", "suite": "quick",
        "code_version": f"code-{revision[:4]}", "git_sha": revision, "git_dirty": False,
        "software": {"peft": "0.19.0" if revision == SHAS[0] else "0.20.0", "torch": "2.13.0"},
    }  # fmt: skip


def noisy(seed: int, level: Callable[[str, int], float] = lambda *_: 1.0, sd: float = 0.005) -> Values:
    """Return a function for `write`: noisy step times of 0.1 s, multiplied by the `level` of the Cell and night."""
    rng = random.Random(seed)

    def values(cell: str, index: int, _: int) -> dict[str, Any]:
        return {"step_s": 0.1 * level(cell, index) * (1 + rng.gauss(0, sd))}

    return values


CELLS = many(8)
FIRST = next(iter(CELLS))
SLOWER = 9
"""The night on which FIRST becomes slower."""


def regressed(cell: str, index: int) -> float:
    return 1.06 if cell == FIRST and index >= SLOWER else 1.0


def detect(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["history", "detect", "--dir", str(folder), "--json", *more])
    return code, json.loads(capsys.readouterr().out)
