"""Worker process that measures a GPU ("card") or the CPU: `python -m harness.bench.card_worker FD LINE TASK`.

FD and LINE are file descriptors. The worker writes events as JSON lines to FD, and is killed when the other end of LINE
closes. TASK is a dict in JSON: `what` is `ceilings` or `crossovers`, `device` is `cpu` or `cuda`.

Each event has some of these keys: `card` (name of the card), `row` (one measurement), `table` (the card's table as
measured so far), `file` (file name of the table), `failed` and `traceback` (the error that ends the process).
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.methods.registry import format_error
from harness.process.event_pipe import EventWriter, event_writer

if TYPE_CHECKING:
    from harness.bench.timing import Clock


def main(fd: int, line: int, task: dict[str, Any]) -> None:
    """Run the measurements that `task` names, and write an event to `fd` after each."""
    if task["device"] == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # the only way in which a CPU runs the kernels
    with event_writer(fd, line) as emit:
        try:
            _run(task, emit)
        except BaseException as error:
            emit(failed=format_error(error), traceback="".join(traceback.format_exception(error)))
            raise


def _run(task: dict[str, Any], emit: EventWriter) -> None:
    import torch

    from harness.bench import ceilings
    from harness.bench.timing import Clock
    from harness.kernels.card_tables import card

    device = torch.device(task["device"])
    emit(card=card(device))
    clock = Clock(device)
    if task["what"] == "ceilings":
        for name, value, unit in ceilings.of_card(clock):
            emit(row={"name": name, "value": value, "unit": unit})
    else:
        _measure_crossovers(clock, emit)


def _measure_crossovers(clock: Clock, emit: EventWriter) -> None:
    """Measure the tiles, then the crossovers with these tiles, always in the same order.

    The kernels ignore the tables of earlier measurements. The table is sent whenever the tiles of a dtype or the
    crossovers of an Operation are complete.
    """
    import torch
    import triton

    from harness.bench import crossovers, tiles
    from harness.kernels.card_tables import TILES, Entry, card, file_name, only_tables
    from harness.kernels.triton.support import low_rank_gemm, tuned_tiles

    random.seed(0)  # decides which side of the first pair comes first
    name = card(clock.device)
    table: dict[str, Any] = {"card": name, "torch": torch.__version__, "triton": triton.__version__}

    def measured(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        found = []
        for row in rows:
            emit(row=row)
            found.append(row)
        return found

    stamp = tuned_tiles.stamp(low_rank_gemm.KERNEL, clock.device)
    rows: list[dict[str, Any]] = []
    with only_tables():
        for _, of_dtype in groupby(tiles.measure(clock), key=itemgetter("dtype")):
            rows += measured(of_dtype)
            table[TILES] = tiles.section(rows, stamp)
            emit(file=file_name(name), table=table)
    with only_tables(Entry(Path(file_name(name)), "", {TILES: table[TILES]})):
        for operation in crossovers.CROSSOVER_MEASUREMENTS:
            table[operation] = crossovers.table(operation, measured(crossovers.measure(operation, clock)))
            emit(file=file_name(name), table=table)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
