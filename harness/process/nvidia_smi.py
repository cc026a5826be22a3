"""Query nvidia-smi: lines or fields. No library is needed."""

from __future__ import annotations

import shutil
import subprocess

from harness.errors import HarnessError

_PATIENCE_S = 20.0
"""If no program keeps the driver awake, it wakes up every card before it answers."""


def lines(query: str, units: bool = True) -> list[str]:
    """Return the output of `--query-QUERY`, a line per card or process; empty if nvidia-smi is not installed.

    units: add its unit to each number. Raises HarnessError if nvidia-smi does not answer.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-{query}", f"--format=csv,noheader{'' if units else ',nounits'}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise HarnessError(
            f"nvidia-smi does not answer: {error}",
            where="the GPUs",
            hint="see whether `nvidia-smi` works, or use --device cpu",
        ) from error
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def rows(query: str) -> list[list[str]]:
    """Return the output of `--query-QUERY` in fields, numbers without units. The third field, a name, may contain commas."""
    width = query.count(",") + 1
    found = (_fields(line, width) for line in lines(query, units=False))
    return [row for row in found if len(row) == width]


def _fields(line: str, width: int) -> list[str]:
    words = [word.strip() for word in line.split(",")]
    after = 3 + max(0, len(words) - width)
    return [*words[:2], ",".join(words[2:after]), *words[after:]] if len(words) >= width else words
