"""A validated suite: its entries, comparisons, sources and tasks. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.assets.table import Source
from harness.suites.entry import SuiteEntry
from harness.suites.tasks import Task


@dataclass(frozen=True)
class Compared:
    """A comparison as the suite writes it: `left` and `right` are ids of entries."""

    kind: Literal["better", "same-losses"]
    left: tuple[str, ...]
    right: tuple[str, ...]
    says: str


@dataclass(frozen=True)
class Suite:
    """A suite that can run.

    sha256, text: of its file. sources: the built-in table and the suite's own rows. tasks: those that its entries name.
    """

    name: str
    title: str
    about: str
    path: Path
    sha256: str
    text: str
    entries: tuple[SuiteEntry, ...]
    comparisons: tuple[Compared, ...]
    sources: dict[str, Source]
    tasks: dict[str, Task]
