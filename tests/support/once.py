"""What one of all workers of pytest-xdist makes for the others: they may share the tests of a file."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the temporary folder of the whole session."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
    """Return a folder of the session, and what `make` returned for it, which JSON can hold; the first caller makes it."""
    folder = shared_folder(factory) / name
    made = folder / "made.json"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            folder.mkdir()
            made.write_text(json.dumps(make(folder)), encoding="utf-8")
    return folder, json.loads(made.read_text(encoding="utf-8"))
