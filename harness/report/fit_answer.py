"""Text output of `fit --batch`: whether the training fits, which changes would make it fit, and a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from harness.memory_model.size_units import MemorySize
from harness.report import fit_table
from harness.report.fit_table import hundredths, needed_and_free

_Row = Mapping[str, Any]


def lines(document: Mapping[str, Any]) -> list[str]:
    """Format the JSON document of `fit --batch` as lines of text."""
    size = MemorySize(document["memory_B"], document["unit"])
    rows = [row for row in document["rows"] if row["ledger"]]
    several = len({row["optimizer"] for row in rows}) > 1
    changes = [line for row in rows if row["fits"] is False for line in _changes(row, size, several)]
    return [_answer(document, rows, size, several), *changes, "", *fit_table.lines(document)]


def _answer(document: Mapping[str, Any], rows: list[_Row], size: MemorySize, several: bool) -> str:
    """Return the first line: yes, no or unknown, and which training needs the least memory."""
    known = sorted((row for row in rows if row["fits"] is not None), key=lambda row: row["needed_B"])
    asked = f"batch {document['batch']} of {document['tokens']:,} tokens"
    if not known:
        return f"unknown: no memory could be predicted for {asked}"
    needs = f"{_name(known[0], several)} needs {_against(known[0], size)}"
    answer = document["answer"]
    if 0 <= known[0]["free_B"] < known[0]["margin_B"]:
        answer = f"{answer}, but close"
        margin = f"{size.shown(known[0]['margin_B'])} {size.unit}"
        needs = f"{needs}; the prediction may be {margin} off, and leaves out the CUDA context"
    if len(known) == 1:
        return f"{answer}: {asked}: {needs}"
    fitting = sum(row["fits"] for row in known)
    return f"{answer}: {asked} fits in {fitting or 'none'} of {len(known)} rows; {needs}"


def _against(row: _Row, size: MemorySize) -> str:
    """Return a text with the memory that a row needs, the given memory, and the difference."""
    needed, free = needed_and_free(row["needed_B"], size)
    rest = f"{hundredths(abs(free))} {size.unit} {'free' if row['fits'] else 'missing'}"
    return f"{hundredths(needed)} of {hundredths(needed + free)} {size.unit}: {rest}"


def _changes(row: _Row, size: MemorySize, several: bool) -> Iterator[str]:
    """Yield one line with ways to make a row fit: a smaller batch, or changes of as few other settings as possible."""
    ways = []
    if row["largest_batch"]:
        ways.append(f"at most batch {row['largest_batch']}")
    fitting = [one for one in row["changes"] if one["fits"]]
    fewest = min((len(one["settings"]) for one in fitting), default=0)
    for change in fitting:
        if len(change["settings"]) == fewest:
            settings = " + ".join(_setting(*one) for one in change["settings"].items())
            needed, _ = needed_and_free(change["needed_B"], size)
            ways.append(f"{settings} ({hundredths(needed)} {size.unit})")
    alone = "one text is too much" if row["largest_batch"] == 0 else "the largest batch is unknown"
    none = f"does not fit: {alone}{', and no change that was tried suffices' if row['changes'] else ''}"
    yield f"  {_name(row, several)} {'would fit with ' + ' or '.join(ways) if ways else none}"


def _setting(name: str, value: Any) -> str:
    return f"--{name}" if value is True else f"--{name} {value}"


def _name(row: _Row, several: bool) -> str:
    rank = f" r={row['rank']}" if row["rank"] else ""
    base = "" if row["base"] in ("none", "its own", "-") else f" on {row['base']}"
    return f"{row['method']}{rank}{base}{' by ' + row['optimizer'] if several else ''}"
