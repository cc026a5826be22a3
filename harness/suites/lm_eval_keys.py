"""Check the lm-eval keys of a task. Keys that training does not support are refused: scoring must match training."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta

from harness.assets import lm_eval_files
from harness.errors import Problem, did_you_mean
from harness.methods.peft_config import virtual_tokens
from harness.records.record import Cell
from harness.yaml_validation import Document, KeyPath

LABELLED = ("id", "text", "label")
ANSWERED = ("id", "prompt", "answer")
"""Keys of a row of a task with texts as answers. The data file may use other names for them."""

MAX_GEN_TOKS = 256
"""Maximum number of tokens of a generated answer, if the task does not set it. lm-eval has the same default."""

_NEEDED = ("task", "output_type", "doc_to_text", "doc_to_target")
_OWN = {
    "multiple_choice": ("doc_to_choice", "metric_list"),
    "generate_until": ("generation_kwargs", "metric_list"),
}
"""Kind of a task -> keys that it requires in addition to _NEEDED."""
_FREE = ("target_delimiter", "metadata", "tag", "task_alias")
METRICS = {"multiple_choice": "acc", "generate_until": "exact_match"}
"""Kind of a task -> its metric, which is 1 for an item with the right answer and 0 for any other item."""
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

_Found = Iterator[tuple[KeyPath, str, str]]


def problems(document: Document, labels: int | None) -> list[Problem]:
    """Return the problems of a task's file: missing keys, and keys that training or scoring does not support.

    labels: number of classes. None for a task without classes.
    """
    return [Problem(document.where(*path), what, hint) for path, what, hint in _found(document.data, labels)]


def filters(data: dict[str, Any]) -> list[str]:
    """Return the names of a task's filters. If it has none, return `none`, the name of lm-eval's default filter."""
    listed = data.get("filter_list") or [{"name": "none"}]
    return [str(f["name"]) for f in listed if isinstance(f, dict) and "name" in f] if isinstance(listed, list) else []


def max_answer_tokens(spec: dict[str, Any]) -> int:
    """Return the maximum number of tokens of a generated answer."""
    return int((spec.get("generation_kwargs") or {}).get("max_gen_toks", MAX_GEN_TOKS))


def too_long(cell: Cell, positions: int | None, answer: int) -> tuple[str, str] | None:
    """Return a reason and a hint if the texts of a Cell are too long for its model. Otherwise return None.

    positions: maximum length of a text for the model, or None without a limit. answer: maximum number of tokens of a
    generated answer, or 0 for a task with classes.
    """
    limit, virtual = cell.training.max_tokens, virtual_tokens(cell.config)
    if positions is None or virtual + limit + answer <= positions:
        return None
    if limit > positions:
        return f"`max_tokens` is {limit}, but {cell.model} has {positions} positions", f"write at most {positions}"
    exceed = f"exceed the {positions} positions of {cell.model}"
    if virtual:
        what = f"{virtual} virtual tokens, a text of {limit} and an answer of {answer} {exceed}"
        return what, "lower `max_tokens`, or `num_virtual_tokens`"
    what = f"a prompt of {limit} tokens and an answer of {answer} {exceed}"
    return what, "lower `max_tokens`, or the task's `max_gen_toks`"


def _found(data: dict[str, Any], labels: int | None) -> _Found:
    kind = data.get("output_type", "multiple_choice")
    if not isinstance(kind, str) or kind not in _OWN:
        yield ("output_type",), f"`output_type` is {kind!r}", f"write one of {', '.join(_OWN)}"
        kind = "multiple_choice"
    needed = (*_NEEDED, *_OWN[kind])
    supported = (*needed, *_FREE, *(("filter_list",) if kind == "generate_until" else ()))
    for key in needed:
        if key not in data:
            yield (key,), f"`{key}` is missing", f"an lm-eval task needs `{key}:`"
    for key, value in data.items():
        if key not in supported and value:  # an empty text or a zero has no effect
            hint = _REFUSED.get(key) or did_you_mean(key, supported, "remove it; supported keys")
            yield (key,), f"`{key}` is not supported: training ignores it", hint
    if not isinstance(data.get("target_delimiter", ""), str):
        yield ("target_delimiter",), f"`target_delimiter` is {data['target_delimiter']!r}", "write a text in quotes"
    if kind == "generate_until":
        yield from _templates(data, ("doc_to_text", "doc_to_target"), ANSWERED)
        yield from _generation(data.get("generation_kwargs", {"until": []}))
        yield from _filters(data.get("filter_list") or [])
    else:
        yield from _choices(data, labels)
        yield from _templates(data, ("doc_to_text", "doc_to_choice"), LABELLED)
    metric = METRICS[kind]
    metrics = data.get("metric_list", [{"metric": metric}])
    if not isinstance(metrics, list) or not any(isinstance(m, dict) and m.get("metric") == metric for m in metrics):
        what = f"`metric_list` has no `{metric}`, which Records need"
        yield ("metric_list",), what, f"add {{metric: {metric}}}"


def _choices(data: dict[str, Any], labels: int | None) -> _Found:
    if data.get("doc_to_target", "label") not in _TARGETS:
        what = f"`doc_to_target` is {data['doc_to_target']!r}; training uses the row's label as index of the choice"
        yield ("doc_to_target",), what, "write label"
    choices = data.get("doc_to_choice")
    if isinstance(choices, list) and labels is not None and len(choices) != labels:
        what = f"`labels` is {labels}, but `doc_to_choice` has {len(choices)}"
        yield ("metadata", "labels"), what, "make them agree"


def _templates(data: dict[str, Any], keys: tuple[str, ...], columns: tuple[str, ...]) -> _Found:
    jinja = Environment()  # noqa: S701  # prompts are text, not HTML
    for key in keys:
        template = data.get(key, "")
        if not isinstance(template, str):
            if key != "doc_to_choice":
                what = f"`{key}` is {template!r}"
                yield (key,), what, f"write a text in quotes; {{{{{columns[1]}}}}} stands for the row's {columns[1]}"
            continue
        try:
            names = meta.find_undeclared_variables(jinja.parse(template)) - set(jinja.globals)
        except TemplateSyntaxError as error:
            yield (key,), f"`{key}` is not a template: {error.message}", "correct its braces"
            continue
        for name in sorted(names - set(columns)):
            what = f"`{key}` uses `{name}`, but rows have no such key"
            yield (key,), what, did_you_mean(name, columns, "keys of a row")


def _generation(given: Any) -> _Found:
    """Yield the problems of `generation_kwargs`.

    Answers are always generated greedily. An answer ends after `max_gen_toks` tokens, or at one of the texts in
    `until`.
    """
    key = "generation_kwargs"
    if not isinstance(given, dict):
        yield (key,), f"`{key}` is {given!r}", 'write {until: ["\\n\\n"], max_gen_toks: 256}'
        return
    until = given.get("until")
    texts = until if isinstance(until, list) else [until]
    if "until" not in given or not all(isinstance(text, str) and text for text in texts):
        yield (key, "until"), f"`until` is {until!r}", 'list the texts that end an answer: ["\\n\\n"]; [] for none'
    most = given.get("max_gen_toks", MAX_GEN_TOKS)
    if type(most) is not int or most < 1:
        yield (
            (key, "max_gen_toks"),
            f"`max_gen_toks` is {most!r}",
            "write the maximum number of tokens, at least 1",
        )
    for name, value in given.items():
        if name not in ("until", "max_gen_toks", "do_sample", "temperature"):
            yield (key, name), f"`{name}` is not supported: answers are generated greedily", "remove it"
        elif name in ("do_sample", "temperature") and value:
            yield (key, name), f"`{name}` is {value!r}: answers are generated greedily", "remove it"


def _filters(listed: Any) -> _Found:
    """Yield the problems of `filter_list`. Its filters extract the answer from a generated text."""
    form = "write `- {name: NAME, filter: [{function: take_first}]}`"
    if not isinstance(listed, list):
        yield ("filter_list",), f"`filter_list` is {listed!r}", form
        return
    known = lm_eval_files.filter_functions()
    seen: set[str] = set()
    for i, one in enumerate(listed):
        path: KeyPath = ("filter_list", i)
        steps = one.get("filter") if isinstance(one, dict) else None
        if (
            not isinstance(one, dict)
            or not isinstance(one.get("name"), str)
            or not isinstance(steps, list)
            or not steps
            or not all(isinstance(step, dict) and isinstance(step.get("function"), str) for step in steps)
        ):
            yield path, "not a filter", form
            continue
        if one["name"] in seen:
            yield (*path, "name"), f"duplicate filter `{one['name']}`", "rename one of the two"
        seen.add(one["name"])
        for j, step in enumerate(steps):
            if known and step["function"] not in known:
                what = f"lm-eval has no filter function `{step['function']}`"
                yield (*path, "filter", j, "function"), what, did_you_mean(step["function"], known, "it has")
            try:
                re.compile(str(step.get("regex_pattern", "")))
            except re.error as error:
                yield (*path, "filter", j, "regex_pattern"), f"`regex_pattern` is not a pattern: {error}", "correct it"
