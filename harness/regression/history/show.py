"""`history show`: print the series of a history. It judges nothing, so that it need not import slow libraries."""

from __future__ import annotations

from pathlib import Path

from harness.analysis import tracked_metrics
from harness.console import print_json, print_lines
from harness.errors import Exit, UsageError
from harness.regression.history import cell_names, night_files, table
from harness.regression.history.series import series


def show(folder: Path, cell: str | None, metric: str | None, *, each_night: bool, as_json: bool) -> Exit:
    """Print the series of a history and return the exit code.

    cell: an expression in the syntax of `--only`. metric: a name of a metric, or the part of names before the first
    `/`. each_night: print one line per night. Returns NOTHING_COMPARED if there is nothing to show. Returns
    INFRASTRUCTURE if a file cannot be read. Raises UsageError if `cell` selects nothing, or if no metric has the name
    `metric`.
    """
    history = night_files.read(folder)
    if metric is not None and not (tracked_metrics.kind(metric) or metric == tracked_metrics.LATENCY):
        hint = f"name one of {', '.join(tracked_metrics.names())}"
        raise UsageError(f"not a metric: {metric!r}", where="--metric", hint=hint)
    names = cell_names.names(history)
    shown = [
        one
        for one in series(history, cell_names.select(history, cell) if cell else None)
        if metric is None or metric in (one.metric, one.metric.partition("/")[0])
    ]
    places = {place: facts for night in history.nights for place, facts in night.places.items()}
    if as_json:
        document = {
            "schema": night_files.SCHEMA, "places": places,
            "series": [one.document(names.get(one.cell, one.cell)) for one in shown], "left_out": history.broken,
        }  # fmt: skip
        print_json(document)
    elif shown:
        print_lines(table.series_lines(shown, names, each_night=each_night))
        for place in sorted({one.place for one in shown}):
            print_lines([f"place {place}: {', '.join(f'{key} {value}' for key, value in places[place].items())}"])
        print_lines(f"left out: {name}: {why}" for name, why in history.broken.items())
    if not shown:
        return Exit.NOTHING_COMPARED
    return Exit.INFRASTRUCTURE if history.broken else Exit.PASS
