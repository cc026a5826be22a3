"""One child process, which has torch, counts and takes steps without data for all that is asked. No torch."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from harness.process.supervisor import python_module

TIMEOUT_S = 600.0


def run_requests(requests: list[dict[str, Any]]) -> list[dict[str, Any]] | str:
    """Let one child process count for all; return its answers in their order, or why there are none.

    A step without data may take long: where time runs out, there are fewer answers than requests, of all models at least.
    """
    if not requests:
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requests.json"  # the command line would hold few of them
        file.write_text(json.dumps(requests), encoding="utf-8")
        with python_module("harness.memory_model.counting_worker", [str(file)], {"HF_HUB_OFFLINE": "1"}) as child:
            code = child.wait(TIMEOUT_S)
    answers = [json.loads(line) for line in child.output.splitlines() if line.startswith("{")]
    if code is None and len(answers) < sum("cell" not in one for one in requests):
        return f"counting took more than {TIMEOUT_S:.0f} s"
    if code:
        last = child.output.strip().splitlines()
        return f"the process that counts ended with {code}: {last[-1] if last else 'it said nothing'}"
    return answers
