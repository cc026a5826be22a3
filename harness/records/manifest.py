"""Models of run.json, the request of a run, and of footer.json, the end of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from harness.records.record import SCHEMA, Cell, Environment, FrozenModel, Seconds


class Comparison(FrozenModel):
    """A comparison of two groups of Cells that the suite declares. `harness.analysis` judges it."""

    kind: Literal["better", "same-losses"]
    """`better`: the accuracy interval of `left` lies above that of `right`. `same-losses`: the losses of each Cell of
    `left` follow those of a float64 Cell of `right`, up to rounding errors."""
    left: list[str]
    """cell_ids of the Cells on the left side of the comparison."""
    right: list[str]
    """cell_ids of the Cells on the right side of the comparison."""
    says: str
    """Statement that is judged, as a sentence."""


class Tuning(FrozenModel):
    """A declared search for a learning rate.

    The Cells of `sweep` differ from those of `cells` in the learning rate, the seed and the test items. The Cells of
    `sweep` are not ranked; they show the effect of the learning rate.
    """

    entry: str
    """Id of the entry in the suite."""
    cells: list[str]
    """cell_ids of the tuned Cells."""
    sweep: list[str]
    """cell_ids of the Cells of the search, one per learning rate."""


class Manifest(FrozenModel):
    """Content of run.json, written before anything runs. It lists the expected Cells, so that a missing one is visible."""

    schema_: int = Field(default=SCHEMA, alias="schema")
    run: str
    """Id of the run."""
    suite: str
    """Name of the suite."""
    title: str = ""
    """Title of the suite."""
    about: str = ""
    """Description of the suite."""
    suite_file: str
    """Name of the suite's file."""
    suite_sha256: str
    """Hash of the suite's file."""
    suite_text: str = ""
    """Content of the suite's file, which may change later. Empty in older runs."""
    comparisons: list[Comparison] = Field(default=[])
    """Comparisons of Cells that the suite declares."""
    tuning: list[Tuning] = Field(default=[])
    """Searches for learning rates."""
    cells: list[Cell]
    """Expected Cells."""
    environment: Environment
    """Machine and software of the runner, the process that starts the workers."""
    argv: list[str]
    """Command line that started the run."""
    started: str
    """Start of the run in UTC, ISO 8601."""
    harness_version: str
    """Version of peft-harness."""


class Footer(FrozenModel):
    """Content of footer.json, which is written last. A run without this file is incomplete."""

    schema_: int = Field(default=SCHEMA, alias="schema")
    run: str
    """Id of the run."""
    ended: str
    """End of the run in UTC, ISO 8601."""
    how: Literal["finished", "interrupted", "failed"]
    """Way in which the run ended."""
    counts: dict[str, int]
    """Number of Records of each status. Only the last attempt at each Cell is included."""
    missing: list[str]
    """cell_ids of the expected Cells without any Record."""
    kept: int = 0
    """Number of Cells whose Record is from before the run was resumed. The fields in seconds cover only the last
    invocation."""
    seconds_total: Seconds
    """Wall time of the last invocation."""
    seconds_in_cells: Seconds
    """Seconds in which at least one Cell was running."""
    seconds_outside: dict[str, float]
    """Seconds in which no Cell was running, by activity: `startup`, `fetch`, `imports` (of the fork servers of the
    workers), `scheduling`. The HTML report is made after the footer, in about half a second."""
    sha256: dict[str, str] = Field(default={})
    """Hashes of run.json and of each Record, by path in the run's folder, so that later changes are detected.
    Empty in older runs."""
