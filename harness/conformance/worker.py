"""A process that takes implementations through their parity suites: `python -m harness.conformance.worker FD TASK`.

Writes one JSON line per event to the file descriptor FD: `begin` and `end` of a target, `case`, `tried`, `missing`.
What a plug-in prints to stdout goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from typing import Any


def main(fd: int, task: dict[str, Any]) -> None:
    """Try the targets of one implementation. task: implementation, targets as [kind, target], full, dtypes."""
    os.dup2(2, 1)  # also what a C library prints
    from harness.conformance import matrix
    from harness.registry import discover

    with os.fdopen(fd, "w", encoding="utf-8") as events:

        def say(**event: Any) -> None:
            events.write(json.dumps(event) + "\n")
            events.flush()

        registry = discover()
        for kind, target in task["targets"]:
            implementation = registry.find(kind, target, task["implementation"])
            say(begin=[kind, target])
            missing = ""
            for module in implementation.requires:
                try:
                    import_module(module)
                except ImportError as error:
                    missing = f"needs {module}, which cannot be imported: {error}"
            if missing:
                say(missing=missing)
            else:
                for tried in matrix.run(
                    implementation, full=task["full"], dtypes=tuple(task["dtypes"]), begin=lambda case: say(case=case)
                ):
                    say(tried=tried.model_dump(mode="json"))
            say(end=[kind, target])


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
