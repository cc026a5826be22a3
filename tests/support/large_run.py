"""A run folder with many Cells: recipes of eight methods at several ranks and learning rates, each with several seeds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count, islice, product
from pathlib import Path

from harness.records import store
from harness.records.cost import Checkpoint
from harness.records.record import Cell, Evaluation, Json, Record
from support import recorded_run

_METHODS = ("lora", "dora", "pissa", "qlora", "vera", "adalora", "galore")
_RANKS = (1, 2, 4, 8, 16, 32, 64)


def _recipes() -> Iterator[Cell]:
    """Yield Cells with seed 0 that differ in their method, rank and learning rate: first `full`, then all others."""
    like = recorded_run.cells()["fused"]
    yield recorded_run.cells()["full"]
    for pair in count():
        for method, rank, step in product(_METHODS, _RANKS, (2 * pair + 1, 2 * pair + 2)):
            training = like.training.model_copy(update={"lr": 1e-3 * step})
            config: dict[str, Json] = {"rank": rank, "alpha": 2 * rank, "targets": ["query", "value"]}
            yield like.model_copy(update={"method": method, "config": config, "training": training})


def write(folder: Path, recipes: int, seeds: int, items: int = 500) -> store.Run:
    """Write a finished run with `recipes` times `seeds` Cells, and return the run as read from the folder."""
    evaluation = Evaluation(items=items)
    cells = [
        cell.model_copy(update={"seed": seed, "evaluation": evaluation})
        for cell in islice(_recipes(), recipes)
        for seed in range(seeds)
    ]
    return recorded_run.write_run(
        folder, run="large", only=["head"], change=lambda *_: None, cells=cells, extra=list(map(_record, cells))
    )


def _record(cell: Cell) -> Record:
    """Return the Record of a Cell. Its accuracy is close to that of all others, and its file has a size."""
    made = recorded_run.record("full" if cell.method == "full" else "fused", cell, cell_id=cell.cell_id)
    share = 0.75 + random.Random(cell.cell_id).uniform(-0.02, 0.02)
    scored = recorded_run.with_accuracy(made, share)
    assert scored.measurements is not None
    size = Checkpoint(adapter_file_B=4 * scored.measurements.parameters.trainable, head_B=3080, model_B=90_000_000)
    return scored.model_copy(update={"measurements": scored.measurements.model_copy(update={"checkpoint": size})})
