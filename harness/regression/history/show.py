"""The verb `history show`: the series as they are, without a judgement and without its libraries."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from harness.analysis import tracked_metrics
from harness.console import say
from harness.errors import Exit, UsageError
from harness.regression.history import night_files, table
from harness.regression.history.cell_names import named, picked
from harness.regression.history.series import series


def show(folder: Path, cell: str | None, metric: str | None, *, each_night: bool, as_json: bool) -> Exit:
    """Print series and return the exit code: 4 where a file could not be read, 5 where there is nothing to show.

    cell: an expression, as `--only` takes. metric: a name, or the start of one before a `/`. Raises UsageError for what
    fits nothing.
    """
    history = night_files.read(folder)
    if metric is not None and not (tracked_metrics.kind(metric) or metric == tracked_metrics.LATENCY):
        known = ", ".join(tracked_metrics.names())
        raise UsageError(f"not a metric: {metric!r}", where="--metric", hint=f"name one of {known}")
    names = named(history)
    found = series(history, picked(history, cell) if cell else None)
    rows: list[dict[str, Any]] = [
        {
            "cell": one.cell,
            "name": names.get(one.cell, one.cell),
            "metric": one.metric,
            "place": one.on,
            "nights": [history.nights[i].night for i in one.nights],
            "values": one.values,
            "passes": one.passes,
            "usual": median(one.values),
        }
        for one in found
        if metric is None or metric in (one.metric, one.metric.partition("/")[0])
    ]
    places = {on: is_ for night in history.nights for on, is_ in night.places.items()}
    if as_json:
        document = {"schema": night_files.SCHEMA, "places": places, "series": rows, "left_out": history.broken}
        say(json.dumps(document, indent=1))
    elif rows:
        say(table.shown(rows, each_night=each_night))
        here = {row["place"] for row in rows}
        say("\n".join(f"place {on}: {', '.join(f'{k} {v}' for k, v in places[on].items())}" for on in sorted(here)))
        for name, why in history.broken.items():
            say(f"left out: {name}: {why}")
    if not rows:
        return Exit.NOTHING_COMPARED
    return Exit.INFRASTRUCTURE if history.broken else Exit.PASS
