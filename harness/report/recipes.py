"""Tables of means over seeds, and of searches for learning rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median, stdev
from typing import Any

from harness.analysis import failed_checks, metrics, ranking, tuning
from harness.analysis.ranking import Group, RankingEntry
from harness.analysis.run_facts import RunFacts
from harness.analysis.statistics.over_seeds import INTERVAL
from harness.records.record import Record
from harness.report import formatting, links
from harness.report.formatting import Figure, figure, unmeasured
from harness.report.table_model import Table, by_key, column


def over_seeds(facts: RunFacts) -> Table | None:
    """Tabulate recipes that ran with several seeds, best first within an equal budget; None without any."""
    groups = [
        {"title": f"{g.budget.model} · {g.budget.task}", "rows": rows}
        for g in facts.groups
        if (rows := [_recipe(facts, g, e) for e in g.entries if len(e.records) > 1])
    ]
    if not groups:
        return None
    columns = [
        column("Seeds", "training runs that were scored", key="seeds"),
        column("Accuracy", key="accuracy", title=f"mean over the seeds; brackets: {INTERVAL}"),
        column("Between seeds", "standard deviation of the runs' accuracies, in points"),
        column("Each run", "in the order of the seeds", number=False),
        column(
            "Against the best",
            "among recipes with an equal budget; t test of paired items plus seeds, Holm-adjusted",
            key="rank",
        ),
        column("Trainable", "parameters that the optimizer updates"),
        column("Peak, MiB", "highest memory in the training phase, median over the seeds"),
        column("Tokens/s", "real tokens over the steady steps, median over the seeds"),
        column("Step, ms", "median over the seeds of each run's median steady step; brackets: lowest and highest"),
    ]
    return _table(facts, "recipes", "Means over seeds", columns, groups)


def _recipe(facts: RunFacts, g: Group, e: RankingEntry) -> Table:
    runs = ranking.accuracies(e.records)
    found = [r.measurements for r in e.records if r.measurements]
    peaks = [p for r in e.records if (p := metrics.TRAINING_PEAK.read(r)) is not None]
    refused = next((why for r in e.records if (why := failed_checks.no_speed(r))), "")
    figures = [
        figure(str(len(runs)), len(runs), why=f"seeds {', '.join(str(r.cell.seed) for r in e.records)}"),
        figure(formatting.percent(e.score.value), e.score.value, small=formatting.interval(e.score), why=e.score.means),
        figure(f"{100 * stdev(a.value for a in runs):.1f}", stdev(a.value for a in runs)),
        figure(" ".join(f"{100 * a.value:.1f}" for a in runs), None),
        _standing(g, e),
        figure(f"{found[0].parameters.trainable:,}", found[0].parameters.trainable),
        figure(formatting.mebibytes(round(median(peaks))), median(peaks))
        if peaks
        else unmeasured("no peak of training"),
        _over(e.records, metrics.TOKENS_PER_S.read, lambda x: f"{x:,.0f}", refused),
        _over(e.records, metrics.STEP.read, formatting.milliseconds, refused, ends=True),
    ]
    first = e.record
    return {
        "name": facts.entry_name(e), "title": facts.entry_name(e), "record": first.id, "anchor": "",
        "href": f"#{links.anchor(facts, first.cell_id)}", "figures": figures,
    }  # fmt: skip


def _over(
    records: Sequence[Record],
    value: Callable[[Record], float | None],
    write: Callable[[float], str],
    refused: str,
    *,
    ends: bool = False,
) -> Figure:
    if refused:
        return unmeasured(refused)
    values = [x for r in records if (x := value(r)) is not None]
    if not values:
        return unmeasured("not trained, or not timed")
    small = f"[{write(min(values))}, {write(max(values))}]" if ends else ""
    return figure(write(median(values)), median(values), small=small)


def _standing(g: Group, e: RankingEntry) -> Figure:
    if not g.is_ranking:
        return unmeasured("no other recipe has this budget and these seeds")
    if e.standing == "best":
        return figure("best", 0.0, tone="good")
    why = formatting.probability(e.p) if e.p is not None else "the test items are not the same: judged by the intervals"
    return figure(e.standing, e.difference, small=formatting.points(e.difference), why=why)


def searched(facts: RunFacts) -> Table | None:
    """Tabulate the score of each learning rate of a declared search; None without any search."""
    found = tuning.searches(facts.run)
    if not found:
        return None
    rates = sorted({t.lr for search in found for t in search.tries})
    columns = [
        column("Chosen", "the learning rate of the Cells that are ranked"),
        *(column(f"{rate:g}", "accuracy with this learning rate, on test items that rank nothing") for rate in rates),
        column(
            "Band, points", "highest minus lowest accuracy over the learning rates tried: how much the choice matters"
        ),
        column("The choice", "compared with the other learning rates tried", number=False),
    ]
    groups: dict[str, list[Table]] = {}
    for search in found:
        by_rate = {t.lr: t for t in search.tries}
        first = (search.cells or [t.cell for t in search.tries])[0]
        figures = [
            figure(" ".join(f"{t.lr:g}" for t in search.tries if t.chosen), None),
            *(_tried(by_rate.get(rate)) for rate in rates),
            figure(f"{100 * (search.band[1] - search.band[0]):.1f}", search.band[1] - search.band[0])
            if search.band
            else unmeasured("fewer than two were scored"),
            figure(_choice(search), None, tone="bad" if search.better else ""),
        ]
        row = {
            "name": facts.recipes[first.recipe_id] if len(search.cells) == 1 else search.tuning.entry,
            "title": f"{len(search.cells)} ranked Cells of {search.tuning.entry}", "figures": figures, "anchor": "",
            "record": search.tries[0].cell.cell_id, "href": f"#{links.anchor(facts, search.tries[0].cell.cell_id)}",
        }  # fmt: skip
        groups.setdefault(f"{first.model} · {first.task}", []).append(row)
    shown = [{"title": title, "rows": rows} for title, rows in groups.items()]
    return _table(facts, "tuning", "Accuracy by learning rate", columns, shown)


def _tried(t: tuning.Try | None) -> Figure:
    if t is None:
        return unmeasured("not tried")
    if t.score is None:
        return unmeasured(t.because)
    return figure(formatting.percent(t.score.value), t.score.value, small=formatting.interval(t.score))


def _choice(search: tuning.Search) -> str:
    if search.better:
        return f"worse than {', '.join(f'{x:g}' for x in search.better)}"
    if not search.cells:
        best = ", ".join(f"{x:g}" for x in search.best)
        return f"none is in this run; the best tried: {best}" if best else "none is in this run"
    chosen = {t.lr for t in search.tries if t.chosen and t.score}
    if not chosen:
        return "unknown: the learning rate that was chosen has no score"
    choice = "the best tried" if chosen & set(search.best) else f"not distinguishable from the best, {search.best[0]:g}"
    return choice + ("; the best is the lowest or highest rate tried" if search.at_edge else "")


def lines(facts: RunFacts) -> list[list[str]]:
    """Return the means over seeds as rows for a terminal, with headings above each group; empty without any."""
    table = over_seeds(facts)
    headings = {"seeds": "seeds", "accuracy": "accuracy", "rank": "against the best"}
    rows: list[list[str]] = []
    for group in table["groups"] if table else ():
        rows.append([f"{group['title']}, over seeds", *headings.values()])
        for row in group["rows"]:
            figures = by_key(table["columns"], row["figures"]) if table else {}
            shown = [figures[key] for key in headings]
            rows.append([row["name"], *(" ".join(filter(None, [f["text"], f["small"]])) for f in shown)])
    return rows


def _table(facts: RunFacts, key: str, caption: str, columns: list[dict[str, Any]], groups: list[Table]) -> Table:
    return {
        "id": f"{facts.prefix}{key}", "caption": caption, "first": "Recipe", "columns": columns, "notes": [],
        "groups": groups,
    }  # fmt: skip
