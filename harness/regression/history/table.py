"""Findings and series of a history as plain aligned text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.analysis import tracked_metrics
from harness.analysis.statistics.anchor import FEWEST_SERIES
from harness.console import aligned
from harness.regression.history.night_files import PASSES

_SHOWN = 6
"""Nights that a sentence names; there may be hundreds."""
_HEAD = ("since", "cell", "metric", "before", "after", "change", "")


def detected(found: Mapping[str, Any]) -> str:
    """Lay the document of `detect` out: the changes that stand, what became of others, and what limits all that."""
    nights = found["nights"]
    span = f"{nights[0]} to {nights[-1]}" if nights else "none"
    lines = [f"nights: {len(nights)} ({span}); {found['series']} series, {found['compared']} long enough to compare"]
    candidates = found["candidates"]
    for title, group in (
        ("changes", [c for c in candidates if c["settled"] is None]),
        ("changes that were taken back", [c for c in candidates if c["settled"] is not None]),
    ):
        if group:
            lines += ["", title, *aligned([_HEAD, *(_row(c) for c in group)]), *_confirming(group)]
    if suspects := found["suspects"]:
        title = "suspicions: the last night lies above its level; `peft-harness history settle` tries them by pairs"
        lines += ["", title, *aligned([_HEAD, *(_row(c) for c in suspects)]), *_confirming(suspects)]
    if not candidates:
        lines += ["", "no change of level" if found["compared"] else "nothing to compare"]
    notes = list(_notes(found))
    return "\n".join([*lines, *([""] if notes else []), *notes])


def shown(rows: Sequence[Mapping[str, Any]], *, each_night: bool) -> str:
    """Lay the document of `show` out: a line per series, or per night of each."""
    table: list[tuple[str, ...]]
    if each_night:
        table = [
            (row["name"], row["metric"], row["place"], night, value(row["metric"], v), str(n))
            for row in rows
            for night, v, n in zip(row["nights"], row["values"], row["passes"], strict=True)
        ]
        head: tuple[str, ...] = ("cell", "metric", "place", "night", "value", "passes")
    else:
        table = [
            (
                row["cell"], row["name"], row["metric"], row["place"], str(len(row["nights"])), row["nights"][-1],
                value(row["metric"], row["values"][-1]), value(row["metric"], row["usual"]), _beside(row),
            )
            for row in rows
        ]  # fmt: skip
        head = ("cell", "name", "metric", "place", "nights", "last", "value", "usual", "value/usual")
    return "\n".join(aligned([head, *table]))


def value(metric: str, number: float) -> str:
    """Say a value in a unit that people read."""
    kind = tracked_metrics.kind(metric)
    if kind == "timed":
        return f"{1000 * number:.4g} ms"
    if kind == "score":
        return f"{100 * number:.1f} %"
    return f"{number / 2**20:.2f} MiB" if kind == "peak" else f"{number:,.0f}"


def _beside(row: Mapping[str, Any]) -> str:
    return f"{row['values'][-1] / row['usual']:.3f}" if row["usual"] else "-"


def _row(c: Mapping[str, Any]) -> tuple[str, ...]:
    points = tracked_metrics.kind(c["metric"]) == "score"
    change = "from nothing" if c["change"] is None else f"{100 * c['change']:+.2f} {'points' if points else '%'}"
    levels = [f"{c[side]:.3f}" if c["cell"] == "*" else value(c["metric"], c[side]) for side in ("before", "after")]
    return (c["night"], c["name"], c["metric"], *levels, change, _standing(c))


def _standing(c: Mapping[str, Any]) -> str:
    word = "worse" if c["worse"] else "better"
    said = c["confirmation"]
    if c["settled"] is not None:
        word += f", taken back on {c['settled']}"
    if c["standing"] == "suspect":
        return word + ", if it lasts"
    if said is not None:
        return f"{word}, {c['standing']} by {said['author']}: {said['reason']}"
    return word + (", counted" if c["standing"] == "counted" else ", not confirmed")


def _confirming(group: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what lies between the levels of each change, and how to try it again."""
    for c in group:
        b = c["between"]
        code = (
            f"code {b['code'][0] or 'unknown'} -> {b['code'][1] or 'unknown'}" if b["code"][0] != b["code"][1] else ""
        )
        facts = [f for f in (code, *b["software"], c["note"]) if f]
        yield f"  {c['cell']} {c['metric']}, {b['old_night']} to {b['new_night']}: {'; '.join(facts) or 'the same code'}"
        if c["standing"] in ("candidate", "suspect") and c["settled"] is None:
            yield f"    confirm: {b['confirm'] or 'not by pairs'}" + (f" ({b['because']})" if b["because"] else "")


def _notes(found: Mapping[str, Any]) -> Iterator[str]:
    for change in found["machine"]:
        yield (
            f"the machine: on {change['night']} all {change['metric']} of place {change['place']} changed by "
            f"{100 * change['change']:+.1f} %, the sentinels too: divided away"
        )
    for moved in found["residue"]:
        by = f", step time x {moved['step_ratio']:.3f}" if moved["step_ratio"] else ""
        cells = f"{moved['cells']} Cell{'s' * (moved['cells'] != 1)}"
        yield f"not compared: {'; '.join(moved['changed'])} on {moved['night']}: series of {cells} begin anew{by}"
    for one in found["unanchored"]:
        yield (
            f"no anchor: {one['series']} series of {one['metric']} at place {one['place']}; a bad night of the machine is "
            "taken for theirs"
        )
    for one in found["loose"]:
        yield (
            f"not judged: {one['metric']} at place {one['place']} on {_nights(one['nights'])}: fewer than "
            f"{FEWEST_SERIES} of its usual series"
        )
    for stop in found["stopped"]:
        yield f"not measured: {stop['name']} ({stop['cell']}): {stop['status']} on {stop['night']}, ok on {stop['ok']}"
    yield from _gone(found["gone"])
    if found["stopped"] or found["gone"]:
        yield (
            "  meant to be so? `peft-harness history reset CELL METRIC --night N --reason ...`, with a night after the last "
            "good one; METRIC is `*` for a whole Cell"
        )
    few: Mapping[str, int] = found["few_passes"]
    if few:
        yield f"fewer than {PASSES} passes of a Cell, used all the same, on {_nights(list(few))}"
    for line in found["resets"]:
        yield (
            f"accepted from {line['night']} on: {line['cell']} {line['metric']}, by {line['author']}: {line['reason']}"
        )
    for name, why in found["left_out"].items():
        yield f"left out: {name}: {why}"


def _gone(gone: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what is missing, each kind of loss once, and under it the Cells."""
    groups: dict[str, list[str]] = {}
    for one in gone:
        what = f"{', '.join(one['metrics'])} of" if one["status"] == "ok" else f"{one['status']} of"
        title = f"gone: {what} these Cells on {one['night']}, last on {one['last']}, place {one['place']}"
        groups.setdefault(title, []).append(f"  {one['name']} ({one['cell']})")
    for title, cells in groups.items():
        yield from (f"{title}:", *cells)


def _nights(nights: Sequence[str]) -> str:
    shown = ", ".join(nights[-_SHOWN:])
    return shown if len(nights) <= _SHOWN else f"{len(nights)} nights, the last of them {shown}"
