"""Poisoned memory: torch fills fresh buffers with NaN, or with the largest integer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from harness.conformance import process_settings

_SWITCH: Any = torch.utils.deterministic


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let torch fill every fresh buffer inside the context, so that code that reads unwritten memory gives wrong results.

    Restores torch's settings afterwards.
    """
    with process_settings.restored():
        process_settings.set_deterministic(True, warn_only=True)
        _SWITCH.fill_uninitialized_memory = True
        yield
