"""Findings and series of a history as plain aligned text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from harness.analysis import tracked_metrics
from harness.analysis.statistics.anchor import FEWEST_SERIES
from harness.console import align_columns
from harness.errors import plural
from harness.regression.history.changes import Change
from harness.regression.history.findings import Detection, JudgedChange, MissingSeries
from harness.regression.history.night_files import EVERY, PASSES
from harness.regression.history.series import HistorySeries

_SHOWN = 6
"""Largest number of nights that a sentence lists, since a history may have hundreds."""
_HEAD = ("since", "cell", "metric", "before", "after", "change", "")


def detection_lines(found: Detection) -> list[str]:
    """Return the lines of `history detect`: the changes, then notes on the limits of the search."""
    count = len(found.nights)
    span = f" ({found.nights[0]} to {found.nights[-1]})" if count else ""
    lines = [f"{plural(count, 'night')}{span}; {found.series} series, {found.compared} long enough to compare"]
    for title, group in (
        ("changes", [c for c in found.candidates if c.settled is None]),
        ("changes that went back", [c for c in found.candidates if c.settled is not None]),
        (
            "suspicions: slower on the last night than before; confirm with `peft-harness history settle`",
            found.suspects,
        ),
    ):
        if group:
            lines += ["", title, *align_columns([_HEAD, *(_row(c) for c in group)]), *_differences(group)]
    if not found.candidates:
        lines += ["", "no change of level" if found.compared else "nothing to compare"]
    notes = list(_notes(found))
    return [*lines, *([""] if notes else []), *notes]


def series_lines(found: Sequence[HistorySeries], names: Mapping[str, str], *, each_night: bool) -> list[str]:
    """Return the lines of `history show`, one per series. names: names of Cells, by cell_id.

    each_night: return one line per night of each series instead.
    """
    head: tuple[str, ...]
    rows: list[tuple[str, ...]] = []
    if each_night:
        head = ("cell", "metric", "place", "night", "value", "passes")
        for one in found:
            name = names.get(one.cell, one.cell)
            for night, number, passes in zip(one.nights, one.values, one.passes, strict=True):
                rows.append((name, one.metric, one.place, night, _value(one.metric, number), str(passes)))
    else:
        head = ("cell", "name", "metric", "place", "nights", "last", "value", "usual", "value/usual")
        for one in found:
            last, usual = one.values[-1], one.usual
            rows.append((
                one.cell, names.get(one.cell, one.cell), one.metric, one.place, str(len(one.nights)), one.nights[-1],
                _value(one.metric, last), _value(one.metric, usual), f"{last / usual:.3f}" if usual else "-",
            ))  # fmt: skip
    return align_columns([head, *rows])


def _value(metric: str, number: float) -> str:
    """Format a value for people, with its unit."""
    kind = tracked_metrics.kind(metric)
    if kind == "timed":
        return f"{1000 * number:.4g} ms"
    if kind == "score":
        return f"{100 * number:.1f} %"
    return f"{number / 2**20:.2f} MiB" if kind == "peak" else f"{number:,.0f}"


def _row(c: JudgedChange) -> tuple[str, ...]:
    levels = [f"{level:.3f}" if c.cell == EVERY else _value(c.metric, level) for level in (c.before, c.after)]
    unit = "points" if tracked_metrics.kind(c.metric) == "score" else "%"
    change = "from nothing" if c.change is None else f"{100 * c.change:+.2f} {unit}"
    return (c.night, c.name, c.metric, *levels, change, _standing(c))


def _standing(c: JudgedChange) -> str:
    text = "worse" if c.worse else "better"
    if c.settled is not None:
        text += f", back on {c.settled}"
    if c.standing == "suspect":
        return f"{text}, if it lasts"
    if c.confirmation is not None:
        return f"{text}, {c.standing} by {c.confirmation.author}: {c.confirmation.reason}"
    return text + (", counted" if c.standing == "counted" else ", not confirmed")


def _differences(group: Sequence[JudgedChange]) -> Iterator[str]:
    """Yield lines about each change: what differs between its nights, and which command confirms the change."""
    for c in group:
        b = c.between
        code = [f"code {b.code[0] or 'unknown'} -> {b.code[1] or 'unknown'}"] if b.code[0] != b.code[1] else []
        facts = [*code, *b.software, *filter(None, [c.note])]
        yield f"  {c.cell} {c.metric}, {c.old_night} to {c.night}: {'; '.join(facts) or 'the same code'}"
        if c.is_open:
            yield f"    confirm: {b.command or 'not by pairs'}" + (f" ({b.because})" if b.because else "")


def _notes(found: Detection) -> Iterator[str]:
    yield from map(_machine, found.machine)
    for new in found.residue:
        ratio = f", step time x {new.step_ratio:.3f}" if new.step_ratio else ""
        cells = plural(new.cells, "Cell")
        yield f"not compared: {'; '.join(new.changed)} on {new.night}: series of {cells} start again{ratio}"
    for few in found.unanchored:
        where = f"{few.series} series of {few.metric} at place {few.place}"
        yield f"no anchor: only {where}; a slow night of the machine looks like a change"
    for one in found.loose:
        where = f"{one.metric} at place {one.place} on {_nights(one.nights)}"
        yield f"not judged: {where}: fewer than {FEWEST_SERIES} of its usual series were measured"
    for cell in found.stopped:
        yield f"not measured: {cell.name} ({cell.cell}): {cell.status} on {cell.night}, ok on {cell.ok}"
    yield from _missing(found.gone)
    if found.stopped or found.gone:
        yield (
            "  to accept: `peft-harness history reset CELL METRIC --night N --reason ...`, with a night after the last good "
            "one; METRIC `*` for a whole Cell"
        )
    if found.few_passes:
        yield f"fewer than {PASSES} passes of a Cell, so medians are rough: {_nights(list(found.few_passes))}"
    for line in found.resets:
        yield f"accepted from {line.night} on: {line.cell} {line.metric}, by {line.author}: {line.reason}"
    for name, why in found.left_out.items():
        yield f"left out: {name}: {why}"


def _machine(change: Change) -> str:
    by = "from nothing" if change.change is None else f"by {100 * change.change:+.1f} %"
    what = f"on {change.night} all {change.metric} of place {change.place} changed {by}"
    return f"the machine: {what}, the sentinels too; corrected by the anchor"


def _missing(gone: Sequence[MissingSeries]) -> Iterator[str]:
    """Yield the missing metrics as lines: a title for each kind of gap, followed by the Cells that have this gap."""
    groups: dict[str, list[str]] = {}
    for one in gone:
        what = f"{', '.join(one.metrics)} of" if one.status == "ok" else f"{one.status} of"
        title = f"gone: {what} these Cells on {one.night}, last on {one.last}, place {one.place}"
        groups.setdefault(title, []).append(f"  {one.name} ({one.cell})")
    for title, cells in groups.items():
        yield from (f"{title}:", *cells)


def _nights(nights: Sequence[str]) -> str:
    shown = ", ".join(nights[-_SHOWN:])
    return shown if len(nights) <= _SHOWN else f"{len(nights)} nights, the last of them {shown}"
