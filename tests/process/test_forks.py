"""Forks: values come back, and a fork that fails, hangs or takes too much memory is one result and no more."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

forks = pytest.importorskip("harness.process.forks", reason="there are no forks on Windows")
LIMITS = forks.Limits(cpu_s=1, memory_b=1 << 30)


def act(task: str) -> Any:
    match task:
        case "raises":
            raise ValueError("no such rank")
        case "spins":
            while True:
                pass
        case "exits":
            os._exit(3)
        case "grows":
            return len(bytearray(1 << 34))
        case "odd":
            return {1, 2}
    print("dropped")
    return {"task": task}


@pytest.mark.slow
def test_every_task_ends_with_a_value_or_a_reason(capfd: pytest.CaptureFixture[str]) -> None:
    tasks = ["one", "raises", "spins", "exits", "odd", "two", *(["grows"] if sys.platform == "linux" else [])]
    ends = {one.task: (one.returned, one.died or one.error) for one in forks.run(tasks, act, 2, LIMITS)}
    assert ends["one"] == ({"task": "one"}, "")
    assert ends["two"] == ({"task": "two"}, "")
    assert ends["raises"] == (None, "ValueError: no such rank")
    assert all(not (one[0] and one[1]) for one in ends.values())
    assert ends["spins"] == (None, "SIGXCPU")
    assert ends["exits"] == (None, "exit code 3")
    assert "JSON serializable" in ends["odd"][1]
    assert ends.get("grows", (None, "MemoryError"))[1].startswith("MemoryError")
    assert capfd.readouterr().out == ""


def test_a_caller_that_stops_leaves_no_fork() -> None:
    ends = forks.run(["one", "spins", "spins"], act, 2, forks.Limits(cpu_s=60, memory_b=1 << 30))
    next(ends)
    ends.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
