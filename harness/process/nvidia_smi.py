"""Query nvidia-smi, and return its output as lines or as fields. Needs no library."""

from __future__ import annotations

import shutil
import subprocess

from harness.errors import HarnessError

_PATIENCE_S = 20.0
"""Time limit for an answer in seconds. It is long, because an idle driver first wakes up every GPU."""


def lines(query: str, units: bool = True) -> list[str]:
    """Return the lines that `nvidia-smi --query-QUERY` prints, one per GPU or process.

    If nvidia-smi is not installed, return no lines. units: whether each number has a unit. Raises HarnessError if
    nvidia-smi does not answer.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-{query}", f"--format=csv,noheader{'' if units else ',nounits'}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        hint = "see whether `nvidia-smi` works, or use --device cpu"
        raise HarnessError(f"nvidia-smi does not answer: {error}", where="the GPUs", hint=hint) from error
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def rows(query: str) -> list[list[str]]:
    """Return the lines of `--query-QUERY` as lists of fields. Numbers have no units.

    Only the last field may contain commas. Lines with fewer fields than QUERY are left out. Raises HarnessError if
    nvidia-smi does not answer.
    """
    commas = query.count(",")
    found = ([field.strip() for field in line.split(",", commas)] for line in lines(query, units=False))
    return [row for row in found if len(row) == commas + 1]
