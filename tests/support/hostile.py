"""Strings that would take over a terminal, and what may not appear in the output of a command."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)
FORGED = "✓ pass: forged, everything conforms"
HOSTILE = f"zz\x1b[2J\x1b]0;pwned\x07\x9b31m\x7f\x08\r\u202e\u2066\u200f\u061c\u2028\x85\n{FORGED}\n\ttail"
"""Clears the screen, sets the title of the window, turns the direction of text, goes back, and begins lines of its own."""


def assert_safe(printed: str) -> None:
    """Fail if a text holds anything but printable characters and line breaks, or a line that HOSTILE has made.

    What a plug-in prints, and a traceback, is quoted: its lines begin with `| `.
    """
    for line in printed.split("\n"):
        assert line.isprintable(), f"not printable: {line!r}"
        assert not line.strip().startswith(FORGED), f"a forged line: {line!r}"


def poisoned(model: M, keep: tuple[str, ...] = ()) -> M:
    """Return a copy of a model with HOSTILE after each text that may be any text. keep: names of fields to leave alone."""
    document = model.model_dump(mode="json", by_alias=True)
    for path in sorted({tuple(path) for path in _paths(document)}):
        if set(path) & set(keep):
            continue
        changed = _changed(document, path)
        try:
            type(model).model_validate_json(json.dumps(changed))
        except ValidationError:
            continue
        document = changed
    return type(model).model_validate_json(json.dumps(document))


def _paths(value: Any) -> list[list[str]]:
    """Return the places of texts. All members of a list have the same place."""
    if isinstance(value, str):
        return [[]]
    if isinstance(value, dict):
        return [[key, *path] for key, one in value.items() for path in _paths(one)]
    return [["*", *path] for one in value for path in _paths(one)] if isinstance(value, list) else []


def _changed(value: Any, path: tuple[str, ...]) -> Any:
    if not path:
        return value + HOSTILE if isinstance(value, str) else value
    if isinstance(value, dict):
        return {key: _changed(one, path[1:]) if key == path[0] else one for key, one in value.items()}
    return [_changed(one, path[1:]) for one in value] if isinstance(value, list) and path[0] == "*" else value
