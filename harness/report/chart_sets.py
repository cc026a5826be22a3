"""Charts of a run: accuracy against costs, ranks and learning rates; losses by step; time by phase.

A chart set has one or more figures, and one legend for all of them. The reader chooses which figure to see.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.analysis import measurements, metrics, tuning
from harness.analysis.grouping import group
from harness.analysis.metrics import Metric
from harness.analysis.ranking import Group, RankingEntry, Score
from harness.analysis.run_facts import RunFacts
from harness.analysis.run_verdict import QuestionVerdict
from harness.analysis.trajectories import JudgedTrajectory
from harness.errors import plural
from harness.records import naming
from harness.records.imported import LoggedLoss
from harness.records.record import ADAPTER_CONFIG, Cell, Record
from harness.report import formatting, links, recipes
from harness.report.svg import charts
from harness.report.svg.canvas import Drawing
from harness.report.svg.charts import Point, Series
from harness.report.svg.scales import Axis

ChartSet = dict[str, Any]
_CURVES = 8
"""Largest number of learning curves in a chart until the reader selects others."""
_RISE = 1.25
"""Learning curves are cut off above this multiple of the highest first loss of all curves."""
_POINTS = 150
"""Largest number of points of a drawn curve."""
_BARS = 24
"""Largest number of Cells for which the chart of time has one bar per Cell. With more Cells, it has one mean bar per
method."""
_STEPS = Axis("optimizer step", "{:.0f}".format, log=False, whole=True)
_UNITS: dict[str, tuple[float, str, Callable[[float], str], Callable[[float], str]]] = {
    "B": (formatting.MIB, " MiB", formatting.mebibytes, "{:,.6g}".format),
    "s": (1e-3, " ms", formatting.milliseconds, "{:,.6g}".format),
    "1": (1.0, "", "{:,.0f}".format, formatting.short_count),
}
"""Unit of a cost -> its display: (divisor, name of the unit after the division, function that formats a cost before the
division, function that formats a tick)."""


def every(f: RunFacts) -> list[ChartSet]:
    """Return all chart sets of a run, i.e. groups of figures with one legend."""
    found = [accuracy(f, g) for g in f.groups] + [errors(f, j) for j in f.verdict.judgements]
    return [*filter(None, found), *rates(f), *curves(f), *time(f)]


def _set(title: str, figures: Sequence[Drawing], series: Sequence[Series], note: str = "") -> ChartSet:
    legend = [{"series": k, "name": s.name, "shown": s.shown, "sample": charts.sample(s)} for k, s in enumerate(series)]
    return {"title": title, "figures": list(figures), "legend": legend, "note": note}


def _figure(name: str, drawing: Drawing, notes: Iterable[str] = (), choice: str = "") -> Drawing:
    return {**drawing, "title": name, "choice": choice, "notes": [n for n in notes if n]}


def _method(cell: Cell) -> str:
    """Return the name of a Cell's method and implementation, without the model, the rank and other settings."""
    config = {key: value for key, value in cell.config.items() if key == ADAPTER_CONFIG}
    whole = cell.evaluation.model_copy(update={"skip": 0})
    return naming.short(cell.model_copy(update={"config": config, "evaluation": whole}))


def _coloured(f: RunFacts, named: Mapping[str, Cell]) -> list[Series]:
    """Return an empty series for each name in `named`. A method has the same hue in all charts of a run."""
    hues = {method: k for k, method in enumerate(dict.fromkeys(map(_method, f.run.manifest.cells)))}
    earlier = {hue: itertools.count() for hue in hues.values()}
    pairs = [(name, hues[_method(cell)]) for name, cell in named.items()]
    return [Series(name, hue, variant=next(earlier[hue])) for name, hue in pairs]


def _place(cell: Cell) -> str:
    return f"{cell.model} · {cell.task}"


def _rank(e: RankingEntry) -> float:
    """Return the rank of the adapter that a recipe trains; 0 if it has none."""
    config = e.record.cell.config
    adapter = config.get(ADAPTER_CONFIG)
    rank = config.get("rank", adapter.get("r") if isinstance(adapter, dict) else None)
    return float(rank) if isinstance(rank, int | float) else 0.0


def _percent_chart(x: Axis, series: Sequence[Series], **more: bool) -> Drawing:
    return charts.xy(x, Axis("accuracy", lambda share: f"{100 * share:.4g} %", log=False), series, **more)


def accuracy(f: RunFacts, g: Group) -> ChartSet | None:
    """Return the charts of accuracy against each cost that was measured, and against the rank.

    For fewer than two trained recipes, return None. A recipe is a set of Cells that differ only in the seed.
    """
    if not g.is_ranking:
        return None
    names = links.entry_names(f, g.entries)
    lines = group((names[id(e)].replace(f" r={_rank(e):g}", "", 1), e) for e in g.ranked)
    empty = _coloured(f, {name: line[0].record.cell for name, line in lines.items()})
    levels = [
        Series(
            names[id(e)] + ("" if e.record.imported else ", not trained"),
            charts.REST,
            [_point(f, e, names[id(e)], 0.0, "")],
            kind="level",
        )
        for e in g.untrained
    ]

    def placed(points: dict[int, Point]) -> list[Series]:
        """Return the series with their points, by rising rank. points: by id() of their ranking entry."""
        drawn = [
            replace(s, points=[points[id(e)] for e in sorted(line, key=_rank) if id(e) in points])
            for s, line in zip(empty, lines.values(), strict=True)
        ]
        return [*drawn, *levels]

    figures = []
    for metric in metrics.costs():
        points = {id(e): point for e in g.ranked if (point := _at_cost(f, metric, e, names[id(e)]))}
        if len(points) > 1:
            figures.append(_against(metric, placed(points), [names[id(e)] for e in g.ranked if id(e) not in points]))
    ranks = {id(e): _point(f, e, names[id(e)], rank, f"rank {rank:g}") for e in g.ranked if (rank := _rank(e)) > 0}
    swept = [
        s if s.kind == "level" or len({p.x for p in s.points}) > 1 else replace(s, points=()) for s in placed(ranks)
    ]
    if any(s.points for s in swept if s.kind == "line"):
        chart = _percent_chart(Axis("rank", "{:g}".format, each=True), swept, bands=True)
        figures.append(_figure("Accuracy against rank", chart, ["Methods with at least two ranks."], "rank"))
    note = "Bars and bands: 95 % intervals. A line joins the ranks of one method, from the lowest to the highest."
    return _set(_place(g.ranked[0].record.cell), figures, [*empty, *levels], note) if figures else None


def _at_cost(f: RunFacts, metric: Metric, e: RankingEntry, name: str) -> Point | None:
    cost = e.typical(metric.value)
    if cost is None:
        return None
    size, unit, write, _ = _UNITS[metric.unit]
    flag = _disturbed(metric, e)
    return _point(f, e, name, cost / size, f"{metric.axis} {write(cost)}{unit}{flag}", busy=bool(flag))


def _disturbed(metric: Metric, e: RankingEntry) -> str:
    """Return a remark if the cost is a time that other programs may have made too high. Otherwise return ""."""
    if metric is metrics.LATENCY:
        why = recipes.disturbed(e)
    else:
        count = recipes.busy(e) if metric.kind == "timed" else 0
        why = f"other programs used the CPU while {count} of {plural(len(e.records), 'run')} trained" if count else ""
    return f" (! may be too high: {why})" if why else ""


def _point(f: RunFacts, e: RankingEntry, name: str, x: float, text: str, *, busy: bool = False) -> Point:
    tip = f"{name}: {formatting.accuracy(e.score)}, {text}."
    href = f"#{links.anchor(f, e.record.cell_id)}"
    return Point(x, e.score.value, (e.score.low, e.score.high), tip, href, busy, hollow=e.standing == "below")


def _against(metric: Metric, series: Sequence[Series], missing: Sequence[str]) -> Drawing:
    _, unit, _, tick = _UNITS[metric.unit]
    points = [p for s in series if s.kind == "line" for p in s.points]
    front = [points[i].tip.partition(": ")[0] for i in charts.pareto([(p.x, p.y) for p in points])]
    busy = sum(p.busy for p in points)
    unequal = "some passes took much longer than others, or " if metric is metrics.LATENCY else ""
    why = f"{unequal}other programs used the CPU"
    notes = [
        f"{formatting.sentence(metric.meaning)}.",
        f"On the dashed front, where no other recipe is both cheaper and more accurate: {', '.join(front)}.",
        f"! Dashed ring, {busy} of {len(points)}: {why}; the time may be too high." if busy else "",
        "Hollow: a test tells the recipe apart from the highest." if any(p.hollow for p in points) else "",
        f"Without a value: {', '.join(missing)}." if missing else "",
    ]
    chart = _percent_chart(Axis(metric.axis + unit.replace(" ", ", "), tick), series, front=True)
    return _figure(f"Accuracy against {metric.axis}", chart, notes, metric.axis)


def rates(f: RunFacts) -> list[ChartSet]:
    """Return charts of accuracy against the learning rate, by model and task.

    Leave out searches with only one scored rate.
    """
    searches = [search for search in tuning.searches(f.run) if len(search.scored) > 1]
    found = []
    for title, same in group((_place(search.tries[0].cell), search) for search in searches).items():
        empty = _coloured(f, {search.tuning.entry: search.tries[0].cell for search in same})
        series = [
            replace(s, points=[_tried(f, search, t, t.score) for t in search.tries if t.score])
            for s, search in zip(empty, same, strict=True)
        ]
        chart = _percent_chart(Axis("learning rate", "{:g}".format, each=True), series, bands=True)
        note = (
            "Filled: the chosen rate. Bands: 95 % intervals over test items that no ranking uses. A point is one run."
        )
        found.append(_set(title, [_figure("Accuracy against learning rate", chart)], series, note))
    return found


def _tried(f: RunFacts, search: tuning.Search, t: tuning.Try, s: Score) -> Point:
    chosen = ", the chosen rate" if t.chosen else ""
    tip = f"{search.tuning.entry}: {formatting.accuracy(s)} with lr={t.lr:g}{chosen}"
    return Point(t.lr, s.value, (s.low, s.high), tip, f"#{links.anchor(f, t.cell.cell_id)}", hollow=not t.chosen)


def curves(f: RunFacts) -> list[ChartSet]:
    """Return charts of the training losses, by model and task. A recipe with several seeds has a curve of mean losses.

    For an imported adapter, the curve shows the losses that the other program logged.
    """
    trained = [
        record for record in f.latest.values() if (record.training and len(record.training.losses) > 1) or _log(record)
    ]
    return [_curves(f, *place) for place in group((_place(record.cell), record) for record in trained).items()]


def _log(record: Record) -> Sequence[LoggedLoss]:
    """Return the losses that another program logged for an imported adapter. For any other Record, return ()."""
    return record.imported.logged if record.imported else ()


def _curves(f: RunFacts, title: str, every: Sequence[Record]) -> ChartSet:
    """Return the chart of training losses for one model and task.

    Until the reader selects others, it shows only the best recipe of each method.
    """
    records, imported = [r for r in every if r.training], [r for r in every if _log(r)]
    seeds = group((r.cell.recipe_id, r.training.losses) for r in records if r.training)
    losses = [[sum(step) / len(step) for step in zip(*several, strict=True)] for several in seeds.values()]
    nearby = ([one[max(0, t - 2) : t + 3] for t in range(len(one))] for one in losses)
    means = [[sum(steps) / len(steps) for steps in several] for several in nearby]
    cells = {r.cell.recipe_id: r.cell for r in records}
    names = links.short_names(list(cells.values()), [f.recipes[i] for i in cells])
    best: dict[str, str] = {}
    for cell in [*(e.record.cell for g in f.groups for e in g.ranked), *cells.values()]:
        if cell.recipe_id in cells:
            best.setdefault(_method(cell), cell.recipe_id)
    shown = list(best.values())[:_CURVES]
    bound = _RISE * max([*(one[0] for one in losses), *(_log(r)[0].loss for r in imported)])
    empty = _coloured(f, dict(zip(names, cells.values(), strict=True)))
    series = [
        replace(_curve(s, mean, high=bound), shown=recipe in shown)
        for s, mean, recipe in zip(empty, means, cells, strict=True)
    ]
    logs = _coloured(f, {f.names[r.cell_id]: r.cell for r in imported})
    series += [_logged(s, _log(r), bound) for s, r in zip(logs, imported, strict=True)]
    over = [
        f"{name} reaches {max(one):.3g} at step {one.index(max(one))}"
        for name, one, mean in zip(names, losses, means, strict=True)
        if max(mean) > bound
    ]
    clipped = f"Drawn up to {bound:.3g}, {_RISE:g} times the highest first loss: {'; '.join(over)}." if over else ""
    chart = charts.xy(_STEPS, Axis("training loss, nats", "{:.3g}".format), series)
    first = "the best recipe" if any(g.ranked for g in f.groups) else "one recipe"
    note = f"Shown at first: {first} of each method, at most {_CURVES}." if len(shown) < len(series) else ""
    means_of = "Each point: mean over all seeds and five steps." if records else ""
    logged = "Imported: as its program logged it; a point is the mean since the previous point." if imported else ""
    return _set(title, [_figure("Training loss", chart, [means_of, logged, clipped])], series, note)


def _logged(s: Series, log: Sequence[LoggedLoss], high: float) -> Series:
    """Return a series as the curve of logged losses, cut off above `high`. It has at most `_POINTS` points."""
    drawn = log[:: math.ceil(len(log) / _POINTS)]
    points = [Point(float(one.step), min(one.loss, high)) for one in drawn]
    return replace(s, points=points, kind="curve", texts=[f"{one.step}: {one.loss:.3g}" for one in drawn])


def _curve(s: Series, values: Sequence[float], low: float = -math.inf, high: float = math.inf) -> Series:
    """Return a series as a curve over the steps, cut off outside `low` to `high`. It has at most `_POINTS` points."""
    steps = range(0, len(values), math.ceil(len(values) / _POINTS))
    points = [Point(float(t), min(max(values[t], low), high)) for t in steps]
    kind = "curve" if s.kind == "line" else s.kind
    return replace(s, points=points, kind=kind, texts=[f"{t}: {values[t]:.3g}" for t in steps])


def errors(f: RunFacts, judgement: QuestionVerdict) -> ChartSet | None:
    """Return the chart of a `same-losses` comparison: |loss - float64 loss| and the largest allowed errors, by step.

    The chart has one curve of allowed errors per reference run, e.g. one for each model. Return None for any other
    kind of comparison, or if there are no losses to compare.
    """
    compared = [s for s in judgement.trajectories or () if s.errors]
    if not compared:
        return None
    limits: dict[str, JudgedTrajectory] = {}
    for one in sorted(compared, key=lambda s: s.by != "noise"):
        limits.setdefault(one.limited_by, one)
    # Two losses may agree to many digits by chance; such a dip must not flatten the other curves.
    lowest = min((v for one in limits.values() for v in one.allowed if v > 0), default=1.0) / 1e3
    cells = {cell.cell_id: cell for cell in f.run.manifest.cells}
    # One comparison may cover several models, whose Cells may have equal short names.
    names = f.titles if len({_place(cells[s.cell_id]) for s in compared}) > 1 else f.names
    series = [
        *_coloured(f, {names[s.cell_id]: cells[s.cell_id] for s in compared}),
        *(
            Series(
                ("allowed" if one.by == "noise" else "allowed growth") + (f" by {names[i]}" if len(limits) > 1 else ""),
                charts.REST,
                kind="bound",
            )
            for i, one in limits.items()
        ),
    ]
    values = [*(s.errors for s in compared), *(one.allowed for one in limits.values())]
    drawn = [_curve(s, errors, low=lowest) for s, errors in zip(series, values, strict=True)]
    chart = charts.xy(_STEPS, Axis("distance from the float64 loss", "{:.0e}".format), drawn)
    return _set(judgement.comparison.says, [_figure("Distance from the float64 losses", chart)], drawn)


def time(f: RunFacts) -> list[ChartSet]:
    """Return charts of the time by phase, by model and task.

    A bar stands for a Cell or, in a chart of more than `_BARS` Cells, for a method.
    """
    records = [record for record in f.latest.values() if record.phases]
    phases = dict.fromkeys(p.name for record in records for p in record.phases if p.name != measurements.STARTUP)
    series = [
        Series(measurements.STARTUP, charts.OUTLINED, kind="fill"),
        *(Series(name, k, kind="fill") for k, name in enumerate(phases)),
        Series("in no phase", charts.REST, kind="fill"),
    ]
    places = group((_place(record.cell), record) for record in records)
    return [_time(f, title, same, series) for title, same in places.items()]


def _time(f: RunFacts, title: str, records: Sequence[Record], series: Sequence[Series]) -> ChartSet:
    rows, name, note = group((f.names[r.cell_id], r) for r in records), "Time of each Cell by phase", ""
    if len(rows) > _BARS:
        rows, name = group((_method(r.cell), r) for r in records), "Time of each method by phase"
        note = f"Each bar is the mean of all Cells of a method; {len(records)} Cells in total."
    parts = {row: _mean_seconds(same, series) for row, same in rows.items()}
    longest_first = dict(sorted(parts.items(), key=lambda pair: -sum(pair[1])))
    chart = charts.bars(Axis("seconds", "{:.4g}".format), longest_first, series, formatting.seconds)
    return _set(title, [_figure(name, chart)], series, note)


def _mean_seconds(records: Sequence[Record], series: Sequence[Series]) -> list[float]:
    """Return the mean seconds per Record of each series. A series is a phase; the last one is the rest of the time."""
    spent = group((p.name, p.seconds) for record in records for p in record.phases)
    spent[series[-1].name] = [measurements.unaccounted_seconds(record) for record in records]
    return [sum(spent.get(s.name, ())) / len(records) for s in series]
