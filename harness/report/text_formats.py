"""The first screen of a report in other formats: Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from harness.analysis.run_facts import RunFacts
from harness.console import json_text, visible
from harness.report import alerts, first_screen, recipes
from harness.report.formatting import escape_markdown
from harness.report.table_model import Table

COLUMNS = {
    "accuracy": ("accuracy, %", 100), "low": ("lower bound, %", 100), "high": ("upper bound, %", 100),
    "difference": ("to the highest, points", 100), "standing": ("standing", None),
    "trainable": ("trainable parameters", None), "peak_B": ("peak memory, MiB", 2**-20), "step_s": ("step, ms", 1000),
    "busy": ("busy", None), "imported": ("imported", None), "target_loss": ("target loss", None),
    "to_target_s": ("time to the target loss, s", 1), "reached": ("seeds that reached it", None),
    "tokens_per_s": ("tokens/s", 1), "adapter_file_B": ("adapter file, MiB", 2**-20),
    "unmerged_s": ("unmerged latency, ms", 1000), "merged_s": ("merged latency, ms", 1000),
    "latency_flag": ("flag of the latencies", None),
    "lr": ("learning rate", None), "seeds": ("seeds", None),
}  # fmt: skip
"""Columns of the CSV: name of the recipe's number -> (heading, factor). The factor converts the number from the base
unit to the unit in the heading; None leaves a value as it is. `busy`: how many of the training runs were timed on a
busy machine. `latency_flag`: what disturbed the latencies, e.g. `unsteady 1 of 3`."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def markdown(analysed: Sequence[RunFacts]) -> str:
    """Return the alerts, the cards and the recipe tables as Markdown. Every name is escaped."""
    lines: list[str] = []
    for facts in analysed:
        manifest = facts.run.manifest
        lines += [f"# {escape_markdown(manifest.title or manifest.suite)}", "", f"Run `{manifest.run}`.", ""]
        lines += [f"> **!** {escape_markdown(alert)}\n" for alert in alerts.lines(facts)]
        for answer in first_screen.answers(facts):
            lines += [f"## {escape_markdown(answer['title'])}", ""]
            for card in answer["cards"]:
                headline, details = map(escape_markdown, (card["headline"], " ".join(card["details"])))
                lines.append(f"- **{card['question']} {headline}** {details}")
            lines += ["", *_recipes(answer["table"]), "", "≈: no test tells the recipe apart from the highest."]
            if target := answer["table"]["target"]:
                lines += [
                    f"To loss: training until the mean loss of {target['window']} steps was {target['loss']:.3g}."
                ]
            lines.append("")
    return "\n".join(lines)


def _recipes(table: Table) -> Iterator[str]:
    """Yield the lines of a Markdown table of recipes, with the columns that the page shows by default."""
    shown = [i for i, c in enumerate(table["columns"]) if c["shown"]]
    heads = ["Recipe", *(table["columns"][i]["label"] for i in shown)]
    yield from (_row(heads), _row(["---", *["---:"] * (len(heads) - 1)]))
    for group in table["groups"]:
        for row in group["rows"]:
            yield _row([escape_markdown(row["name"]), *(_with_flag(row["fields"][i]) for i in shown)])


def rows(analysed: Sequence[RunFacts]) -> str:
    """Return the recipes of all runs as CSV, in the units of COLUMNS. No text can start a formula in a spreadsheet."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "model and task", "recipe", *(heading for heading, _ in COLUMNS.values())])
    for facts in analysed:
        for answer in first_screen.answers(facts):
            for name, numbers in recipes.numbers(answer["table"]):
                texts = (facts.run.manifest.run, answer["title"], name)
                writer.writerow(
                    [*map(_harmless, texts), *(_scaled(numbers[key], by) for key, (_, by) in COLUMNS.items())]
                )
    return out.getvalue()


def document(analysed: Sequence[RunFacts]) -> str:
    """Return the alerts, cards and recipes of all runs as one JSON document, in shares, bytes and seconds."""
    runs = [
        {
            "run": facts.run.manifest.run,
            "suite": facts.run.manifest.suite,
            "alerts": alerts.of_run(facts),
            "groups": [
                {
                    "title": answer["title"],
                    "cards": answer["cards"],
                    "recipes": [{"name": name, **numbers} for name, numbers in recipes.numbers(answer["table"])],
                }
                for answer in first_screen.answers(facts)
            ],
        }
        for facts in analysed
    ]
    return json_text({"schema": 1, "runs": runs}) + "\n"


FORMATS: dict[str, Callable[[Sequence[RunFacts]], str]] = {"markdown": markdown, "csv": rows, "json": document}
"""Name of a format -> function that returns the report in this format."""


def _scaled(value: Any, factor: float | None) -> Any:
    return "" if value is None else value if factor is None else round(value * factor, 4)


def _row(fields: Sequence[str]) -> str:
    return f"| {' | '.join(fields)} |"


def _with_flag(cost: dict[str, Any]) -> str:
    remarks = ", ".join(filter(None, (cost["small"], cost["flag"])))
    return f"{cost['text']} ({remarks})" if remarks else str(cost["text"])


def _harmless(text: str) -> str:
    return f"'{visible(text)}" if text.startswith(_FORMULA) else visible(text)
