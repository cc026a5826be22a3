"""The four charts of a report, as geometry: cost against accuracy, learning curves, trajectory errors, phases."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from harness.report import formatting
from harness.report.svg import labels
from harness.report.svg.canvas import Canvas, Drawing
from harness.report.svg.labels import Box
from harness.report.svg.scales import Scale, linear, logarithmic

_HUES = 8  # colour classes c0..c7 in the style sheet, each with its own dash pattern
_FILLS = 9  # f0..f8
_NAMES = 420.0
"""Largest width of names in a drawing; longer names are cut, and complete in the tooltip."""


@dataclass(frozen=True)
class Point:
    """One Cell in a chart of accuracy against a cost."""

    label: str
    cost: float
    value: float
    low: float
    high: float
    tied: bool
    """True if the Cell is the best or tied with the best."""
    tip: str
    """Tooltip."""
    href: str


@dataclass(frozen=True)
class Level:
    """An accuracy without a cost, of an untrained Cell: a line across the chart."""

    label: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Stopped:
    """A Cell that reached this cost and has no accuracy, e.g. out of memory."""

    label: str
    cost: float


def cost(
    title: str,
    axis: str,
    points: Sequence[Point],
    levels: Sequence[Level] = (),
    stopped: Sequence[Stopped] = (),
    *,
    log: bool,
) -> Drawing:
    """Draw accuracy against a cost with intervals, the Pareto front and a name next to every point."""
    width, height, left, right, top, bottom = 600, 380, 52, 590, 12, 336
    front = pareto([(p.cost, p.value) for p in points])
    description = (
        f"{len(points)} Cells. On the Pareto front (cheaper and better than all others): "
        + ", ".join(points[i].label for i in front)
        + ". The table below holds the same numbers."
    )
    c = Canvas(title, description, width, height)
    heights = [v for p in points for v in (p.low, p.high)] + [v for level in levels for v in (level.low, level.high)]
    y = linear(heights, bottom, top)
    costs = [p.cost for p in points]
    shown = costs + [s.cost for s in stopped]
    x = logarithmic(shown, left + 8, right - 8, 0.09) if log else linear(shown, left + 8, right - 8, 0.12)

    for tick in y.ticks(7):
        c.line(left, y.at(tick), right, y.at(tick), "grid")
        c.text(left - 7, y.at(tick) + 4, f"{100 * tick:.4g} %", "tick", "end")
    for tick in x.ticks(6):
        c.line(x.at(tick), bottom, x.at(tick), bottom + 4, "axis")
        c.text(x.at(tick), bottom + 18, formatting.short_count(tick) if log else f"{tick:,.6g}", "tick", "middle")
    c.line(left, bottom, right, bottom, "axis")
    c.text((left + right) / 2, height - 8, axis, "axis-name", "middle")

    taken = []
    for level in levels:
        c.rectangle(left, y.at(level.high), right - left, y.at(level.low) - y.at(level.high), "level-band")
        c.line(left, y.at(level.value), right, y.at(level.value), "level")
        text = f"{level.label}, not trained"
        c.text(left + 6, y.at(level.value) - 5, text, "label plain")
        taken.append(Box(left + 6, y.at(level.value) - 16, labels.text_width(text), 15))
    for k, s in enumerate(stopped):
        at, height_of_text = x.at(s.cost), bottom - 6 - 15 * k
        c.line(at, top, at, bottom, "stopped")
        text, flip = f"✕ {s.label}", at > (left + right) / 2
        c.text(at - 5 if flip else at + 5, height_of_text, text, "label", "end" if flip else "start")
        long = labels.text_width(text)
        taken.append(Box(at - 5 - long if flip else at + 5, height_of_text - 11, long, 15))
    steps = [(x.at(costs[i]), y.at(points[i].value)) for i in front]
    corners = [q for k, p in enumerate(steps) for q in ([(p[0], steps[k - 1][1])] if k else []) + [p]]
    c.path(corners, "front")
    taken += [
        Box(min(a[0], b[0]) - 1, min(a[1], b[1]) - 1, abs(a[0] - b[0]) + 2, abs(a[1] - b[1]) + 2)
        for a, b in itertools.pairwise(corners)
    ]

    spots = [(x.at(k), y.at(p.value)) for k, p in zip(costs, points, strict=True)]
    bars = [Box(sx - 2, y.at(p.high), 4, y.at(p.low) - y.at(p.high)) for (sx, _), p in zip(spots, points, strict=True)]
    boxes = labels.place(spots, [p.label for p in points], Box(left, top, right - left, bottom - top), bars + taken)
    for (sx, sy), p, box in zip(spots, points, boxes, strict=True):
        c.line(sx, y.at(p.low), sx, y.at(p.high), "bar")
        if box:
            ax, ay = labels.anchor((sx, sy), box)
            if (ax - sx) ** 2 + (ay - sy) ** 2 > 14**2:
                c.line(sx, sy, ax, ay, "leader")
    for (sx, sy), p, box in zip(spots, points, boxes, strict=True):
        c.dot(sx, sy, "dot tied" if p.tied else "dot", p.tip, p.href)
        if box:
            _label(c, p.label, sx, box)
    unnamed = [f"{p.label} ({p.tip})" for p, box in zip(points, boxes, strict=True) if box is None]
    return c.drawing(unnamed=unnamed)


def _label(c: Canvas, text: str, x: float, box: Box) -> None:
    """Write a name into its box, aligned to the side that faces its point: the box is wider than most fonts need."""
    y = box.y + box.height - 3.5
    if box.x >= x:
        c.text(box.x + 1, y, text, "label")
    elif box.x + box.width <= x:
        c.text(box.x + box.width - 1, y, text, "label", "end")
    else:
        c.text(box.x + box.width / 2, y, text, "label", "middle")


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the points that no other point beats in both x (lower) and y (higher), by rising x; of equals, the first."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


@dataclass(frozen=True)
class ChartSeries:
    """One line of a chart: a value per step."""

    label: str
    values: Sequence[float]


def smooth(values: Sequence[float], reach: int = 2) -> list[float]:
    """Return the mean over `reach` steps to either side, fewer at the ends."""
    windows = (values[max(0, t - reach) : t + reach + 1] for t in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def learning(title: str, series: Sequence[ChartSeries]) -> Drawing:
    """Draw the training loss of every step, faint, and its moving mean, each named at its end."""
    c, x, left, right, top, bottom = _steps(
        title,
        f"Training loss of {len(series)} Cells, step by step: the mean of five steps over the raw values.",
        series,
    )
    y = linear([v for s in series for v in s.values], bottom, top)
    for tick in y.ticks():
        c.line(left, y.at(tick), right, y.at(tick), "grid")
        c.text(left - 7, y.at(tick) + 4, f"{tick:.3g}", "tick", "end")
    lines = [[(x.at(t), y.at(v)) for t, v in enumerate(smooth(s.values))] for s in series]
    for k, s in enumerate(series):
        c.path([(x.at(t), y.at(v)) for t, v in enumerate(s.values)], f"raw c{k % _HUES}")
    _named(c, series, lines, right, top, bottom)
    return c.drawing(unnamed=[])


def errors(title: str, series: Sequence[ChartSeries], allowed: ChartSeries) -> Drawing:
    """Draw |loss - float64 loss| of every step on a logarithmic axis, with the allowance.

    Errors of 0, and errors too small for the axis, lie on its lower edge.
    """
    c, x, left, right, top, bottom = _steps(
        title,
        "Distance of each Cell's loss from the float64 loss, step by step, and the bound it is judged by.",
        series,
    )
    positive = [v for s in (*series, allowed) for v in s.values if v > 0] or [1.0]
    # Two losses may agree to many digits by chance; such a dip must not flatten the other curves.
    deepest = min((v for v in allowed.values if v > 0), default=0.0) / 1e3
    y = logarithmic([max(min(positive), deepest), max(positive)], bottom, top)
    for tick in y.ticks():
        c.line(left, y.at(tick), right, y.at(tick), "grid")
        c.text(left - 7, y.at(tick) + 4, f"{tick:.0e}", "tick", "end")
    everything = [*series, allowed]
    lines = [[(x.at(t), y.at(v)) for t, v in enumerate(s.values)] for s in everything]
    _named(c, everything, lines, right, top, bottom, bound=len(series))
    return c.drawing(unnamed=[])


def _steps(
    title: str, description: str, series: Sequence[ChartSeries]
) -> tuple[Canvas, Scale, float, float, float, float]:
    """Start a chart over training steps, with room for names at the right."""
    longest = max((labels.text_width(s.label) for s in series), default=0.0)
    width, height, left, top, bottom = 880, 320, 56, 10, 276
    right = width - min(_NAMES, longest) - 24
    c = Canvas(title, description, width, height)
    x = Scale(0, max(1, *(len(s.values) - 1 for s in series)), left, right)
    for tick in x.ticks(8):
        if tick == int(tick):
            c.line(x.at(tick), bottom, x.at(tick), bottom + 4, "axis")
            c.text(x.at(tick), bottom + 18, f"{tick:.0f}", "tick", "middle")
    c.line(left, bottom, right, bottom, "axis")
    c.text((left + right) / 2, height - 8, "optimizer step", "axis-name", "middle")
    return c, x, left, right, top, bottom


def _named(
    c: Canvas,
    series: Sequence[ChartSeries],
    lines: Sequence[Sequence[tuple[float, float]]],
    right: float,
    top: float,
    bottom: float,
    bound: int | None = None,
) -> None:
    """Draw lines with their names at the right end, spread so that they do not overlap."""
    heights = labels.spread([line[-1][1] for line in lines], top + 6, bottom)
    for k, (s, line, at) in enumerate(zip(series, lines, heights, strict=True)):
        kind = "bound" if k == bound else f"curve c{k % _HUES}"
        c.path(line, kind, tip=s.label)
        c.path([line[-1], (right + 8, at), (right + 16, at)], "leader" if k == bound else f"lead c{k % _HUES}")
        c.text(right + 20, at + 4, labels.fitted(s.label, _NAMES), "label")


NO_PHASE = "in no phase"


@dataclass(frozen=True)
class PhaseBars:
    """Phases of one Cell in seconds."""

    label: str
    startup: float
    """Time before the Cell's own work."""
    phases: Sequence[tuple[str, float]]
    """Names and times of the phases."""


def phases(title: str, lives: Sequence[PhaseBars]) -> Drawing:
    """Draw the time of each Cell by phase, with its start-up to the left of the zero line."""
    names = list(dict.fromkeys(name for life in lives for name, _ in life.phases))
    names.sort(key=lambda name: name == NO_PHASE)
    kinds = {name: "fill rest" if name == NO_PHASE else f"fill f{k % _FILLS}" for k, name in enumerate(names)}
    row, top = 24, 50
    height = top + row * len(lives) + 42
    left = 12 + min(_NAMES, max(labels.text_width(life.label) for life in lives))
    right = 880.0 - 74
    before = max(life.startup for life in lives)
    after = max(sum(s for _, s in life.phases) for life in lives)
    total = (before + after) or 1.0
    c = Canvas(title, f"Seconds in each phase of {len(lives)} Cells; start-up to the left of zero.", 880, height)
    x = Scale(-before, -before + total * 1.02, left, right)

    along, line = 12.0, 6.0
    for name, kind in {"start-up": "startup", **kinds}.items():
        if along + labels.text_width(name) + 16 > c.width:
            along, line = 12.0, line + 17
        c.rectangle(along, line, 11, 11, kind)
        c.text(along + 16, line + 10, name, "label")
        along += labels.text_width(name) + 26
    bottom = top + row * len(lives)
    for tick in x.ticks(8):
        c.line(x.at(tick), top - 4, x.at(tick), bottom, "axis" if tick == 0 else "grid")
        c.text(x.at(tick), bottom + 15, f"{abs(tick):.3g}", "tick", "middle")
    c.text((left + right) / 2, height - 6, "seconds (start-up left of 0)", "axis-name", "middle")
    for i, life in enumerate(lives):
        y = top + i * row
        c.text(left - 8, y + 13, labels.fitted(life.label, _NAMES), "label", "end", tip=life.label)
        c.rectangle(
            x.at(-life.startup), y + 3, x.at(0) - x.at(-life.startup), 13, "startup", _tip("start-up", life.startup)
        )
        at = 0.0
        for name, spent in life.phases:
            c.rectangle(x.at(at), y + 3, x.at(at + spent) - x.at(at), 13, kinds[name], _tip(name, spent))
            at += spent
        c.text(x.at(at) + 6, y + 13, formatting.seconds(life.startup + at), "tick")
    return c.drawing(unnamed=[])


def _tip(name: str, spent: float) -> str:
    return f"{name}: {formatting.seconds(spent)}"
