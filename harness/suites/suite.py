"""A validated suite. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.assets.table import Source
from harness.suites.entry import SuiteEntry
from harness.suites.expand import Plan
from harness.suites.tasks import Task


@dataclass(frozen=True)
class Suite:
    """A suite without mistakes."""

    name: str
    title: str
    about: str
    path: Path
    sha256: str
    """SHA-256 of the file."""
    text: str
    """Content of the file."""
    entries: tuple[SuiteEntry, ...]
    plan: Plan
    sources: dict[str, Source]
    """Built-in sources and those of the suite, by name."""
    tasks: dict[str, Task]
    """The tasks of its entries, by name."""
