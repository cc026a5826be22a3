"""Results of `history detect` as data: judged changes, new places, Cells and metrics that are no longer measured.

The names of the fields are the keys of the JSON document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harness.analysis import metrics, tracked_metrics
from harness.errors import Exit
from harness.regression.history import cell_names, changes, night_files
from harness.regression.history.changes import Change, Unanchored, Unjudged
from harness.regression.history.differences import Between
from harness.regression.history.night_files import EVERY, Decision, Evidence

State = Literal["candidate", "suspect", "counted", "confirmed", "refuted", "unfounded"]
"""State of a change. `candidate`: not confirmed yet. `suspect`: a time was longer on the last night than before.
`counted`: a change of an exact count. `confirmed`, `refuted`: by a verdict. `unfounded`: a suspect refuted by a
verdict."""


@dataclass(frozen=True, kw_only=True)
class JudgedChange(Change):
    """A change of level, its state, and what else changed between the nights before and after it."""

    name: str
    """Name of the Cell."""
    standing: State
    confirmation: Decision | None
    between: Between

    @property
    def is_open(self) -> bool:
        """True if the change still needs a confirmation."""
        return self.settled is None and self.standing in ("suspect", "candidate")

    @property
    def can_be_paired(self) -> bool:
        """True if pairs of runs can confirm the change. It must be a change of a time of a single Cell."""
        is_time = tracked_metrics.kind(self.metric) == "timed"
        return is_time and self.cell != EVERY and self.between.request is not None

    def evidence(self) -> Evidence:
        """Return the facts about this change that are stored with a verdict."""
        return Evidence(old_night=self.old_night, place=self.place, before=self.before, after=self.after)

    def judged_document(self) -> dict[str, Any]:
        """Return the change and its state for JSON."""
        return {
            **self.document(self.name),
            "standing": self.standing,
            "confirmation": self.confirmation.document() if self.confirmation else None,
            "between": {"old_night": self.old_night, "new_night": self.night, **self.between.document()},
        }


@dataclass(frozen=True)
class PlaceChange:
    """A place (machine and software) that took over Cells from another place."""

    night: str
    place: str
    instead_of: str
    changed: list[str]
    """Differences between the places, as `key old -> new`."""
    cells: int
    step_ratio: float | None
    """Step time at the new place divided by the step time at the old place: the median over the Cells with both times.
    None if no Cell has both."""


@dataclass(frozen=True)
class StoppedCell:
    """A Cell that ended ok on an earlier night, but not on the last night that ran it."""

    cell: str
    name: str
    night: str
    status: str
    ok: str
    """Last night on which the Cell ended ok."""


@dataclass(frozen=True)
class MissingSeries:
    """Metrics of a Cell that were measured at a place on an earlier night, but not on the last night of this place."""

    cell: str
    name: str
    place: str
    metrics: list[str]
    night: str
    last: str
    """Last night on which these metrics were measured."""
    status: str
    """Status of the Cell on the last night of the place. It is `ok` if only these metrics of the Cell are missing."""


@dataclass(frozen=True)
class Detection:
    """All results of `history detect`."""

    nights: list[str]
    series: int
    compared: int
    """Number of series that are long enough to show a change."""
    candidates: list[JudgedChange]
    suspects: list[JudgedChange]
    machine: list[Change]
    """Changes of the machine: all series of a place show them, even those of Cells whose code never changes."""
    residue: list[PlaceChange]
    unanchored: list[Unanchored]
    loose: list[Unjudged]
    stopped: list[StoppedCell]
    gone: list[MissingSeries]
    few_passes: dict[str, int]
    """Fewest passes (runs of the suite) of a Cell on a night, by night. Only nights with too few passes are included."""
    resets: Sequence[Decision]
    left_out: Mapping[str, str]
    """`file` or `file:line` -> reason why the file or line could not be used."""
    strict: bool
    """True if an unconfirmed change makes the exit code INCONCLUSIVE."""

    @property
    def exit(self) -> Exit:
        """The exit code of `history detect`."""
        present = [c for c in self.candidates if c.settled is None]
        if any(c.worse and c.standing in ("confirmed", "counted") for c in present):
            return Exit.FAIL
        if self.stopped or self.gone:  # first, since it may be the reason why nothing was compared
            return Exit.INFRASTRUCTURE
        if not self.compared:
            return Exit.NOTHING_COMPARED
        if self.left_out:
            return Exit.INFRASTRUCTURE
        unconfirmed = any(c.standing == "candidate" for c in present)
        return Exit.INCONCLUSIVE if self.strict and unconfirmed else Exit.PASS

    def document(self) -> dict[str, Any]:
        """Return the JSON document of `history detect --json`."""
        thresholds = {
            "time": changes.TIMED_LEAST, "accuracy": changes.SCORE_LEAST, "peak_B": metrics.TRAINING_PEAK.slack_B
        }  # fmt: skip
        return {
            "schema": night_files.SCHEMA, "nights": self.nights, "series": self.series, "compared": self.compared,
            "least": thresholds,
            "candidates": [one.judged_document() for one in self.candidates],
            "suspects": [one.judged_document() for one in self.suspects],
            "machine": [one.document(cell_names.COMMON) for one in self.machine],
            "residue": [vars(one) for one in self.residue],
            "unanchored": [vars(one) for one in self.unanchored],
            "loose": [vars(one) for one in self.loose],
            "stopped": [vars(one) for one in self.stopped],
            "gone": [vars(one) for one in self.gone],
            "few_passes": self.few_passes, "resets": [line.document() for line in self.resets],
            "left_out": dict(self.left_out), "exit": int(self.exit),
        }  # fmt: skip
