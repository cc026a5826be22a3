"""Table of the recipes of a group: the columns from which a reader can choose, and one row for each recipe.

A recipe is a set of Cells that differ only in the seed. A group has recipes with one training budget.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median, stdev
from typing import Any

from harness.analysis import contention, failed_checks, measurements, metrics, ranking, target_loss
from harness.analysis.choice import Choice
from harness.analysis.ranking import Group, RankingEntry
from harness.analysis.run_facts import RunFacts
from harness.analysis.target_loss import TargetLoss
from harness.errors import plural
from harness.records.record import Latency, Record
from harness.report import formatting, links
from harness.report.formatting import Field, field, unmeasured
from harness.report.table_model import Column, Table, column, facets, grouped

Names = Mapping[int, str]
"""id() of a ranking entry -> its name in its group."""
Read = Callable[[Record], float | None]
_RANKING = {"best": "highest", "tied": "cannot be told apart", "below": "lower", "untrained": "not trained here"}
"""Standing of a recipe in the ranking -> text by which a reader can filter the table."""
WIDTH, HEIGHT = 240.0, 18.0
"""Size of the drawing of an interval, in SVG units."""


def table(f: RunFacts, key: str, title: str, group: Group, names: Names, chosen: Choice) -> Table:
    """Return the table of the recipes of a group, best first, with their intervals drawn on one scale.

    key: the HTML id of the table. Each row has an entry `recipe`: a dict of the recipe's numbers by name, in base
    units.
    """
    target, scale = target_loss.target(chosen), _scale(group)
    columns = list(_columns(group, target))
    rows = [_row(f, columns, group, names[id(e)], e, target, scale) for e in group.entries]
    file = f"{f.run.manifest.run}-{key}"
    made = grouped(key, f"Recipes of {title}", columns, [("", rows)], file=file, first="Recipe")
    return made | {
        "facets": facets(rows), "scale": {"width": WIDTH, "height": HEIGHT, "best": scale(group.entries[0].score.value)},
        "busy": any(map(busy, group.entries)), "short_flags": True,
        "disturbed": sorted(set().union(*map(_disturbances, group.entries))),
        "hollow": any(e.standing == "below" for e in group.entries),
        "imported": any(e.record.imported for e in group.entries),
        "target": None if target is None else {"loss": target.loss, "window": target.window},
    }  # fmt: skip


def _columns(group: Group, target: TargetLoss | None) -> Iterator[Column]:
    """Yield the columns of the table. The key of a column is also the name of its value in the formats CSV and JSON."""
    score = group.entries[0].score
    yield column("Accuracy, %", f"mean over the seeds; interval: {score.means}", key="accuracy")
    yield column("95 % interval", "dashed line: the highest accuracy", number=False, key="interval")
    title = "accuracy minus the highest; ≈: no test tells the recipe apart from the highest"
    yield column("To the highest, points", title, key="difference")
    yield column(
        "Peak, MiB", "memory in training, without Python and its libraries; median over the seeds", key="peak_B"
    )
    yield column("Step, ms", "median time of a steady step of each training; median over the seeds", key="step_s")
    yield column("Trainable", metrics.TRAINABLE.meaning, key="trainable")
    if target is not None:
        title = (
            f"seconds of training steps until the mean loss of {plural(target.window, 'step')} first reached"
            f" {target.loss:.3g}, which every recipe near the top reached; median over the seeds"
        )
        yield column(f"To loss {target.loss:.3g}, s", title, key="to_target_s")
    more = (
        ("Tokens/s", "tokens without padding per second of the steady steps, median over the seeds", "tokens_per_s"),
        ("Adapter's file, MiB", "size of a safetensors file with the adapter and the head", "adapter_file_B"),
        (
            "Unmerged, ms",
            f"median latency with the adapter attached{_pass(group)}; median over the seeds",
            "unmerged_s",
        ),
        ("Merged, ms", f"median latency of the merged model{_pass(group)}; median over the seeds", "merged_s"),
        ("Learning rate", "largest learning rate of the adapter's schedule", "lr"),
        ("Seeds", "number of scored training runs", "seeds"),
        ("Between seeds, points", "standard deviation of the accuracies of the runs", "spread"),
    )
    for label, title, key in more:
        yield column(label, title, key=key, shown=False)


def _row(
    f: RunFacts, columns: Sequence[Column], group: Group, name: str, e: RankingEntry, target: TargetLoss | None,
    scale: Callable[[float], float],
) -> Table:  # fmt: skip
    found = _fields(group, e, target, scale)
    cell, score = e.record.cell, e.score
    flag = disturbed(e) if any(found[key]["value"] is not None for key in ("unmerged_s", "merged_s")) else ""
    return {
        "name": name,
        "title": f.entry_name(e),
        "record": e.record.id,
        "anchor": "",
        "href": f"#{links.anchor(f, e.record.cell_id)}",
        "facets": {"method": cell.method, "rank": str(cell.config.get("rank", "")), "ranking": _RANKING[e.standing]},
        "fields": [found[c["key"]] for c in columns],
        "recipe": {
            "accuracy": score.value, "low": score.low, "high": score.high, "difference": e.difference,
            "standing": e.standing, "busy": busy(e), "latency_flag": flag, "imported": e.record.imported is not None,
            "target_loss": target.loss if target else None, "reached": found["to_target_s"]["more"].get("reached"),
            **{key: found[key]["value"] for key in found.keys() - {"accuracy", "interval", "difference", "spread"}},
        },
    }  # fmt: skip


def _fields(
    group: Group, e: RankingEntry, target: TargetLoss | None, scale: Callable[[float], float]
) -> dict[str, Field]:
    score, accuracies = e.score, [a.value for a in ranking.accuracies(e.records)]
    refused = next((why for r in e.records if (why := failed_checks.no_speed(r))), "")
    drawn = {
        "interval": [scale(score.low), scale(score.value), scale(score.high)],
        "hollow": e.standing == "below",
    }
    untrained = measurements.why_untrained(e.record, "learning rate")
    untimed = refused or metrics.STEP.why_missing(e.record)
    no_peak = metrics.PEAK_ABOVE_IMPORTS.why_missing(e.record)
    seeds = ", ".join(str(r.cell.seed) for r in e.records)
    each = " ".join(f"{100 * value:.1f}" for value in accuracies)
    return {
        "accuracy": field(
            formatting.percent(score.value), score.value, more=formatting.ends(score),
            flag="imported" if e.record.imported else "",
        ),
        "interval": field(formatting.interval(score), score.value) | drawn,
        "difference": gap(group, e),
        "trainable": median_over_seeds(e.records, metrics.TRAINABLE.read, lambda n: f"{n:,.0f}", "not trained"),
        "peak_B": median_over_seeds(e.records, metrics.PEAK_ABOVE_IMPORTS.read, formatting.mebibytes, no_peak),
        "step_s": _timed(e, median_over_seeds(e.records, metrics.STEP.value, formatting.milliseconds, untimed)),
        "to_target_s": _timed(e, _to_target(e, target, untimed)),
        "tokens_per_s": _timed(e, median_over_seeds(e.records, metrics.TOKENS_PER_S.value, lambda n: f"{n:,.0f}", untimed)),
        "adapter_file_B": median_over_seeds(
            e.records, _file, formatting.mebibytes, "there is no such file, or it was not measured"
        ),
        "unmerged_s": latency(e, "unmerged", "not measured, or no adapter"),
        "merged_s": latency(e, "merged", "not measured, or not merged"),
        "lr": median_over_seeds(
            e.records, lambda r: r.cell.training.lr if r.cell.training.steps else None, "{:g}".format, untrained
        ),
        "seeds": field(str(len(accuracies)), len(accuracies), why=f"seeds {seeds}: {each} %"),
        "spread": field(f"{100 * stdev(accuracies):.1f}", stdev(accuracies), why=f"seeds {seeds}: {each} %")
        if len(accuracies) > 1
        else unmeasured("one seed"),
    }  # fmt: skip


def gap(group: Group, e: RankingEntry) -> Field:
    """Return the field with an entry's accuracy minus the highest of its group, and with the result of the test."""
    if e is group.entries[0]:
        return field("highest", 0.0, tone="good", more={"standing": e.standing})
    p = "; their test items differ, so only the intervals are compared"
    if e.p is not None:
        p = f" ({formatting.probability(e.p)}, Holm-adjusted)"
    words = {
        "best": "the highest accuracy",
        "tied": f"no test tells it apart from the highest{p}",
        "below": f"lower than the highest{p}",
        "untrained": f"{'imported, not trained here' if e.record.imported else 'not trained'}{p}",
    }
    tied = e.standing == "tied"
    text = formatting.signed_percent(e.difference) + (" ≈" if tied else "")
    more: dict[str, str] = {"standing": e.standing} | ({} if e.p is None else {"p": f"{e.p:.3g}"})
    # Without the remark, the recipe would look as if it had the budget of the others.
    small = ("imported" if e.record.imported else "not trained") if e.standing == "untrained" else ""
    return field(text, e.difference, small=small, why=words[e.standing], tone="quiet" if tied else "", more=more)


def _to_target(e: RankingEntry, target: TargetLoss | None, untimed: str) -> Field:
    found = None if target is None else target_loss.time_to(e, target)
    if target is None or found is None:
        return unmeasured(untimed)
    some = f"{found.reached} of {plural(found.seeds, 'training')} reached it"
    if math.isinf(found.seconds):
        return unmeasured(some) | {"more": {"reached": found.reached}}
    small = "" if found.reached == found.seeds else f"{found.reached} of {plural(found.seeds, 'seed')}"
    why = f"after {found.steps:g} steps; {some}"
    text = f"{found.seconds:.1f}" if found.seconds < 100 else f"{found.seconds:,.0f}"
    return field(text, found.seconds, small=small, why=why, more={"steps": found.steps, "reached": found.reached})


def _timed(e: RankingEntry, shown: Field) -> Field:
    """Return the field `shown` of a time, with a flag if some of the training runs were timed on a busy machine."""
    count = busy(e)
    return shown | {"flag": f"busy {count} of {len(e.records)}"} if count and shown["value"] is not None else shown


def busy(entry: RankingEntry) -> int:
    """Return the number of training runs of a recipe that were timed while other programs used the CPU."""
    return sum(bool(record.training and contention.busy(record)) for record in entry.records)


def median_over_seeds(
    records: Sequence[Record],
    value: Read,
    write: Callable[[float], str],
    missing: str,
    *,
    refused: str = "",
) -> Field:
    """Return the field with the median of `value(record)` over the Records of a recipe, which differ in the seed.

    write: function that formats the median. missing: reason to show if no seed has a value. refused: reason to hide the
    values, if any.
    """
    values = [x for r in records if (x := value(r)) is not None]
    if refused or not values:
        return unmeasured(refused or missing)
    return field(write(median(values)), median(values))


def _file(record: Record) -> float | None:
    size = record.measurements.checkpoint if record.measurements else None
    return size.adapter_file_B if size else None


def _passes(record: Record) -> list[tuple[str, int, int]]:
    """Return (kind, batch, tokens) of each timed kind of forward pass. The table shows only the last, e.g. `decode`."""
    measured = record.measurements.latency if record.measurements else []
    return list(dict.fromkeys((x.kind, x.batch, x.tokens) for x in measured if x.variant == "base"))


def _pass(group: Group) -> str:
    found = [passes[-1] for e in group.entries if (passes := _passes(e.record))]
    return ", {}, batch {}, {} tokens".format(*found[0]) if found else ""


def latency(e: RankingEntry, variant: str, missing: str = "not measured") -> Field:
    """Return the field with the latency of a recipe: the median over the seeds.

    variant: `base`, `unmerged` or `merged`. missing: reason to show if no seed has a value.
    """
    refusal = failed_checks.no_merged_speed if variant == "merged" else failed_checks.no_speed
    refused = next(filter(None, map(refusal, e.records)), "")
    shown = median_over_seeds(e.records, _latency(variant), formatting.milliseconds, missing, refused=refused)
    return shown if shown["value"] is None else shown | {"flag": disturbed(e)}


def disturbed(entry: RankingEntry) -> str:
    """Return the flag of a recipe's latencies, e.g. `unsteady 1 of 3` (seeds); "" if no latency is disturbed."""
    timed = sum(bool(_last_pass(record)) for record in entry.records)
    return ", ".join(f"{flag} {count} of {timed}" for flag, count in sorted(_disturbances(entry).items()))


def _disturbances(entry: RankingEntry) -> Counter[str]:
    """Count how many of a recipe's latencies are `unsteady` and how many are `busy`."""
    return Counter(filter(None, (contention.disturbed(r, _last_pass(r))[0] for r in entry.records)))


def _latency(variant: str) -> Read:
    def read(record: Record) -> float | None:
        found = next((x for x in _last_pass(record) if x.variant == variant), None)
        return median(found.seconds) if found and found.seconds else None

    return read


def _last_pass(record: Record) -> list[Latency]:
    """Return the latencies of the last kind of forward pass that was timed, with one adapter or none."""
    measured, last = record.measurements.latency if record.measurements else [], _passes(record)[-1:]
    return [x for x in measured if x.adapters is None and [(x.kind, x.batch, x.tokens)] == last]


def _scale(group: Group) -> Callable[[float], float]:
    """Return a function that maps an accuracy to its x coordinate in the drawing of an interval, in SVG units."""
    low = min(e.score.low for e in group.entries)
    high = max(e.score.high for e in group.entries)
    margin = (high - low or 1.0) * 0.04
    low, high = low - margin, high + margin
    return lambda value: round(WIDTH * (value - low) / (high - low), 1)


def numbers(made: Table) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, numbers) of each recipe. The numbers are in base units: shares of 1, bytes and seconds."""
    for group in made["groups"]:
        for row in group["rows"]:
            yield row["name"], row["recipe"]
