"""A process that takes implementations through their parity suites: `python -m harness.conformance.worker FD TASK`.

Writes one JSON line per event to the file descriptor FD: `begin` and `end` of a target, `case`, `tried`, `missing`, `done`.
What a plug-in prints to stdout goes to stderr.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

from harness.conformance.speaking import speaker


def main(fd: int, task: dict[str, Any]) -> None:
    """Try the targets of one implementation.

    task: implementation, targets as [kind, target], full, dtypes, points (the entry points that offer it).
    """
    with speaker(fd) as say:
        from harness.conformance import matrix
        from harness.registry import discover

        registry = discover(only=task["points"])
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
        say(done=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
