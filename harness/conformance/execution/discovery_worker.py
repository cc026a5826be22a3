"""Worker that loads plug-ins and reports what they offer.

`python -m harness.conformance.execution.discovery_worker FD LINE TASK`, where TASK is `{"points": [...]}`, the names of
entry points. It writes the events of `worker_protocol` to the file descriptor FD; what a plug-in prints to stdout goes to
stderr. No torch, unless a plug-in imports it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from harness.conformance.execution.worker_protocol import Offered, PointBegun
from harness.methods.registry import Implementation, discover
from harness.process.event_pipe import event_writer


def main(fd: int, line: int, points: list[str]) -> None:
    """Load the entry points of these names."""
    with event_writer(fd, line) as emit:
        registry = discover(only=points, begin=lambda point: emit(**PointBegun(begin=point).model_dump()))
        there = [_data(one) for one in registry.implementations]
        emit(**Offered(offered=there, broken=registry.broken).model_dump(mode="json"))


def _data(one: Implementation) -> dict[str, Any]:
    return {f.name: getattr(one, f.name) for f in dataclasses.fields(one) if f.name != "function"}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])["points"])
