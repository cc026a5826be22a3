"""The user's cache folder of this project."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def root() -> Path:
    """Return the cache folder, without creating it.

    The environment variable PEFT_HARNESS_CACHE sets it. The default is `peft-harness` in the user's cache folder.
    """
    if chosen := os.environ.get("PEFT_HARNESS_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "peft-harness"
    # The XDG specification says that relative paths are ignored.
    user = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (user if user.is_absolute() else Path.home() / ".cache") / "peft-harness"
