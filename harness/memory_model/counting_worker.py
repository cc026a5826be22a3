"""Answer the requests of a parent process.

The command is `python -m harness.memory_model.counting_worker LIFELINE REQUESTS ANSWERS`. LIFELINE is the descriptor of
a pipe that closes when the parent ends. REQUESTS is a file with a JSON list of requests (see
`harness.memory_model.messages`). The answers are written to the file ANSWERS in the same order, one JSON value per
line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.memory_model import counting, isolated_step
from harness.memory_model.messages import ModelCount, StepAnswer
from harness.process import short_worker
from harness.process.lifeline import die_with_parent
from harness.records import collection

_UNUSED = ("scipy", "torchao")
"""Packages that transformers imports if they are installed, although no count needs them. Their imports take longer than the
count of a Method."""
_OF_CHECKPOINTS = ("accelerate",)
"""Packages that only a count from a checkpoint needs. transformers uses them to load a checkpoint without its weights."""
_WITHOUT_LIBRARY = ("reference", "fused")
"""Implementations that import none of these packages. A library may need any of them, e.g. peft needs accelerate."""


def main(argv: list[str]) -> None:
    """Answer every request of the file named on the command line."""
    if hasattr(os, "fork"):
        die_with_parent(int(argv[1]))
    requests = json.loads(Path(argv[2]).read_bytes())
    short_worker.hide(_unneeded(requests))
    with collection.paused(), Path(argv[3]).open("w", encoding="utf-8") as answers:
        for request in requests:
            print(json.dumps(_answer(request)), file=answers, flush=True)


def _unneeded(requests: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the names of the packages that no request needs."""
    if any("cell" in one and one["cell"]["implementation"] not in _WITHOUT_LIBRARY for one in requests):
        return ()
    return _UNUSED if any(one.get("checkpoint") for one in requests) else (*_UNUSED, *_OF_CHECKPOINTS)


def _answer(request: Any) -> ModelCount | StepAnswer:
    return isolated_step.answer(request) if "cell" in request else counting.answer(request)


if __name__ == "__main__":
    main(sys.argv)
    short_worker.end()
