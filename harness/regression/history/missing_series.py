"""Cells that no longer end ok, and Cells and metrics that are no longer measured."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence

from harness.analysis import metrics
from harness.regression.history import decisions
from harness.regression.history.decisions import EVERY
from harness.regression.history.findings import MissingSeries, StoppedCell
from harness.regression.history.night_files import History
from harness.regression.history.series import HistorySeries

NO_RECORD = "no Record"


def stopped_cells(history: History, names: Mapping[str, str]) -> Iterator[StoppedCell]:
    """Yield the Cells that ended ok once, and did not on the last night that ran them.

    A Cell is accepted, and left out, if all its metrics were reset on a night after its last good one.
    """
    latest: dict[str, tuple[str, str]] = {}
    was_ok: dict[str, str] = {}
    for night in history.nights:
        statuses_of: dict[str, set[str]] = {}
        for row in night.rows:
            statuses_of.setdefault(row["cell"], set()).add(str(row.get("status", "ok")))
        for cell, statuses in statuses_of.items():
            latest[cell] = (night.night, " and ".join(sorted(statuses - {"ok"})) if "ok" not in statuses else "ok")
            if "ok" in statuses:
                was_ok[cell] = night.night
    for cell, (name, status) in sorted(latest.items()):
        if status != "ok" and cell in was_ok and decisions.last_reset(history.resets, cell, EVERY) <= was_ok[cell]:
            yield StoppedCell(cell, names.get(cell, cell), name, status, was_ok[cell])


def missing_series(
    history: History, known: Sequence[HistorySeries], names: Mapping[str, str], stopped: Container[str]
) -> Iterator[MissingSeries]:
    """Yield metrics of a Cell that an earlier night of a place has and its last night lacks, grouped by their last night.

    known: series since their last reset, so that accepted ones are left out. stopped: Cells that `stopped_cells` yields.
    """
    last = {place: index for index, night in enumerate(history.nights) for place in night.places}
    missing: dict[tuple[str, str, int], list[str]] = {}
    for one in known:
        declared = metrics.in_history(one.metric)
        if declared is not None and not declared.always_there:
            continue
        if one.nights[-1] < last[one.place] and one.cell not in stopped:
            missing.setdefault((one.cell, one.place, one.nights[-1]), []).append(one.metric)
    there: dict[tuple[str, str], set[str]] = {}
    if missing:
        for index in set(last.values()):
            for row in history.nights[index].rows:
                if last[row["on"]] == index:
                    there.setdefault((row["cell"], row["on"]), set()).add(str(row.get("status", "ok")))
    for (cell, place, index), absent in sorted(missing.items()):
        statuses = there.get((cell, place), {NO_RECORD})
        status = "ok" if "ok" in statuses else " and ".join(sorted(statuses))
        night, last_night = history.nights[last[place]].night, history.nights[index].night
        yield MissingSeries(cell, names.get(cell, cell), place, absent, night, last_night, status)
