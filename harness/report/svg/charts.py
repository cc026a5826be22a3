"""Two kinds of chart: points and lines over two axes, and bars that are divided into parts.

A legend names the series.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from harness.report.svg.canvas import Canvas, Drawing
from harness.report.svg.scales import Axis

WIDTH, HEIGHT = 560.0, 340.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 550.0, 20.0, 298.0
HUES = 12
"""Number of colour classes (c0, c1, ...) in the style sheet."""
REST, OUTLINED = -1, -2
"""Values of `Series.hue` for a grey series, and for a series that is only an outline."""
_DASHES = 4
_SHAPES = (
    "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "m-3.6-3.6h7.2v7.2h-7.2z",
    "m0-5l5 5l-5 5l-5-5z",
    "m0-4.8l4.8 8.2h-9.6z",
)
_RING, _BLOCK = "m-8 0a8 8 0 1 0 16 0a8 8 0 1 0-16 0z", "m-6-5h12v10h-12z"
_LETTER = 6.2
"""Assumed width of a letter in SVG units. It is a high estimate, since the font is unknown."""
_ROW, _NAMES, _WIDE_LETTER = 20.0, 250.0, 8.8
"""- _ROW: height of a bar with its gap.
- _NAMES: largest width of a bar's name.
- _WIDE_LETTER: width of a letter in a bar's name on a phone.

Sizes are in SVG units."""


@dataclass(frozen=True)
class Point:
    """One point of a series."""

    x: float
    y: float
    interval: tuple[float, ...] = ()
    """Lower and upper end of the interval of y; empty if there is no interval."""
    tip: str = ""
    """Text of the tooltip; empty for a point that has no symbol."""
    href: str = ""
    """Link to the row of a table that has the numbers of the point."""
    busy: bool = False
    """True if x was measured while other programs used the machine."""
    hollow: bool = False
    """True for an unfilled symbol."""


@dataclass(frozen=True)
class Series:
    """Points that a line joins, under one name in the legend."""

    name: str
    hue: int
    """Number of the colour, or REST or OUTLINED. All series of one method have the same colour."""
    points: Sequence[Point] = ()
    variant: int = 0
    """Number of the series among the series of the same hue. It determines the dash of the line and the symbol."""
    shown: bool = True
    """False for a series that is hidden until the reader picks it."""
    kind: str = "line"
    """CSS class of the line: `line` with symbols, `curve` without, `bound` for a limit, `level` for a horizontal line
    with a band, or `fill` for a part of bars."""
    texts: Sequence[str] = ()
    """Text of each point on a line without symbols, for the tooltip."""

    @property
    def look(self) -> str:
        """CSS classes of the colour and the dash, separated by a space."""
        if self.hue < 0:
            return "rest" if self.hue == REST else "outlined"
        return f"c{self.hue % HUES} d{self.variant % _DASHES}"

    @property
    def shape(self) -> str:
        """SVG path of the symbol. Series of the same colour get different symbols, as far as there are enough."""
        return _SHAPES[(self.hue + self.hue // HUES + self.variant) % len(_SHAPES)]


def xy(x: Axis, y: Axis, series: Sequence[Series], *, front: bool = False, bands: bool = False) -> Drawing:
    """Draw series over two axes: lines, intervals and symbols, and the names of series where there is room.

    front: also draw the Pareto front of the points. bands: draw the intervals along a line as a band, not as bars.
    """
    c = Canvas(WIDTH, HEIGHT)
    points = [p for s in series if s.kind != "level" for p in s.points]
    x = x.over([p.x for p in points], LEFT + 12, RIGHT - 12)
    y = y.over([v for s in series for p in s.points for v in (p.y, *p.interval)], BOTTOM, TOP)
    _axes(c, x, y)
    if front:
        steps = [(p.x, p.y) for p in (points[i] for i in pareto([(p.x, p.y) for p in points]))]
        corners = [(b[0], a[1]) for a, b in itertools.pairwise(steps)]
        c.path([(x.at(a), y.at(b)) for a, b in sorted([*steps, *corners])], "front")
    places = [[(x.at(p.x), y.at(p.y)) for p in s.points] for s in series]
    banded = [bands and s.kind == "line" and len(s.points) > 1 and all(p.interval for p in s.points) for s in series]
    for k, (s, has_band) in enumerate(zip(series, banded, strict=True)):
        if has_band:
            low, high = ([(x.at(p.x), y.at(p.interval[end])) for p in s.points] for end in (0, 1))
            c.path([*low, *reversed(high)], f"ribbon {s.look}{'' if s.shown else ' off'}", "z", data_series=k)
    for k, (s, place) in enumerate(zip(series, places, strict=True)):
        off = "" if s.shown else " off"
        more = {"tip": s.name, "data_at": "|".join(s.texts)} if s.texts else {}
        if len(place) > 1:
            c.path(place, f"{s.kind} {s.look}{' spot' if s.texts else ''}{off}", data_series=k, **more)
        for p, at in zip(s.points, place, strict=True):
            bottom, top = map(y.at, p.interval or (p.y, p.y))
            if s.kind == "level":
                c.add("rect", "band", x=LEFT, y=top, width=RIGHT - LEFT, height=bottom - top, data_series=k)
                c.line(LEFT, at[1], RIGHT, at[1], "level", data_series=k)
            elif bottom > top and not banded[k]:
                c.line(at[0], bottom, at[0], top, f"bar {s.look}{off}", data_series=k)
            if p.tip and s.kind == "line":
                kind = f"dot spot {s.look}{' hollow' if p.hollow else ''}{off}"
                c.path([at], kind, s.shape, data_series=k, tip=p.tip, href=p.href)
            if p.busy:
                c.path([at], f"ring{off}", _RING, data_series=k)
    _name(c, series, places)
    return c.drawing()


def _axes(c: Canvas, x: Axis, y: Axis) -> None:
    for tick in y.ticks():
        c.line(LEFT, y.at(tick), RIGHT, y.at(tick), "grid")
        c.text(LEFT - 6, y.at(tick) + 3.5, y.write(tick), "tick", "end")
    for tick in x.ticks():
        c.line(x.at(tick), BOTTOM, x.at(tick), BOTTOM + 4, "axis")
        c.text(x.at(tick), BOTTOM + 17, x.write(tick), "tick", "middle")
    c.line(LEFT, BOTTOM, RIGHT, BOTTOM, "axis")
    c.text(LEFT, TOP - 5, y.name, "axis-name")
    c.text((LEFT + RIGHT) / 2, HEIGHT - 8, x.name, "axis-name", "middle")


def _name(c: Canvas, series: Sequence[Series], places: Sequence[Sequence[tuple[float, float]]]) -> None:
    """Write the name of each shown series beside its last point, if it does not cover a point or another name there."""
    both = enumerate(zip(series, places, strict=True))
    named = [(k, s, place) for k, (s, place) in both if s.shown and place and s.kind != "level"]
    taken = [(px - 6, py - 6, px + 6, py + 6) for _, _, place in named for px, py in place]
    for k, s, place in named:
        (px, py), wide = place[-1], _LETTER * len(s.name)
        for dx, dy, anchor, share in (
            (10, 4, "start", 0),
            (-10, 4, "end", 1),
            (0, -9, "middle", 0.5),
            (0, 18, "middle", 0.5),
        ):
            left, top, right, bottom = box = (
                px + dx - share * wide,
                py + dy - 10,
                px + dx + (1 - share) * wide,
                py + dy + 3,
            )
            free = not any(left < b[2] and b[0] < right and top < b[3] and b[1] < bottom for b in taken)
            if free and left >= LEFT and right <= RIGHT and top >= TOP and bottom <= BOTTOM:
                c.text(px + dx, py + dy, s.name, "label own", anchor, data_series=k)
                taken.append(box)
                break


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points on the Pareto front (low x, high y), sorted by x.

    A point is on the front if no other point has both a lower or equal x and a higher or equal y. Of equal points, only
    the first is returned.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def bars(
    x: Axis, rows: Mapping[str, Sequence[float]], series: Sequence[Series], write: Callable[[float], str]
) -> Drawing:
    """Draw one bar per row, divided into parts. rows: name of the bar -> lengths of its parts, one per series.

    write: function that formats the length of a bar.
    """
    bottom = 6 + _ROW * len(rows)
    left = 12 + min(_NAMES, max(_WIDE_LETTER * len(name) for name in rows))
    c = Canvas(WIDTH, bottom + 40)
    x = x.over([0.0, *map(sum, rows.values())], left, WIDTH - 66, 0.0)
    for tick in x.ticks():
        c.line(x.at(tick), 2, x.at(tick), bottom, "axis" if tick == 0 else "grid")
        c.text(x.at(tick), bottom + 14, x.write(tick), "tick", "middle")
    c.text((left + WIDTH - 66) / 2, bottom + 32, x.name, "axis-name", "middle")
    for i, (name, parts) in enumerate(rows.items()):
        y, at = 6 + i * _ROW, 0.0
        c.text(left - 7, y + 12, fitted(name, _NAMES, _WIDE_LETTER), "tick", "end")
        for k, (s, part) in enumerate(zip(series, parts, strict=True)):
            tip, start = f"{name}, {s.name}: {write(part)}", x.at(at)
            if (width := x.at(at + part) - start) > 0:
                kind = f"fill spot {s.look}"
                c.add("rect", kind, tip=tip, x=start, y=y + 2, width=width, height=_ROW - 6, data_series=k)
            at += part
        c.text(x.at(at) + 5, y + 12, write(at), "tick")
    return c.drawing()


def fitted(text: str, width: float, letter: float = _LETTER) -> str:
    """Return a name that is no wider than `width`. A long name loses its middle, since names differ at both ends."""
    room = int(width / letter)
    half = (room - 1) // 2
    return text if len(text) <= room else f"{text[: room - 1 - half]}…{text[len(text) - half :]}"


def sample(s: Series) -> Drawing:
    """Draw a series as it appears in the legend: its line and its symbol, or a block for a part of bars."""
    c = Canvas(30, 12)
    if s.kind == "fill":
        c.path([(15, 6)], f"fill {s.look}", _BLOCK)
        return c.drawing()
    c.line(1, 6, 29, 6, f"{s.kind} {s.look}")
    if s.kind == "line":
        c.path([(15, 6)], f"dot {s.look}", s.shape)
    return c.drawing()
