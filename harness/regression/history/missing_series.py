"""Cells that no longer end ok, and Cells and metrics that are no longer measured."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

from harness.analysis import metrics
from harness.regression.history import decisions
from harness.regression.history.findings import MissingSeries, StoppedCell
from harness.regression.history.night_files import EVERY, AttemptRow, History
from harness.regression.history.series import HistorySeries

NO_RECORD = "no Record"


def stopped_cells(history: History, names: Mapping[str, str]) -> Iterator[StoppedCell]:
    """Yield the Cells that ended ok on an earlier night, but not on the last night that ran them.

    A Cell is left out if a user has reset all its metrics after the last night on which it ended ok.
    """
    latest: dict[str, tuple[str, str]] = {}
    last_ok: dict[str, str] = {}
    for night in history.nights:
        attempts: dict[str, list[AttemptRow]] = {}
        for row in night.rows:
            attempts.setdefault(row["cell"], []).append(row)
        for cell, rows in attempts.items():
            latest[cell] = night.night, _status(rows)
            if latest[cell][1] == "ok":
                last_ok[cell] = night.night
    for cell, (day, status) in sorted(latest.items()):
        if status != "ok" and cell in last_ok and decisions.last_reset(history.resets, cell, EVERY) <= last_ok[cell]:
            yield StoppedCell(cell, names.get(cell, cell), day, status, last_ok[cell])


def missing_series(
    history: History, known: Sequence[HistorySeries], names: Mapping[str, str], stopped: Container[str]
) -> Iterator[MissingSeries]:
    """Yield metrics of a Cell that a place measured on an earlier night, but not on the last night of the place.

    Metrics that a run may lack are left out. Metrics of a Cell with the same last night are yielded together. known:
    the series of the history, as `series.series` returns them. stopped: cell_ids of Cells to leave out, because
    `stopped_cells` reports them.
    """
    last = {place: night for night in history.nights for place in night.places}
    missing: dict[tuple[str, str, str], list[str]] = {}
    for one in known:
        declared = metrics.in_history(one.metric)
        always_there = declared is None or declared.always_there
        if always_there and one.nights[-1] < last[one.place].night and one.cell not in stopped:
            missing.setdefault((one.cell, one.place, one.nights[-1]), []).append(one.metric)
    for (cell, place, last_measured), absent in sorted(missing.items()):
        status = _status(last[place].rows_of(cell, place))
        yield MissingSeries(cell, names.get(cell, cell), place, absent, last[place].night, last_measured, status)


def _status(attempts: Iterable[AttemptRow]) -> str:
    """Return `ok` if any attempt ended ok, otherwise the statuses of all attempts, or NO_RECORD if there is none."""
    statuses = sorted({str(row.get("status", "ok")) for row in attempts})
    return "ok" if "ok" in statuses else " and ".join(statuses) or NO_RECORD
