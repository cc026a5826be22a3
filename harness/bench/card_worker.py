"""Worker process that measures a card: `python -m harness.bench.card_worker FD LINE TASK`.

TASK is a dict in JSON: `what` is `ceilings` or `crossovers`, `device` is `cpu` or `cuda`. The events: `card` has the name
of the card, `row` one number, `table` the table of crossovers, `failed` and `traceback` the error that ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

from harness.methods.registry import format_error
from harness.process.event_pipe import Emit, event_writer


def main(fd: int, line: int, task: dict[str, Any]) -> None:
    """Measure what the task names, and write the events."""
    if task["device"] == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # the only way in which a CPU runs the kernels
    with event_writer(fd, line) as emit:
        try:
            _run(task, emit)
        except BaseException as error:
            emit(failed=format_error(error), traceback="".join(traceback.format_exception(error)))
            raise


def _run(task: dict[str, Any], emit: Emit) -> None:
    import torch

    from harness.bench import ceilings, crossovers
    from harness.bench.timing import Clock
    from harness.kernels import crossover

    device = torch.device(task["device"])
    card = crossover.card(device)
    emit(card=card)
    clock = Clock(device)
    if task["what"] == "ceilings":
        for name, value, unit in ceilings.of_card(clock):
            emit(row={"name": name, "value": value, "unit": unit})
        return
    rows = []
    for row in crossovers.measure(clock):
        rows.append(row)
        emit(row=row)
    measured_by = {"torch": torch.__version__, "triton": crossovers.triton_version()}
    emit(table={"file": crossover.file_name(card or "cpu"), "card": card, **measured_by, **crossovers.table(rows)})


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
