"""Worker process that loads plug-ins and reports what they offer.

The command is `python -m harness.conformance.execution.discovery_worker FD LINE TASK`. TASK is `{"points": [...]}` with
the names of entry points. The worker writes the events of `worker_protocol` to the file descriptor FD. The worker dies
when the other end of the pipe LINE closes. If a plug-in prints to stdout, the output goes to stderr. The worker imports
torch only if a plug-in does.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from harness.conformance.execution.worker_protocol import Offered, PointBegun, send
from harness.methods.registry import Implementation, discover
from harness.process.event_pipe import event_writer


def main(fd: int, line: int, points: list[str]) -> None:
    """Load the entry points with these names, and report the Implementations that they offer."""
    with event_writer(fd, line) as emit:
        registry = discover(only=points, begin=lambda point: send(emit, PointBegun(begin=point)))
        names = [field.name for field in dataclasses.fields(Implementation) if field.name != "function"]
        offered = [{name: getattr(one, name) for name in names} for one in registry.implementations]
        send(emit, Offered(offered=offered, broken=registry.broken))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])["points"])
