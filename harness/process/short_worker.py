"""Start and end a short-lived process that imports torch, without the usual seconds of overhead."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable


def hide(packages: Iterable[str]) -> None:
    """Make packages look as if they were not installed. Call this before torch and transformers are imported.

    transformers imports some packages only because they are installed. Their imports take seconds.
    """
    for name in packages:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # the import system raises ImportError for None


def end() -> None:
    """End this process with code 0, and without Python's own exit, which takes half a second once torch is imported."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
