"""Run git, and read the name of its user."""

from __future__ import annotations

import subprocess
from pathlib import Path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in a folder and capture its output. Raises OSError if git is not installed."""
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)


def user() -> str:
    """Return git's user as `NAME <EMAIL>`, or only the name; an empty string if git has no user.name here."""
    try:
        name, email = (run(Path(), "config", key).stdout.strip() for key in ("user.name", "user.email"))
    except OSError:
        return ""
    return f"{name} <{email}>" if name and email else name
