"""What a task's YAML may say to lm-eval: only what training does too, so that a model is scored as it was taught."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta

from harness.errors import Problem
from harness.spelling import near
from harness.yaml_lines import Document, Way

NEEDED = ("task", "output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "metric_list")
HONOURED = (*NEEDED, "target_delimiter", "metadata", "tag", "task_alias")
COLUMNS = ("id", "text", "label")
"""What a row has, whatever its file calls them."""

_HARNESS_SETS = "remove it: data and splits come from `metadata`"
_REFUSED = {
    "description": "put it into `doc_to_text`",
    "gen_prefix": "put it into `doc_to_text`",
    "num_fewshot": "put the examples into `doc_to_text`",
    "dataset_path": _HARNESS_SETS,
    "dataset_name": _HARNESS_SETS,
    "custom_dataset": _HARNESS_SETS,
    "training_split": _HARNESS_SETS,
    "validation_split": _HARNESS_SETS,
    "test_split": _HARNESS_SETS,
    "fewshot_split": _HARNESS_SETS,
}
_TARGETS = ("label", "{{label}}", "{{ label }}")


def problems(document: Document, labels: int | None) -> list[Problem]:
    """Say what a task's file lacks, and what in it training or scoring would not follow."""
    return [Problem(document.where(*way), what, mend) for way, what, mend in _found(document.data, labels)]


def _found(data: dict[str, Any], labels: int | None) -> Iterator[tuple[Way, str, str]]:
    for key in NEEDED:
        if key not in data:
            yield (key,), f"`{key}` is missing", f"an lm-eval task needs `{key}:`"
    for key, value in data.items():
        if key not in HONOURED and value:  # an empty text or a zero asks for nothing
            mend = _REFUSED.get(key) or near(key, HONOURED, "remove it; keys that are honoured")
            yield (key,), f"`{key}` is not honoured: models are trained without it", mend
    if data.get("output_type", "multiple_choice") != "multiple_choice":
        yield ("output_type",), f"`output_type` is {data['output_type']!r}", "write multiple_choice, which is offered"
    if data.get("doc_to_target", "label") not in _TARGETS:
        what = f"`doc_to_target` is {data['doc_to_target']!r}; training takes the choice that the row's label numbers"
        yield ("doc_to_target",), what, "write label"
    if not isinstance(data.get("target_delimiter", ""), str):
        yield ("target_delimiter",), f"`target_delimiter` is {data['target_delimiter']!r}", "write a text in quotes"
    choices = data.get("doc_to_choice")
    if isinstance(choices, list) and labels is not None and len(choices) != labels:
        what = f"`labels` is {labels}, but `doc_to_choice` has {len(choices)}"
        yield ("metadata", "labels"), what, "make them agree"
    yield from _templates(data)
    metrics = data.get("metric_list", [{"metric": "acc"}])
    if not isinstance(metrics, list) or not any(isinstance(m, dict) and m.get("metric") == "acc" for m in metrics):
        yield ("metric_list",), "`metric_list` has no `acc`, which is what is recorded", "add {metric: acc}"


def _templates(data: dict[str, Any]) -> Iterator[tuple[Way, str, str]]:
    jinja = Environment()  # noqa: S701  # prompts are text, not HTML
    for key in ("doc_to_text", "doc_to_choice"):
        template = data.get(key, "")
        if not isinstance(template, str):
            if key == "doc_to_text":
                yield (key,), f"`{key}` is {template!r}", "write a text in quotes; {{text}} stands for the row's text"
            continue
        try:
            names = meta.find_undeclared_variables(jinja.parse(template)) - set(jinja.globals)
        except TemplateSyntaxError as error:
            yield (key,), f"`{key}` is no template: {error.message}", "mend its braces"
            continue
        for name in sorted(names - set(COLUMNS)):
            what = f"`{key}` uses `{name}`, which no row has"
            yield (key,), what, near(name, COLUMNS, "rows have, whatever their file calls them")
