"""Count for one parent process: `python -m harness.memory_model.counting_worker LIFELINE FILE`.

FILE holds a JSON list of requests. Each answer is one line of JSON on stdout, in the order of the requests.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from harness.memory_model import counting, isolated_step
from harness.process.lifeline import die_with_parent


def main(argv: list[str]) -> None:
    """Answer every request of the file named on the command line."""
    if hasattr(os, "fork"):
        die_with_parent(int(argv[1]))
    for request in json.loads(Path(argv[2]).read_bytes()):
        if "largest" in request:
            answer = isolated_step.search_largest
        elif "cell" in request:
            answer = isolated_step.answer
        else:
            answer = counting.answer
        print(json.dumps(answer(request)), flush=True)


if __name__ == "__main__":
    main(sys.argv)
