"""A process that loads plug-ins and says what they offer: `python -m harness.conformance.execution.discovery_worker FD LINE {"points": [..]}`.

Writes one JSON line per event to the file descriptor FD: `begin` of an entry point, then `offered` and `broken`, `done`.
What a plug-in prints to stdout goes to stderr. No torch, unless a plug-in imports it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from harness.methods.registry import Implementation, discover
from harness.process.event_pipe import event_writer


def main(fd: int, line: int, words: dict[str, Any]) -> None:
    """Load the entry points of these names."""
    with event_writer(fd, line) as emit:
        registry = discover(only=words["points"], begin=lambda point: emit(begin=point))
        emit(offered=[_data(one) for one in registry.implementations], broken=registry.broken)


def _data(one: Implementation) -> dict[str, Any]:
    return {f.name: getattr(one, f.name) for f in dataclasses.fields(one) if f.name != "function"}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
