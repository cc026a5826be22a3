"""Tables of means over seeds, and of searches for learning rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median, stdev

from harness.analysis import failed_checks, metrics, ranking, tuning
from harness.analysis.ranking import Group, RankingEntry, Score
from harness.analysis.run_facts import RunFacts
from harness.analysis.statistics.over_seeds import INTERVAL
from harness.records.record import Record
from harness.report import formatting, links
from harness.report.formatting import Field, field, unmeasured
from harness.report.table_model import Table, by_key, column, grouped
from harness.report.tables import standing_field


def over_seeds(facts: RunFacts) -> Table | None:
    """Return the table of recipes that were trained with several seeds. If there is no such recipe, return None.

    Recipes with an equal budget form a group, in which the best recipe comes first.
    """
    columns = [
        column("Seeds", "number of scored training runs", key="seeds"),
        column("Accuracy, %", f"mean over the seeds; brackets: {INTERVAL}", key="accuracy"),
        column("Between seeds, points", "standard deviation of the accuracies of the runs"),
        column("Each run, %", "accuracies in the order of the seeds", number=False),
        column(
            "Against the best, points",
            "among recipes with an equal budget; t test of paired items plus seeds, Holm-adjusted",
            key="rank",
        ),
        column("Trainable", "parameters that the optimizer updates"),
        column("Peak, MiB", "highest memory in training without that of the imports, median over the seeds"),
        column("Tokens/s", "tokens without padding per second of the steady steps, median over the seeds"),
        column("Step, ms", "median over the seeds of the median steady step of each run; brackets: lowest and highest"),
    ]
    groups = [
        (f"{g.budget.model} · {g.budget.task}", rows)
        for g in facts.groups
        if (rows := [_recipe(facts, g, e) for e in g.entries if len(e.records) > 1])
    ]
    caption = "Means over seeds"
    file = f"{facts.run.manifest.run}-recipes"
    return grouped(f"{facts.prefix}recipes", caption, columns, groups, first="Recipe", file=file) if groups else None


def _recipe(facts: RunFacts, g: Group, e: RankingEntry) -> Table:
    accuracies = [a.value for a in ranking.accuracies(e.records)]
    seeds = ", ".join(str(r.cell.seed) for r in e.records)
    trainable = metrics.TRAINABLE.read(e.record) or 0
    refused = next((why for r in e.records if (why := failed_checks.no_speed(r))), "")
    alone = unmeasured("no other recipe has this budget and these seeds")
    return _row(
        facts, facts.entry_name(e), facts.entry_name(e), e.record.cell_id, e.record.id,
        field(str(len(accuracies)), len(accuracies), why=f"seeds {seeds}"),
        _accuracy(e.score) | {"why": e.score.means},
        field(f"{100 * stdev(accuracies):.1f}", stdev(accuracies)),
        _text(" ".join(f"{100 * value:.1f}" for value in accuracies)),
        standing_field(e) if g.is_ranking else alone,
        field(f"{trainable:,}", trainable),
        over(e.records, metrics.PEAK_ABOVE_IMPORTS.read, formatting.mebibytes, "no peak of training"),
        over(e.records, metrics.TOKENS_PER_S.read, lambda rate: f"{rate:,.0f}", refused=refused),
        over(e.records, metrics.STEP.read, formatting.milliseconds, refused=refused, ends=True),
    )  # fmt: skip


def _row(facts: RunFacts, name: str, title: str, cell_id: str, record: str, *fields: Field) -> Table:
    href = f"#{links.anchor(facts, cell_id)}"
    return {"name": name, "title": title, "record": record, "anchor": "", "href": href, "fields": list(fields)}


def _accuracy(score: Score) -> Field:
    more = formatting.ends(score)
    return field(formatting.percent(score.value), score.value, small=formatting.interval(score), more=more)


def _text(text: str) -> Field:
    return field(text, text or None)


def over(
    records: Sequence[Record],
    value: Callable[[Record], float | None],
    write: Callable[[float], str],
    missing: str = "not trained, or not timed",
    *,
    refused: str = "",
    ends: bool = False,
) -> Field:
    """Return the field with the median over seeds. ends: also show the range.

    missing: reason to show if no seed has a value. refused: reason to hide the values, if any.
    """
    values = [x for r in records if (x := value(r)) is not None]
    if refused or not values:
        return unmeasured(refused or missing)
    shown = field(write(median(values)), median(values))
    if not ends:
        return shown
    low, high = min(values), max(values)
    return shown | {"small": f"[{write(low)}, {write(high)}]", "more": {"lowest": low, "highest": high}}


def searched(facts: RunFacts) -> Table | None:
    """Return the table of declared searches, with the accuracy of each learning rate. Without a search, return None."""
    found = tuning.searches(facts.run)
    if not found:
        return None
    rates = sorted({t.lr for search in found for t in search.tries})
    columns = [
        column("Chosen", "learning rate of the ranked Cells"),
        *(
            column(f"{rate:g}, %", "accuracy with this learning rate, on test items that no ranking uses")
            for rate in rates
        ),
        column("Band, points", "highest minus lowest accuracy over the learning rates: the effect of the choice"),
        column("The choice", "the chosen learning rate compared with the others", number=False),
    ]
    groups: dict[str, list[Table]] = {}
    for search in found:
        by_rate = {t.lr: t for t in search.tries}
        first = (search.cells or [t.cell for t in search.tries])[0]
        band = None if search.band is None else search.band[1] - search.band[0]
        tried = search.tries[0].cell.cell_id
        row = _row(
            facts, facts.recipes[first.recipe_id] if len(search.cells) == 1 else search.tuning.entry,
            f"{len(search.cells)} ranked Cells of {search.tuning.entry}", tried, tried,
            _text(" ".join(f"{t.lr:g}" for t in search.tries if t.chosen)),
            *(_tried(by_rate.get(rate)) for rate in rates),
            unmeasured("fewer than two were scored") if band is None else field(f"{100 * band:.1f}", band),
            _text(_choice(search)) | {"tone": "bad" if search.better else ""},
        )  # fmt: skip
        groups.setdefault(f"{first.model} · {first.task}", []).append(row)
    caption, file = "Accuracy by learning rate", f"{facts.run.manifest.run}-tuning"
    return grouped(f"{facts.prefix}tuning", caption, columns, groups.items(), first="Recipe", file=file)


def _tried(t: tuning.Try | None) -> Field:
    if t is None or t.score is None:
        return unmeasured(t.because if t else "not tried")
    return _accuracy(t.score)


def _choice(search: tuning.Search) -> str:
    if search.better:
        return f"worse than {', '.join(f'{x:g}' for x in search.better)}"
    if not search.cells:
        best = ", ".join(f"{x:g}" for x in search.best)
        return f"none is in this run; the best tried: {best}" if best else "none is in this run"
    chosen = {t.lr for t in search.tries if t.chosen and t.score}
    if not chosen:
        return "unknown: the chosen learning rate has no score"
    choice = "the best tried" if chosen & set(search.best) else f"not distinguishable from the best, {search.best[0]:g}"
    return choice + ("; the best is the lowest or highest rate tried" if search.at_edge else "")


def lines(facts: RunFacts) -> list[list[str]]:
    """Return the table of means over seeds as rows of text for a terminal. Without several seeds, return an empty list.

    Each group of recipes starts with a row of headings.
    """
    table = over_seeds(facts)
    headings = {"seeds": "seeds", "accuracy": "accuracy", "rank": "against the best"}
    rows: list[list[str]] = []
    for group in table["groups"] if table else ():
        rows.append([f"{group['title']}, over seeds", *headings.values()])
        for row in group["rows"]:
            fields = by_key(table["columns"], row["fields"]) if table else {}
            shown = [fields[key] for key in headings]
            rows.append([row["name"], *(" ".join(filter(None, [f["text"], f["small"]])) for f in shown)])
    return rows
