"""Record how long tests take: `python tests/support/durations.py TIER=JUNIT.xml ...` updates tests/durations.json.

pytest writes the JUnit files, e.g. with `python -m pytest -m e2e --junitxml=e2e.xml`, on an otherwise idle machine.
"""

from __future__ import annotations

import json
import os
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "durations.json"
SLOWEST = 10


def read(report: Path) -> dict[str, Any]:
    """Return the wall time of a pytest run, the time of each test file, and the slowest tests, in seconds."""
    (suite,) = ET.parse(report).getroot().iter("testsuite")
    files: dict[str, float] = defaultdict(float)
    tests: dict[str, float] = {}
    for case in suite.iter("testcase"):
        file = case.attrib["classname"].replace(".", "/") + ".py"
        files[file] += float(case.attrib["time"])
        tests[f"{file}::{case.attrib['name']}"] = float(case.attrib["time"])
    slowest = sorted(tests, key=lambda test: -tests[test])[:SLOWEST]
    return {
        "cores": os.cpu_count(),
        "tests": len(tests),
        "wall_s": round(float(suite.attrib["time"])),
        "slowest_s": {test: round(tests[test], 1) for test in slowest},
        "files_s": {file: round(seconds, 1) for file, seconds in sorted(files.items())},
    }


def main(arguments: list[str]) -> None:
    recorded = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for argument in arguments:
        tier, _, report = argument.partition("=")
        recorded[tier] = read(Path(report))
    FILE.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
