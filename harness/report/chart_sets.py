"""Charts of a run: accuracy against costs, ranks and learning rates; losses by step; time by phase.

A chart set has one figure, or several of which the reader chooses one, and one legend for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

from harness.analysis import contention, measurements, metrics, tuning
from harness.analysis.grouping import group
from harness.analysis.metrics import Metric
from harness.analysis.ranking import Group, RankingEntry
from harness.analysis.run_facts import RunFacts
from harness.analysis.verdict import QuestionVerdict
from harness.errors import plural
from harness.records import naming
from harness.records.record import ADAPTER_CONFIG, Cell, Record
from harness.report import formatting, links
from harness.report.svg import charts
from harness.report.svg.canvas import Drawing
from harness.report.svg.charts import Point, Series
from harness.report.svg.scales import WIDE, Axis

ChartSet = dict[str, Any]
_CURVES = 8
"""Largest number of learning curves that a chart shows before the reader picks others."""
_RISE = 1.25
"""Learning curves are drawn up to this multiple of the highest first loss."""
_POINTS = 150
"""Largest number of points of a drawn curve."""
_BARS = 24
"""Largest number of bars of time. If there are more Cells, a bar is the mean of the Cells of a recipe, or of a method."""
_IN_NO_PHASE = "in no phase"
_STEPS = Axis("optimizer step", "{:.0f}".format)
_UNITS: dict[str, tuple[float, str, Callable[[float], str], Callable[[float], str]]] = {
    "B": (formatting.MIB, " MiB", formatting.mebibytes, "{:,.6g}".format),
    "s": (1e-3, " ms", formatting.milliseconds, "{:,.6g}".format),
    "1": (1.0, "", "{:,.0f}".format, formatting.short_count),
}
"""For each unit of a cost: the shown unit, its name, and functions that format a value and a tick in the shown unit."""


def every(f: RunFacts) -> list[ChartSet]:
    """Return all chart sets of a run."""
    found = [accuracy(f, g) for g in f.groups] + [errors(f, j) for j in f.verdict.judgements]
    return [*filter(None, found), *rates(f), *curves(f), *time(f)]


def _set(title: str, figures: Sequence[Drawing], series: Sequence[Series], note: str = "") -> ChartSet:
    legend = [{"series": k, "name": s.name, "shown": s.shown, "sample": charts.sample(s)} for k, s in enumerate(series)]
    return {"title": title, "figures": list(figures), "legend": legend, "note": note}


def _figure(
    name: str, drawing: Drawing, series: Sequence[Series], notes: Iterable[str] = (), choice: str = ""
) -> Drawing:
    legend = charts.legend([s for s in series if s.shown and (s.points or s.kind == "fill")])
    return {**drawing, "title": name, "choice": choice, "notes": [n for n in notes if n], "legend": legend}


def _method(cell: Cell) -> str:
    """Return the name of a Cell's method and implementation: its label without model, rank and search."""
    config = {key: value for key, value in cell.config.items() if key == ADAPTER_CONFIG}
    whole = cell.evaluation.model_copy(update={"skip": 0})
    return naming.short(cell.model_copy(update={"config": config, "evaluation": whole}))


def _coloured(f: RunFacts, named: Mapping[str, Cell]) -> list[Series]:
    """Return an empty series for each name. A method has the same hue in all charts of a run."""
    hues = {method: k for k, method in enumerate(dict.fromkeys(map(_method, f.run.manifest.cells)))}
    used: dict[int, int] = dict.fromkeys(hues.values(), -1)
    found = []
    for name, cell in named.items():
        hue = hues[_method(cell)]
        used[hue] += 1
        found.append(Series(name, hue, variant=used[hue]))
    return found


def _place(cell: Cell) -> str:
    return f"{cell.model} · {cell.task}"


def _rank(e: RankingEntry) -> float | None:
    config = e.record.cell.config
    adapter = config.get(ADAPTER_CONFIG)
    rank = config.get("rank", adapter.get("r") if isinstance(adapter, dict) else None)
    return float(rank) if isinstance(rank, int | float) and rank > 0 else None


def _percent_chart(x: Axis, series: Sequence[Series], *, front: bool = False) -> Drawing:
    return charts.xy(x, Axis("", lambda share: f"{100 * share:.4g} %"), series, front=front)


def accuracy(f: RunFacts, g: Group) -> ChartSet | None:
    """Return the charts of accuracy against each cost that was measured, and against the rank.

    Return None for fewer than two trained recipes.
    """
    if not g.is_ranking:
        return None
    names = links.entry_names(f, g.entries)
    lines: dict[str, list[RankingEntry]] = {}
    for e in sorted(g.ranked, key=lambda e: _rank(e) or 0.0):
        name = names[id(e)] if (rank := _rank(e)) is None else names[id(e)].replace(f" r={rank:g}", "", 1)
        lines.setdefault(name, []).append(e)
    empty = _coloured(f, {name: line[0].record.cell for name, line in lines.items()})
    across = [
        Series(f"{names[id(e)]}, not trained", charts.REST, [Point(0.0, s.value, s.low, s.high)], kind="level")
        for e in g.untrained
        if (s := e.score)
    ]

    def placed(spots: dict[int, Spot]) -> list[Series]:
        """Return the lines with a point for each entry that has a place."""
        drawn = [
            replace(s, points=[_point(f, e, names[id(e)], *spots[id(e)]) for e in line if id(e) in spots])
            for s, line in zip(empty, lines.values(), strict=True)
        ]
        return [*drawn, *across]

    figures = []
    for metric in metrics.costs():
        spots = {id(e): spot for e in g.ranked if (spot := _spot(metric, e))}
        if len(spots) > 1:
            missing = [name for e in g.ranked if id(e) not in spots and (name := names[id(e)])]
            figures.append(_against(metric, placed(spots), missing))
    ranks = {id(e): Spot(rank, f"rank {rank:g}") for e in g.ranked if (rank := _rank(e))}
    swept = [
        s if s.kind == "level" or len({p.x for p in s.points}) > 1 else replace(s, points=()) for s in placed(ranks)
    ]
    if ticks := _xs(swept):
        chart = _percent_chart(Axis.suited("rank", "{:g}".format, ticks, ticks), swept)
        figures.append(_figure("Accuracy against rank", chart, swept, ["Methods with at least two ranks."], "rank"))
    note = "Bars: 95 % intervals. A line joins the ranks of one method, from the lowest to the highest."
    return _set(_place(g.ranked[0].record.cell), figures, [*empty, *across], note) if figures else None


class Spot(NamedTuple):
    """Place of a recipe on the horizontal axis."""

    x: float
    """Value in the unit of the axis."""
    text: str
    """The value with its name and unit."""
    busy: bool = False
    """True if other programs made the value too high."""


def _spot(metric: Metric, e: RankingEntry) -> Spot | None:
    cost = e.typical(metric.value)
    if cost is None:
        return None
    size, unit, write, _ = _UNITS[metric.unit]
    busy = sum(bool(contention.busy(r)) for r in e.records) if metric.kind == "timed" else 0
    flag = f" (! too high: other programs used the CPU in {busy} of {plural(len(e.records), 'run')})" if busy else ""
    return Spot(cost / size, f"{metric.axis} {write(cost)}{unit}{flag}", bool(busy))


def _point(f: RunFacts, e: RankingEntry, name: str, x: float, text: str, busy: bool) -> Point:
    records = f"Record{'s' * (len(e.records) > 1)} {', '.join(r.id for r in e.records)}"
    tip = f"{name}: {formatting.accuracy(e.score)}, {text}; {records}"
    href = f"#{links.anchor(f, e.record.cell_id)}"
    return Point(x, e.score.value, e.score.low, e.score.high, tip, href, busy, hollow=e.standing == "below")


def _xs(series: Sequence[Series]) -> tuple[float, ...]:
    return tuple({p.x for s in series if s.kind == "line" for p in s.points})


def _against(metric: Metric, series: Sequence[Series], missing: Sequence[str]) -> Drawing:
    _, unit, _, tick = _UNITS[metric.unit]
    points = [p for s in series if s.kind == "line" for p in s.points]
    front = [points[i].tip.partition(": ")[0] for i in charts.pareto([(p.x, p.y) for p in points])]
    busy = sum(p.busy for p in points)
    notes = [
        f"{formatting.sentence(metric.meaning)}.",
        f"On the dashed front, where no other recipe is both cheaper and more accurate: {', '.join(front)}.",
        f"! A dashed ring marks a time that other programs made too high: {busy} of {len(points)}." if busy else "",
        "Hollow: a test tells it apart from the highest." if any(p.hollow for p in points) else "",
        f"Without a value: {', '.join(missing)}." if missing else "",
    ]
    chart = _percent_chart(Axis.suited(metric.axis + unit.replace(" ", ", "), tick, _xs(series)), series, front=True)
    return _figure(f"Accuracy against {metric.axis}", chart, series, notes, metric.axis)


def rates(f: RunFacts) -> list[ChartSet]:
    """Return charts of accuracy against the learning rate, by model and task, for searches with two scored rates."""
    searches = [search for search in tuning.searches(f.run) if len(search.scored) > 1]
    found = []
    for title, same in group((_place(search.tries[0].cell), search) for search in searches).items():
        empty = _coloured(f, {search.tuning.entry: search.tries[0].cell for search in same})
        series = [replace(s, points=_tries(f, search)) for s, search in zip(empty, same, strict=True)]
        ticks = _xs(series)
        chart = _percent_chart(Axis.suited("learning rate", "{:g}".format, ticks, ticks), series)
        note = "Filled: the chosen rate. Bars: 95 % intervals over test items that no ranking uses. A point is one run."
        found.append(_set(title, [_figure("Accuracy against learning rate", chart, series)], series, note))
    return found


def _tries(f: RunFacts, search: tuning.Search) -> list[Point]:
    return [
        Point(
            t.lr, s.value, s.low, s.high, hollow=not t.chosen, href=f"#{links.anchor(f, t.cell.cell_id)}",
            tip=f"{search.tuning.entry}: {formatting.accuracy(s)} with lr={t.lr:g}{', the chosen rate' if t.chosen else ''}",
        )
        for t in search.tries if (s := t.score)
    ]  # fmt: skip


def curves(f: RunFacts) -> list[ChartSet]:
    """Return charts of the training losses, by model and task. The curve of several seeds shows mean losses."""
    trained = [record for record in f.latest.values() if record.training and record.training.losses]
    recipes = group((record.cell.recipe_id, record) for record in trained).values()
    places = group((_place(records[0].cell), records) for records in recipes)
    return [_curves(f, title, same) for title, same in places.items()]


def _curves(f: RunFacts, title: str, recipes: Sequence[Sequence[Record]]) -> ChartSet:
    """Return the chart of one model and task. At first it shows the best recipe of each method, and no search."""
    cells = [records[0].cell for records in recipes]
    names = links.short_names(cells, [_recipe(f, records) for records in recipes])
    raw = [_mean_losses(records) for records in recipes]
    order = {r.cell_id: k for g in f.groups for k, e in enumerate(g.ranked) for r in e.records}
    best_first = sorted(range(len(cells)), key=lambda i: order.get(cells[i].cell_id, len(order)))
    best = {_method(cells[i]): i for i in reversed(best_first)}.values()
    shown = sorted(best, key=best_first.index)[:_CURVES]
    bound = _RISE * max((losses[0] for losses in raw if math.isfinite(losses[0])), default=1.0)
    means = [smooth(losses) for losses in raw]
    series = [
        _curve(s, [v if v <= bound else bound for v in mean], shown=i in shown)
        for i, (s, mean) in enumerate(zip(_coloured(f, dict(zip(names, cells, strict=True))), means, strict=True))
    ]
    y = Axis.suited("", "{:.3g}".format, [p.y for s in series for p in s.points])
    over = [
        f"{name} {_highest(losses)}"
        for name, losses, mean in zip(names, raw, means, strict=True)
        if not all(v <= bound for v in mean)
    ]
    notes = [
        "Mean of five steps, and of all seeds, in nats."
        + (f" Logarithmic, since the highest is more than {WIDE:g} times the lowest." if y.log else ""),
        f"Drawn up to {bound:.3g}, {_RISE:g} times the highest first loss: {'; '.join(over)}." if over else "",
    ]
    note = f"Shown at first: the best recipe of each method, at most {_CURVES}." if len(shown) < len(series) else ""
    return _set(title, [_figure("Training loss", charts.xy(_STEPS, y, series), series, notes)], series, note)


def _recipe(f: RunFacts, records: Sequence[Record]) -> str:
    cell = records[0].cell
    return f.names[cell.cell_id] if len(records) == 1 else f.recipes[cell.recipe_id]


def _mean_losses(records: Sequence[Record]) -> list[float]:
    return [fmean(step) for step in zip(*(r.training.losses for r in records if r.training), strict=True)]


def smooth(values: Sequence[float], reach: int = 2) -> list[float]:
    """Return the moving mean of `values`. Each mean covers a value and up to `reach` neighbours on either side."""
    return [fmean(values[max(0, t - reach) : t + reach + 1]) for t in range(len(values))]


def _highest(losses: Sequence[float]) -> str:
    broken = next((t for t, v in enumerate(losses) if not math.isfinite(v)), None)
    if broken is not None:
        return f"is not finite from step {broken}"
    return f"rises to {max(losses):.3g} at step {losses.index(max(losses))}"


def _curve(s: Series, values: Sequence[float], *, shown: bool = True, kind: str = "curve") -> Series:
    """Return a series as a curve over the steps. Of many steps, every second, third, ... has a point."""
    steps = range(0, len(values), math.ceil(len(values) / _POINTS))
    tip = f"{s.name}: {values[0]:.3g} at the first step, {values[-1]:.3g} at the last"
    texts = [f"{t}: {values[t]:.3g}" for t in steps]
    return replace(s, points=[Point(float(t), values[t]) for t in steps], shown=shown, kind=kind, tip=tip, texts=texts)


def errors(f: RunFacts, judgement: QuestionVerdict) -> ChartSet | None:
    """Return the chart of |loss - float64 loss| by step and of the largest allowed error, for `same-losses`.

    An error that is 0, or too small for the axis, is drawn at its lower edge.
    """
    compared = [s for s in judgement.trajectories or () if s.errors]
    if not compared:
        return None
    by_noise = [s for s in compared if s.by == "noise"]
    allowed = (by_noise or compared)[0].allowed
    positive = [v for s in compared for v in (*s.errors, *allowed) if v > 0] or [1.0]
    # Two losses may agree to many digits by chance; such a dip must not flatten the other curves.
    lowest = max(min(positive), min((v for v in allowed if v > 0), default=0.0) / 1e3)
    cells = {cell.cell_id: cell for cell in f.run.manifest.cells}
    empty = _coloured(f, {f.names[s.cell_id]: cells[s.cell_id] for s in compared})
    limit = Series("allowed" if by_noise else "allowed growth", charts.REST)
    series = [_curve(s, [max(v, lowest) for v in one.errors]) for s, one in zip(empty, compared, strict=True)]
    series.append(_curve(limit, [max(v, lowest) for v in allowed], kind="bound"))
    chart = charts.xy(_STEPS, Axis("", "{:.0e}".format, log=True), series)
    return _set(judgement.comparison.says, [_figure("Distance from the float64 losses", chart, series)], series)


def time(f: RunFacts) -> list[ChartSet]:
    """Return charts of the time by phase, by model and task.

    A bar is a Cell. In a chart of many Cells, it is the mean of the Cells of a recipe, or of a method; see `_BARS`.
    """
    records = [record for record in f.latest.values() if record.phases]
    phases = dict.fromkeys(p.name for record in records for p in record.phases if p.name != measurements.STARTUP)
    hues = {
        measurements.STARTUP: charts.OUTLINED, **{name: k for k, name in enumerate(phases)}, _IN_NO_PHASE: charts.REST
    }  # fmt: skip
    places = group((_place(record.cell), record) for record in records)
    return [_time(f, title, same, hues) for title, same in places.items()]


def _time(f: RunFacts, title: str, records: Sequence[Record], hues: dict[str, int]) -> ChartSet:
    levels = {"Cell": f.names, "recipe": {r.cell_id: f.recipes[r.cell.recipe_id] for r in records}}
    levels["method"] = {r.cell_id: _method(r.cell) for r in records}
    fitting = (level for level, names in levels.items() if len({names[r.cell_id] for r in records}) <= _BARS)
    level = next(fitting, "method")
    short = links.short_names([r.cell for r in records], [levels[level][r.cell_id] for r in records])
    rows = {name: _mean_seconds(same, hues) for name, same in group(zip(short, records, strict=True)).items()}
    used = [k for k in range(len(hues)) if any(parts[k] for parts in rows.values())]
    series = [Series(name, hue, kind="fill") for k, (name, hue) in enumerate(hues.items()) if k in used]
    longest_first = sorted(rows.items(), key=lambda pair: -sum(pair[1]))
    parts = {name: [seconds[k] for k in used] for name, seconds in longest_first}
    chart = charts.bars(Axis("seconds", "{:.4g}".format), parts, series, formatting.seconds)
    note = "" if level == "Cell" else f"Each bar is the mean of all Cells of a {level}; {len(records)} Cells in total."
    return _set(title, [_figure(f"Time of each {level} by phase", chart, series)], series, note)


def _mean_seconds(records: Sequence[Record], phases: Iterable[str]) -> list[float]:
    spent = group((p.name, p.seconds) for record in records for p in record.phases)
    spent[_IN_NO_PHASE] = [measurements.unaccounted_seconds(record) for record in records]
    return [sum(spent.get(name, ())) / len(records) for name in phases]
