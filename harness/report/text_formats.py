"""The first screen of a report in other formats: Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from harness.analysis.run_facts import RunFacts
from harness.console import json_text, visible
from harness.report import first_screen
from harness.report.formatting import escape_markdown

COLUMNS = (
    "run", "model and task", "recipe", "accuracy, %", "lower bound, %", "upper bound, %", "to the highest, points",
    "standing", "trainable parameters", "peak memory, MiB", "step, ms", "busy",
)  # fmt: skip
"""Columns of the CSV, with units. `busy`: how many of the trainings were timed on a busy machine."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def markdown(analysed: Sequence[RunFacts]) -> str:
    """Return the cards and the recipe tables as Markdown. Every name is escaped."""
    lines: list[str] = []
    for facts in analysed:
        manifest = facts.run.manifest
        lines += [f"# {escape_markdown(manifest.title or manifest.suite)}", "", f"Run `{manifest.run}`.", ""]
        for answer in first_screen.answers(facts):
            lines += [f"## {escape_markdown(answer['title'])}", ""]
            for card in answer["cards"]:
                headline, details = map(escape_markdown, (card["headline"], " ".join(card["details"])))
                lines.append(f"- **{card['question']} {headline}** {details}")
            heads = ["Recipe", "Accuracy", "95 % interval", "To the highest", "Trainable", "Peak, MiB", "Step, ms"]
            lines += ["", _row(heads), _row(["---", *["---:"] * (len(heads) - 1)])]
            for row in answer["table"]["rows"]:
                gap = row["gap"] + (" ≈" if row["standing"] == "tied" else "")
                costs = [_with_flag(cost) for cost in row["costs"]]
                lines.append(_row([escape_markdown(row["name"]), row["accuracy"], row["range"], gap, *costs]))
            lines += ["", "≈: no test tells the recipe apart from the highest.", ""]
    return "\n".join(lines)


def rows(analysed: Sequence[RunFacts]) -> str:
    """Return the recipes of all runs as CSV, in the units of COLUMNS. A text cannot start a formula in a spreadsheet."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for facts in analysed:
        for answer in first_screen.answers(facts):
            for row in answer["table"]["rows"]:
                recipe = row["recipe"]
                texts = (facts.run.manifest.run, answer["title"], row["name"])
                writer.writerow([*map(_harmless, texts), *_numbers(recipe)])
    return out.getvalue()


def document(analysed: Sequence[RunFacts]) -> str:
    """Return the cards and the recipes of all runs as one JSON document. Accuracies are shares; sizes are in bytes."""
    runs = [
        {
            "run": facts.run.manifest.run,
            "suite": facts.run.manifest.suite,
            "groups": [
                {
                    "title": answer["title"],
                    "cards": answer["cards"],
                    "recipes": [{"name": row["name"], **row["recipe"]} for row in answer["table"]["rows"]],
                }
                for answer in first_screen.answers(facts)
            ],
        }
        for facts in analysed
    ]
    return json_text({"schema": 1, "runs": runs}) + "\n"


FORMATS: dict[str, Callable[[Sequence[RunFacts]], str]] = {"markdown": markdown, "csv": rows, "json": document}
"""Name of a format -> function that returns the report in it."""


def _numbers(recipe: dict[str, Any]) -> Iterator[Any]:
    scales = {"accuracy": 100, "low": 100, "high": 100, "difference": 100, "peak_B": 2**-20, "step_s": 1000}
    for name, value in recipe.items():
        yield "" if value is None else round(value * scales[name], 4) if name in scales else value


def _row(fields: Sequence[str]) -> str:
    return f"| {' | '.join(fields)} |"


def _with_flag(cost: dict[str, Any]) -> str:
    return f"{cost['text']} ({cost['flag']})" if cost["flag"] else str(cost["text"])


def _harmless(text: str) -> str:
    return f"'{visible(text)}" if text.startswith(_FORMULA) else visible(text)
