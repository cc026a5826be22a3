"""Run git, and read the name of its user."""

from __future__ import annotations

import subprocess
from pathlib import Path

from harness.errors import HarnessError

_PATIENCE_S = 600.0
"""Seconds after which git is killed. A large revision may take minutes to check out on a network drive."""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in a folder, and return the completed process with its output.

    Raises HarnessError if git is missing or does not end in time.
    """
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_S)
    except OSError as error:
        raise HarnessError(f"git cannot be run: {error}", where=str(folder), hint="install git") from error
    except subprocess.TimeoutExpired as error:
        what = f"`git {' '.join(arguments)}` did not end within {_PATIENCE_S:.0f} s"
        raise HarnessError(what, where=str(folder), hint="run it there yourself to see what it waits for") from error


def user() -> str:
    """Return git's user as `NAME <EMAIL>`, or only the name. If git has no user.name here, return an empty string."""
    try:
        name, email = (run(Path(), "config", key).stdout.strip() for key in ("user.name", "user.email"))
    except HarnessError:
        return ""
    return f"{name} <{email}>" if name and email else name
