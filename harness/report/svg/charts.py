"""The four charts of a report: accuracy against a cost, learning curves, errors of the loss, and time by phase."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.report import formatting
from harness.report.svg import labels
from harness.report.svg.canvas import Canvas, Drawing
from harness.report.svg.labels import Box
from harness.report.svg.scales import Scale, linear, logarithmic

_HUES = 8  # colour classes c0..c7 in the style sheet, each with its own dash pattern
_FILLS = 9  # f0..f8
_NAMES = 420.0
"""Maximum width of a name in a drawing, in SVG units. A longer name is cut."""


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
    """Text of the point's tooltip."""
    href: str


@dataclass(frozen=True)
class Level:
    """The accuracy of an untrained Cell. It is drawn as a horizontal line, because an untrained Cell has no cost."""

    label: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Stopped:
    """A Cell that stopped, e.g. out of memory, so that it has a cost but no accuracy."""

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
    """Draw a chart of accuracy against a cost, with the Pareto front.

    Each point has an interval and a name. The drawing's `unnamed` lists the points whose names do not fit.
    """
    front = pareto([(p.cost, p.value) for p in points])
    description = (
        f"{len(points)} Cells. On the Pareto front (cheaper and better than all others): "
        + ", ".join(points[i].label for i in front)
        + ". The table below holds the same numbers."
    )
    plot = _Plot(Canvas(title, description, 600, 380), left=52, right=590, top=12, bottom=336)
    c, left, right, top, bottom = plot.canvas, plot.left, plot.right, plot.top, plot.bottom
    intervals: Sequence[Point | Level] = [*points, *levels]
    y = linear([v for one in intervals for v in (one.low, one.high)], bottom, top)
    shown = [p.cost for p in points] + [s.cost for s in stopped]
    x = logarithmic(shown, left + 8, right - 8, 0.09) if log else linear(shown, left + 8, right - 8, 0.12)
    plot.y_axis(y, [(tick, f"{100 * tick:.4g} %") for tick in y.ticks(7)])
    plot.x_axis(x, axis, [(t, formatting.short_count(t) if log else f"{t:,.6g}") for t in x.ticks(6)])

    taken = []
    for level in levels:
        c.rectangle(left, y.at(level.high), right - left, y.at(level.low) - y.at(level.high), "level-band")
        c.line(left, y.at(level.value), right, y.at(level.value), "level")
        text = f"{level.label}, not trained"
        c.text(left + 6, y.at(level.value) - 5, text, "label plain")
        taken.append(Box(left + 6, y.at(level.value) - 16, labels.text_width(text), 15))
    for k, s in enumerate(stopped):
        at, height = x.at(s.cost), bottom - 6 - 15 * k
        c.line(at, top, at, bottom, "stopped")
        text, to_the_left = f"✕ {s.label}", at > (left + right) / 2
        width = labels.text_width(text)
        c.text(at - 5 if to_the_left else at + 5, height, text, "label", "end" if to_the_left else "start")
        taken.append(Box(at - 5 - width if to_the_left else at + 5, height - 11, width, 15))
    spots = [(x.at(p.cost), y.at(p.value)) for p in points]
    steps = [spots[i] for i in front]
    corners = [q for k, p in enumerate(steps) for q in ([(p[0], steps[k - 1][1])] if k else []) + [p]]
    c.path(corners, "front")
    taken += [
        Box(min(a[0], b[0]) - 1, min(a[1], b[1]) - 1, abs(a[0] - b[0]) + 2, abs(a[1] - b[1]) + 2)
        for a, b in itertools.pairwise(corners)
    ]

    bars = [Box(sx - 2, y.at(p.high), 4, y.at(p.low) - y.at(p.high)) for (sx, _), p in zip(spots, points, strict=True)]
    boxes = labels.place(spots, [p.label for p in points], Box(left, top, right - left, bottom - top), bars + taken)
    for (sx, sy), p, box in zip(spots, points, boxes, strict=True):
        c.line(sx, y.at(p.low), sx, y.at(p.high), "bar")
        if box and math.dist((sx, sy), end := labels.anchor((sx, sy), box)) > 14:
            c.line(sx, sy, *end, "leader")
    for (sx, sy), p, box in zip(spots, points, boxes, strict=True):
        c.dot(sx, sy, "dot tied" if p.tied else "dot", p.tip, p.href)
        if box:
            _label(c, p.label, sx, box)
    unnamed = [f"{p.label} ({p.tip})" for p, box in zip(points, boxes, strict=True) if box is None]
    return c.drawing(unnamed=unnamed)


@dataclass(frozen=True)
class _Plot:
    """A canvas and the area inside its axes."""

    canvas: Canvas
    left: float
    right: float
    top: float
    bottom: float

    def y_axis(self, y: Scale, ticks: Iterable[tuple[float, str]]) -> None:
        """Draw a line across the plot for each tick, with its text on the left."""
        for tick, text in ticks:
            self.canvas.line(self.left, y.at(tick), self.right, y.at(tick), "grid")
            self.canvas.text(self.left - 7, y.at(tick) + 4, text, "tick", "end")

    def x_axis(self, x: Scale, name: str, ticks: Iterable[tuple[float, str]]) -> None:
        """Draw the axis at the bottom, with its ticks and its name."""
        c = self.canvas
        for tick, text in ticks:
            c.line(x.at(tick), self.bottom, x.at(tick), self.bottom + 4, "axis")
            c.text(x.at(tick), self.bottom + 18, text, "tick", "middle")
        c.line(self.left, self.bottom, self.right, self.bottom, "axis")
        c.text((self.left + self.right) / 2, c.height - 8, name, "axis-name", "middle")


def _label(c: Canvas, text: str, x: float, box: Box) -> None:
    """Write a name into its box. If the text is narrower than the box, write it at the side near the point."""
    y = box.y + box.height - 3.5
    if box.x >= x:
        c.text(box.x + 1, y, text, "label")
    elif box.x + box.width <= x:
        c.text(box.x + box.width - 1, y, text, "label", "end")
    else:
        c.text(box.x + box.width / 2, y, text, "label", "middle")


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points on the Pareto front, sorted by x. Lower x and higher y are better.

    Of equal points, only the first is returned.
    """
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
    """Return the moving mean of `values`. Each mean covers a value and up to `reach` neighbours on either side."""
    windows = (values[max(0, t - reach) : t + reach + 1] for t in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def learning(title: str, series: Sequence[ChartSeries]) -> Drawing:
    """Draw the training loss of every step as a faint line, and its moving mean as a line with a name at its end."""
    description = f"Training loss of {len(series)} Cells, step by step: the mean of five steps over the raw values."
    plot, x = _over_steps(title, description, series)
    y = linear([v for s in series for v in s.values], plot.bottom, plot.top)
    plot.y_axis(y, [(tick, f"{tick:.3g}") for tick in y.ticks()])
    for k, s in enumerate(series):
        plot.canvas.path([(x.at(t), y.at(v)) for t, v in enumerate(s.values)], f"raw c{k % _HUES}")
    _named(plot, x, y, [ChartSeries(s.label, smooth(s.values)) for s in series])
    return plot.canvas.drawing(unnamed=[])


def errors(title: str, series: Sequence[ChartSeries], allowed: ChartSeries) -> Drawing:
    """Draw |loss - float64 loss| of every step on a logarithmic axis, and the largest allowed error.

    An error of 0 is drawn at the lower edge of the chart, and so is an error too small for the axis.
    """
    description = (
        "Distance of the loss of each Cell from the float64 loss, step by step, and the largest allowed distance."
    )
    plot, x = _over_steps(title, description, series)
    positive = [v for s in (*series, allowed) for v in s.values if v > 0] or [1.0]
    # Two losses may agree to many digits by chance; such a dip must not flatten the other curves.
    deepest = min((v for v in allowed.values if v > 0), default=0.0) / 1e3
    y = logarithmic([max(min(positive), deepest), max(positive)], plot.bottom, plot.top)
    plot.y_axis(y, [(tick, f"{tick:.0e}") for tick in y.ticks()])
    _named(plot, x, y, [*series, allowed], bound=len(series))
    return plot.canvas.drawing(unnamed=[])


def _over_steps(title: str, description: str, series: Sequence[ChartSeries]) -> tuple[_Plot, Scale]:
    """Start a chart over training steps, with room for names on the right. Return its plot and its x scale."""
    longest = max((labels.text_width(s.label) for s in series), default=0.0)
    width = 880
    plot = _Plot(Canvas(title, description, width, 320), 56, width - min(_NAMES, longest) - 24, 10, 276)
    x = Scale(0, max(1, *(len(s.values) - 1 for s in series)), plot.left, plot.right)
    plot.x_axis(x, "optimizer step", [(tick, f"{tick:.0f}") for tick in x.ticks(8) if tick == int(tick)])
    return plot, x


def _named(plot: _Plot, x: Scale, y: Scale, series: Sequence[ChartSeries], bound: int | None = None) -> None:
    """Draw each series as a line, with its name at the right end. Names do not overlap.

    bound: index of the series that holds the largest allowed errors.
    """
    lines = [[(x.at(t), y.at(v)) for t, v in enumerate(s.values)] for s in series]
    heights = labels.spread([line[-1][1] for line in lines], plot.top + 6, plot.bottom)
    c, right = plot.canvas, plot.right
    for k, (s, line, at) in enumerate(zip(series, lines, heights, strict=True)):
        c.path(line, "bound" if k == bound else f"curve c{k % _HUES}", tip=s.label)
        c.path([line[-1], (right + 8, at), (right + 16, at)], "leader" if k == bound else f"lead c{k % _HUES}")
        c.text(right + 20, at + 4, labels.fitted(s.label, _NAMES), "label")


NO_PHASE = "in no phase"


@dataclass(frozen=True)
class PhaseBars:
    """The time of one Cell: its start-up, then its phases."""

    label: str
    startup: float
    """Seconds before the first phase."""
    phases: Sequence[tuple[str, float]]
    """Pairs (name of a phase, seconds)."""


def phases(title: str, cells: Sequence[PhaseBars]) -> Drawing:
    """Draw the time of each Cell by phase, with its start-up to the left of the zero line."""
    names = sorted(dict.fromkeys(name for cell in cells for name, _ in cell.phases), key=lambda name: name == NO_PHASE)
    kinds = {name: "fill rest" if name == NO_PHASE else f"fill f{k % _FILLS}" for k, name in enumerate(names)}
    row, top = 24, 50
    bottom = top + row * len(cells)
    left = 12 + min(_NAMES, max(labels.text_width(cell.label) for cell in cells))
    right = 880.0 - 74
    before = max(cell.startup for cell in cells)
    after = max(sum(s for _, s in cell.phases) for cell in cells)
    total = (before + after) or 1.0
    description = f"Seconds in each phase of {len(cells)} Cells; start-up to the left of zero."
    c = Canvas(title, description, 880, bottom + 42)
    x = Scale(-before, -before + total * 1.02, left, right)

    along, line = 12.0, 6.0
    for name, kind in {"start-up": "startup", **kinds}.items():
        if along + labels.text_width(name) + 16 > c.width:
            along, line = 12.0, line + 17
        c.rectangle(along, line, 11, 11, kind)
        c.text(along + 16, line + 10, name, "label")
        along += labels.text_width(name) + 26
    for tick in x.ticks(8):
        c.line(x.at(tick), top - 4, x.at(tick), bottom, "axis" if tick == 0 else "grid")
        c.text(x.at(tick), bottom + 15, f"{abs(tick):.3g}", "tick", "middle")
    c.text((left + right) / 2, c.height - 6, "seconds (start-up left of 0)", "axis-name", "middle")
    for i, cell in enumerate(cells):
        y, at = top + i * row, -cell.startup
        c.text(left - 8, y + 13, labels.fitted(cell.label, _NAMES), "label", "end", tip=cell.label)
        for name, kind, spent in [
            ("start-up", "startup", cell.startup),
            *((name, kinds[name], spent) for name, spent in cell.phases),
        ]:
            tip = f"{name}: {formatting.seconds(spent)}"
            c.rectangle(x.at(at), y + 3, x.at(at + spent) - x.at(at), 13, kind, tip)
            at += spent
        c.text(x.at(at) + 6, y + 13, formatting.seconds(cell.startup + at), "tick")
    return c.drawing(unnamed=[])
