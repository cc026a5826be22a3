"""Validate a YAML file against a pydantic model; every mistake has its file, line and hint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from harness import yaml_lines
from harness.errors import Problem, SuiteError, in_order, near
from harness.yaml_lines import Document, KeyPath

_Model = TypeVar("_Model", bound=BaseModel)

_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_HINTS = {
    "int_type": "write a whole number, without quotes",
    "int_from_float": "write a whole number",
    "bool_type": "write true or false, without quotes",
    "float_type": "write a number, without quotes",
    "finite_number": "write a finite number",
    "string_type": "write a word; put it in quotes if it looks like a number",
    "list_type": "write a list: [a, b], or lines that start with -",
    "dict_type": "write keys and values: {key: value}",
    "model_type": "write keys and values: {key: value}",
}
"""By pydantic's type of the error."""


def load(path: Path, model: type[_Model]) -> tuple[Document, _Model]:
    """Read and validate a file. Raises SuiteError with every mistake in its YAML, its keys, their types and ranges."""
    document = yaml_lines.read(path)
    return document, validate(document, model)


def validate(document: Document, model: type[_Model]) -> _Model:
    """Validate a document. Raises SuiteError with every mistake in its YAML, its keys, their types and ranges.

    A validator of the model raises ValueError("MISTAKE; HINT").
    """
    problems = list(document.problems)
    try:
        keys = model.model_validate(document.data)
    except ValidationError as error:
        problems += _problems(error, model, document)
    if problems:
        raise SuiteError(in_order(problems))
    return keys


def shortened(text: str) -> str:
    """Return a text of at most 60 characters, cut where it is longer."""
    return text if len(text) <= 60 else text[:57] + "..."


def _problems(error: ValidationError, model: type[BaseModel], document: Document) -> Iterator[Problem]:
    for detail in error.errors(include_url=False):
        path = _path(document.data, detail["loc"])
        if path not in document.unreadable:  # that is a problem of the document already
            yield Problem(document.where(*path), *_sentence(dict(detail), path, model))


def _sentence(detail: dict[str, Any], path: KeyPath, model: type[BaseModel]) -> tuple[str, str]:
    """Return the mistake and the hint."""
    kind, given, limits = detail["type"], detail["input"], detail.get("ctx", {})
    name = next((part for part in reversed(detail["loc"]) if isinstance(part, str)), "")
    if kind == "extra_forbidden":
        return f"unknown key `{name}`", near(name, _known_keys(model, detail["loc"][:-1]), "keys here")
    if kind == "missing":
        return f"`{name}` is missing", f"add `{name}:`"
    if kind == "value_error":
        what, _, hint = detail["msg"].removeprefix("Value error, ").partition("; ")
        return what, hint
    subject = f"an entry of `{name}`" if path and isinstance(path[-1], int) else f"`{name}`"
    what = f"{subject} is {shortened(repr(given))}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", limits["expected"])
        return f"{what}, which is none of {', '.join(choices)}", near(str(given), choices, "one of")
    if kind == "string_pattern_mismatch":
        return what, "write letters, digits and . _ + - only"
    for bound, words in _BOUNDS.items():
        if bound in limits:
            limit = limits[bound]
            return what, f"write {words} {f'{limit:g}' if isinstance(limit, float) else limit}"
    if kind in ("too_short", "string_too_short"):
        return f"{subject} is empty", "give it a value, or leave it out"
    return what, _HINTS.get(kind, detail["msg"])


def _known_keys(model: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    for part in loc:
        if isinstance(part, str):
            fields = {field.alias or name: field for name, field in model.model_fields.items()}
            model = _inner(fields[part].annotation) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _inner(annotation: Any) -> type[BaseModel] | None:
    """Return the model inside an annotation such as `list[Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for part in get_args(annotation) if (inner := _inner(part))), None)


def _path(data: Any, loc: tuple[str | int, ...]) -> KeyPath:
    """Return pydantic's location in the data as written: a scalar that stands for a list of one has no index 0."""
    path: KeyPath = ()
    for part in loc:
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            data = data[part]  # type: ignore[index]
            path = (*path, part)
    return path
