"""Results of `history show` and `history detect` as data: series, judged changes, missing series.

The names of the fields are the keys of the JSON document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harness.analysis import metrics, tracked_metrics
from harness.errors import Exit
from harness.regression.history import changes, night_files
from harness.regression.history.decisions import EVERY
from harness.regression.history.differences import Between
from harness.regression.history.night_files import Decision, Evidence

Standing = Literal["candidate", "suspect", "counted", "confirmed", "refuted", "unfounded"]
"""State of a change: unconfirmed; on the last nights only; of exact counts; confirmed; refuted; a refuted suspicion."""


@dataclass(frozen=True)
class ShownSeries:
    """A series with nights by their dates."""

    cell: str
    name: str
    metric: str
    place: str
    nights: list[str]
    values: list[float]
    passes: list[int]
    usual: float
    """Median of the values."""


@dataclass(frozen=True)
class ShownChange:
    """A change of level, with nights by their dates."""

    cell: str
    """A cell_id, or `*` for all series of a place."""
    name: str
    metric: str
    place: str
    night: str
    """First night of the new level."""
    before: float
    after: float
    change: float | None
    """Difference of a score, else after / before - 1; None if the level was zero before."""
    worse: bool
    settled: str | None
    """Night on which the old level came back."""
    note: str

    @property
    def is_time(self) -> bool:
        """True if the metric is a time."""
        return tracked_metrics.kind(self.metric) == "timed"


@dataclass(frozen=True)
class JudgedChange(ShownChange):
    """A change of level, its state, and the differences between its nights."""

    standing: Standing
    confirmation: Decision | None
    between: Between

    @property
    def is_open(self) -> bool:
        """True if the change still needs a confirmation."""
        return self.settled is None and self.standing in ("suspect", "candidate")

    @property
    def can_be_paired(self) -> bool:
        """True if pairs of runs can confirm the change: a time of a single Cell."""
        return self.is_time and self.cell != EVERY and self.between.request is not None

    def evidence(self) -> Evidence:
        """Return the facts about this change that a verdict refers to."""
        return {
            "old_night": self.between.old_night, "place": self.place, "before": self.before, "after": self.after
        }  # fmt: skip

    def document(self) -> dict[str, Any]:
        """Return the change as a JSON-compatible dict."""
        return {**vars(self), "between": self.between.document()}


@dataclass(frozen=True)
class PlaceChange:
    """A place that took over Cells from another one."""

    night: str
    place: str
    instead_of: str
    changed: list[str]
    """Differences, as `key this -> that`."""
    cells: int
    step_ratio: float | None
    """Median ratio of step times, new / old."""


@dataclass(frozen=True)
class Unanchored:
    """Times of a place that have no anchor, because there are too few series."""

    place: str
    metric: str
    series: int


@dataclass(frozen=True)
class Unjudged:
    """Nights of a place without an anchor."""

    place: str
    metric: str
    nights: list[str]


@dataclass(frozen=True)
class StoppedCell:
    """A Cell that ended ok once, and did not on its last night."""

    cell: str
    name: str
    night: str
    status: str
    ok: str
    """Last night on which it ended ok."""


@dataclass(frozen=True)
class MissingSeries:
    """Metrics of a Cell that are missing on the last night of their place."""

    cell: str
    name: str
    place: str
    metrics: list[str]
    night: str
    last: str
    """Last night that had them."""
    status: str
    """Status of the Cell on the last night of the place; `ok` if only these metrics are missing."""


@dataclass(frozen=True)
class Detection:
    """All results of `history detect`."""

    nights: list[str]
    series: int
    compared: int
    """Number of series that are long enough to show a change."""
    candidates: list[JudgedChange]
    suspects: list[JudgedChange]
    machine: list[ShownChange]
    """Changes of an anchor that the sentinels share."""
    residue: list[PlaceChange]
    unanchored: list[Unanchored]
    loose: list[Unjudged]
    stopped: list[StoppedCell]
    gone: list[MissingSeries]
    few_passes: dict[str, int]
    """Nights on which a Cell had too few passes, with the smallest number of passes."""
    resets: Sequence[Decision]
    left_out: Mapping[str, str]
    exit: Exit

    def document(self) -> dict[str, Any]:
        """Return the document of `--json`."""
        thresholds = {
            "time": changes.TIMED_LEAST, "accuracy": changes.SCORE_LEAST, "peak_B": metrics.TRAINING_PEAK.slack_B
        }  # fmt: skip
        return {
            "schema": night_files.SCHEMA, "nights": self.nights, "series": self.series, "compared": self.compared,
            "least": thresholds,
            "candidates": [one.document() for one in self.candidates],
            "suspects": [one.document() for one in self.suspects],
            "machine": [vars(one) for one in self.machine],
            "residue": [vars(one) for one in self.residue],
            "unanchored": [vars(one) for one in self.unanchored],
            "loose": [vars(one) for one in self.loose],
            "stopped": [vars(one) for one in self.stopped],
            "gone": [vars(one) for one in self.gone],
            "few_passes": self.few_passes, "resets": list(self.resets), "left_out": dict(self.left_out),
            "exit": int(self.exit),
        }  # fmt: skip
