"""Worker process that loads plug-ins and reports what they offer.

The command is `python -m harness.conformance.execution.discovery_worker FD LINE TASK`. TASK is `{"without": [...]}`
with the names of entry points to leave out. The worker writes the events of `worker_protocol` to the file descriptor
FD. LINE is the descriptor of a pipe: when its other end closes, the worker dies. If a plug-in prints to stdout, the
output goes to stderr. The worker imports torch only if a plug-in does.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from harness.conformance.execution.worker_protocol import Offered, PointBegun, send
from harness.methods.registry import Implementation, discover, entry_points_by_name
from harness.process.event_pipe import event_writer
from harness.records.environment import describe


def main(fd: int, line: int, without: list[str]) -> None:
    """Load all entry points except those in `without`, and report the Implementations that they offer."""
    with event_writer(fd, line) as emit:
        points = [name for name in entry_points_by_name() if name not in without]
        registry = discover(only=points, begin=lambda point: send(emit, PointBegun(begin=point)))
        names = [field.name for field in dataclasses.fields(Implementation) if field.name != "function"]
        offered = [{name: getattr(one, name) for name in names} for one in registry.implementations]
        send(emit, Offered(offered=offered, broken=registry.broken, environment=describe()))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])["without"])
