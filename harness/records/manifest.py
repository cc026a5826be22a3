"""What the harness writes down of a run: what was asked before it, and how it ended. Its Cells are in `records`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from harness.records.record import SCHEMA, Cell, Environment, FrozenModel, Seconds


class Comparison(FrozenModel):
    """A question that the suite asks of its Records; `analysis` decides it."""

    kind: Literal["better", "same-losses"]
    """`better`: the accuracy interval of `left` lies above that of `right`. `same-losses`: every Cell of `left` follows
    the float64 trajectory of `right` as closely as the noise floor allows."""
    left: list[str]
    """cell_ids."""
    right: list[str]
    says: str
    """The sentence that is judged."""


class Tuning(FrozenModel):
    """A declared search: the Cells of `sweep` differ from those of `cells` in the learning rate, the seed and the test
    items, and are not ranked; they show how much the choice of `cells` matters."""

    entry: str
    """The suite's id of the entry."""
    cells: list[str]
    """cell_ids of what was tuned."""
    sweep: list[str]
    """cell_ids, a Cell per learning rate that was tried."""


class Manifest(FrozenModel):
    """run.json: written before anything runs. Says which Cells are expected, so that a missing one is visible."""

    schema_: int = Field(default=SCHEMA, alias="schema")
    run: str
    suite: str
    title: str = ""
    about: str = ""
    suite_file: str
    suite_sha256: str
    suite_text: str = ""
    """The YAML as it was read: its file may be anywhere, and be another one later. Empty in runs from before it was kept."""
    comparisons: list[Comparison] = Field(default=[])
    tuning: list[Tuning] = Field(default=[])
    cells: list[Cell]
    environment: Environment
    argv: list[str]
    started: str
    harness_version: str


class Footer(FrozenModel):
    """footer.json: written last. A run without it is incomplete."""

    schema_: int = Field(default=SCHEMA, alias="schema")
    run: str
    ended: str
    how: Literal["finished", "interrupted", "failed"]
    counts: dict[str, int]
    """Records per status, of the last attempt of each Cell."""
    missing: list[str]
    """Expected Cells without any Record."""
    kept: int = 0
    """Cells whose Record an earlier invocation made. The seconds below are those of the last invocation alone."""
    seconds_total: Seconds
    seconds_in_cells: Seconds
    seconds_outside: dict[str, float]
    """Where the rest went: `startup`, `fetch`, `scheduling`. The page is made after the footer, in about half a second."""
    sha256: dict[str, str] = Field(default={})
    """Of run.json and of each Record, by their paths in the run's folder: what is changed afterwards is seen. Empty in runs
    from before it was kept."""
