"""What was measured once and is no more: Cells that end otherwise now, and Cells and metrics that are not there."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from harness.analysis import metrics
from harness.regression.history import decisions
from harness.regression.history.decisions import EVERY
from harness.regression.history.night_files import History
from harness.regression.history.series import HistorySeries

NO_RECORD = "no Record"


def stopped(history: History, names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the Cells that were measured once, and on the last night that tried them were not.

    Without those of which all metrics were reset on a night after the last good one: somebody accepts that.
    """
    latest: dict[str, tuple[str, str]] = {}
    was_ok: dict[str, str] = {}
    for night in history.nights:
        tried: dict[str, set[str]] = {}
        for row in night.rows:
            tried.setdefault(row["cell"], set()).add(str(row.get("status", "ok")))
        for cell, statuses in tried.items():
            latest[cell] = (night.night, " and ".join(sorted(statuses - {"ok"})) if "ok" not in statuses else "ok")
            if "ok" in statuses:
                was_ok[cell] = night.night
    for cell, (name, status) in sorted(latest.items()):
        if status != "ok" and cell in was_ok and decisions.start(history.resets, cell, EVERY) <= was_ok[cell]:
            yield {"cell": cell, "name": names.get(cell, cell), "night": name, "status": status, "ok": was_ok[cell]}


def gone(
    history: History, known: Sequence[HistorySeries], names: Mapping[str, str], ended: Container[str]
) -> Iterator[dict[str, Any]]:
    """Yield what a Cell has at a place on an earlier night and not on the last one of that place, grouped by its own last.

    known: from each last reset on, so that what was reset after it was last there is accepted. ended: Cells that are told
    as stopped. status: of the Cell there on that night, `ok` if only some of its metrics are missing.
    """
    last = {on: index for index, night in enumerate(history.nights) for on in night.places}
    missing: dict[tuple[str, str, int], list[str]] = {}
    for one in known:
        declared = metrics.in_history(one.metric)
        if declared is not None and not declared.always_there:
            continue
        if one.nights[-1] < last[one.on] and one.cell not in ended:
            missing.setdefault((one.cell, one.on, one.nights[-1]), []).append(one.metric)
    there: dict[tuple[str, str], set[str]] = {}
    if missing:
        for index in set(last.values()):
            for row in history.nights[index].rows:
                if last[row["on"]] == index:
                    there.setdefault((row["cell"], row["on"]), set()).add(str(row.get("status", "ok")))
    for (cell, on, index), gone_metrics in sorted(missing.items()):
        statuses = there.get((cell, on), {NO_RECORD})
        yield {
            "cell": cell,
            "name": names.get(cell, cell),
            "place": on,
            "metrics": gone_metrics,
            "night": history.nights[last[on]].night,
            "last": history.nights[index].night,
            "status": "ok" if "ok" in statuses else " and ".join(sorted(statuses)),
        }
