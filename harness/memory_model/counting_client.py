"""Send requests to a child process, which counts bytes or takes steps on fake tensors. Only the child imports torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.process.supervisor import python_module
from harness.records.files import whole_lines

TIMEOUT_S = 600.0
"""Time limit for all requests together, in seconds."""


def run_requests(requests: Sequence[Mapping[str, Any]]) -> list[Any] | str:
    """Send all requests to one child process. Return the list of its answers, or the reason why the process failed.

    `harness.memory_model.messages` has the types of requests and answers. Answers are in the order of the requests. If
    time runs out, the answers to the last requests are missing.
    """
    if not requests:
        return []
    with tempfile.TemporaryDirectory() as folder:
        file, answered = Path(folder) / "requests.json", Path(folder) / "answers"  # too long for a command line
        file.write_text(json.dumps(requests), encoding="utf-8")
        arguments = [str(file), str(answered)]
        with python_module("harness.memory_model.counting_worker", arguments, {"HF_HUB_OFFLINE": "1"}) as child:
            code = child.wait(TIMEOUT_S)
        answers = [json.loads(line) for line in whole_lines(answered)]
    if code is None and len(answers) < sum("cell" not in one for one in requests):
        return f"counting took more than {TIMEOUT_S:.0f} s"
    if code:
        last = child.output.strip().splitlines()
        return f"the counting process exited with {code}: {last[-1] if last else 'no output'}"
    return answers
