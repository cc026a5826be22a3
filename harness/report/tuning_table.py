"""Table of searches for learning rates."""

from __future__ import annotations

from harness.analysis import tuning
from harness.analysis.ranking import Score
from harness.analysis.run_facts import RunFacts
from harness.report import formatting, links
from harness.report.formatting import Field, field, unmeasured
from harness.report.table_model import Table, column, grouped


def searched(facts: RunFacts) -> Table | None:
    """Return the table of the suite's searches, with the accuracy of each learning rate; None without a search."""
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


def _row(facts: RunFacts, name: str, title: str, cell_id: str, record: str, *fields: Field) -> Table:
    href = f"#{links.anchor(facts, cell_id)}"
    return {"name": name, "title": title, "record": record, "anchor": "", "href": href, "fields": list(fields)}


def _accuracy(score: Score) -> Field:
    more = formatting.ends(score)
    return field(formatting.percent(score.value), score.value, small=formatting.interval(score), more=more)


def _text(text: str) -> Field:
    return field(text, text or None)
