"""A validated suite, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.assets.table import Source
from harness.suites.entry import SuiteEntry
from harness.suites.expand import Plan
from harness.suites.tasks import Task


@dataclass(frozen=True)
class Suite:
    """A suite that has passed all checks."""

    name: str
    title: str
    about: str
    path: Path
    sha256: str
    """SHA-256 of the suite's file."""
    text: str
    """Content of the suite's file."""
    entries: tuple[SuiteEntry, ...]
    plan: Plan
    sources: dict[str, Source]
    """Name -> source of a model or data set. The sources are the built-in ones and those that the suite adds."""
    tasks: dict[str, Task]
    """Name -> task, for each task that an entry names."""
