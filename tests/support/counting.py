"""Answers of the child process that counts models and takes dry steps, computed in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from harness.memory_model import counting_worker


def run_requests(requests: Sequence[Any]) -> list[Any]:
    """Stand in for `counting_client.run_requests`, which starts a process that imports torch. Answers pass through JSON."""
    return [json.loads(json.dumps(counting_worker.answer(one))) for one in requests]
