"""Rows of a data set: read from its file, and parted into those that train and those that are tested."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from harness.assets.formats import FORMATS, UnreadableError
from harness.assets.table import Rows, Source
from harness.errors import AssetError, Problem, UsageError


@dataclass(frozen=True)
class LabelledRow:
    """One labelled text."""

    id: str
    text: str
    label: int

    @property
    def asked(self) -> str:
        """What a test must not share with training."""
        return self.text


@dataclass(frozen=True)
class AnsweredRow:
    """One prompt and the answer that is wanted."""

    id: str
    prompt: str
    answer: str

    @property
    def asked(self) -> str:
        """What a test must not share with training."""
        return self.prompt


@dataclass(frozen=True)
class TextRow:
    """One text of a language model's training."""

    id: str
    text: str

    @property
    def asked(self) -> str:
        """What a test must not share with training."""
        return self.text


AnyRow = LabelledRow | AnsweredRow | TextRow
_R = TypeVar("_R", bound=AnyRow)


def read(source: Source, path: Path) -> list[AnyRow]:
    """Read every row of a data file, in its order. A row that cannot be read is an AssetError with its line."""
    found, wrong = _examine(source, path)
    if wrong:
        line, why = wrong[0]
        raise AssetError(f"cannot read {source.name}: {why}", where=f"{path}:{line}", hint=_HINT)
    return [row for _, row in found]


def problems(source: Source, path: Path, labels: int = 0, test: int = 0, *, trains: bool = True) -> list[Problem]:
    """Say all that keeps a task from using a data file; empty if nothing does.

    labels: classes, 0 for a task without. test: rows that are kept for the test. trains: whether the rest must train.
    Of rows that are wrong in the same way the first is shown, and of a file's ways the first few.
    """
    found, wrong = _examine(source, path)
    told = [(line, f"cannot read {source.name}: {why}", _HINT) for line, why in wrong]
    told += [
        (line, f"label {row.label} of row `{row.id}`; the task's `labels` allows 0 to {labels - 1}", _HINT_LABEL)
        for line, row in found
        if labels and isinstance(row, LabelledRow) and row.label >= labels
    ]
    if not wrong and trains and len(found) <= test:
        what = f"{source.name} has {len(found)} rows, and the task keeps {test} of them for its test: none is left"
        told.append((1, what, f"give it more rows, or lower the task's `test` to at most {len(found) - 1}"))
    elif not wrong and len(found) < test:
        what = f"{source.name} has {len(found)} rows, and the task tests {test}"
        told.append((1, what, f"give it more rows, or lower the task's `test` to at most {len(found)}"))
    first: dict[str, Problem] = {}
    for line, what, hint in sorted(told):
        first.setdefault(what, Problem(f"{path}:{line}", what, hint))
    shown, rest = list(first.values())[:_SHOWN], list(first.values())[_SHOWN:]
    if rest:
        shown.append(Problem(rest[0].where, f"{len(rest)} more mistakes from here on", "mend those before first"))
    return shown


def _examine(source: Source, path: Path) -> tuple[list[tuple[int, AnyRow]], list[tuple[int, str]]]:
    """Return what can be read, and why what cannot be read cannot, each with its line."""
    if source.rows is None:
        raise UsageError(f"{source.name} is a model, not data", hint="name a source of kind data")
    rows = source.rows
    if rows.format == "hub":  # fetched, it is jsonl, under our own names
        rows = Rows(format="jsonl", holds=rows.holds, longest=rows.longest)
    parse = _PARSERS.get(rows.format, _columns)
    found: list[tuple[int, AnyRow]] = []
    wrong: list[tuple[int, str]] = []
    some = False
    try:
        for line, record in FORMATS[rows.format](path):
            some = True
            try:
                row = parse(record, line, rows)
            except ValueError as error:
                wrong.append((line, str(error)))
                continue
            if row is not None:
                found.append((line, row))
    except UnreadableError as error:
        wrong.append((error.line, str(error)))
    except OSError as error:
        raise AssetError(f"cannot read {source.name}: {error.strerror}", where=str(path), hint=_HINT) from error
    if not found and not wrong:
        wrong.append((1, "not one row is left: `least` and `longest` drop them all" if some else "not one row"))
    return found, wrong


def split(
    rows: Sequence[AnyRow], test: int, seed: int, training: Sequence[AnyRow] | None = None
) -> tuple[list[AnyRow], list[AnyRow]]:
    """Cut rows into (train, test) after one shuffle; the first `test` rows are the test set.

    training: rows of a set of its own, which train instead of the rest, in their order. What the test asks is taken out
    of train, so that no accuracy rests on a row that was learnt: see `unasked`.
    """
    most = len(rows) - 1 if training is None else len(rows)
    if not 0 < test <= most:
        raise UsageError(
            f"cannot keep {test} of {len(rows)} rows for the test", hint=f"set `test` between 1 and {most}"
        )
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)  # noqa: S311  # reproducible, not secret
    trained = shuffled[test:] if training is None else training
    return without_overlap(trained, shuffled[:test]), shuffled[:test]


def without_overlap(trained: Sequence[_R], tested: Sequence[AnyRow]) -> list[_R]:
    """Return the rows of `trained` that give away nothing of `tested`, whatever their case and white space.

    A row with a prompt or a label goes if a tested one asks the same; a whole text already if it holds what one asks.
    """
    asked = {_plain(row.asked) for row in tested}
    # By their first characters, so that a text is gone through once and not once for each prompt.
    beginning: dict[int, dict[str, list[str]]] = {}
    for prompt in asked:
        size = min(len(prompt), _KEY)
        beginning.setdefault(size, {}).setdefault(prompt[:size], []).append(prompt)

    def holds_one(text: str) -> bool:
        return any(
            text.startswith(prompt, at) and not _INSIDE.match(text, at + len(prompt))
            for at in (found.start() for found in _BEGIN.finditer(text))
            for size, known in beginning.items()
            for prompt in known.get(text[at : at + size], ())
        )

    def gives_away(row: AnyRow) -> bool:
        plain = _plain(row.asked)
        return plain in asked or (isinstance(row, TextRow) and holds_one(plain))

    return [row for row in trained if not gives_away(row)]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


_KEY = 24
_BEGIN = re.compile(r"\b\w|[^\w\s]")
_INSIDE = re.compile(r"(?<=\w)\w")
"""Where a prompt may begin, and where none may end: `art` is not asked by a text about parties."""
_HINT = "look at source, member and rows in the table"
_HINT_LABEL = "correct the row, or the task's `labels` and `doc_to_choice`"
_SHOWN = 5


def _valence(record: str, _line: int, rows: Rows) -> LabelledRow | None:
    columns = record.split("\t", 2)
    if len(columns) != 3:
        raise ValueError(f"{len(columns)} columns where id, valence and text should stand, with tabs between")
    valence = float(columns[1])
    if not math.isfinite(valence):
        raise ValueError(f"valence is {columns[1]}")
    if abs(valence) < rows.least:
        return None
    return LabelledRow(columns[0].strip(), _text(columns[2], "text"), int(valence > 0))


def _json(record: str, line: int, rows: Rows) -> AnyRow | None:
    fields = json.loads(record)
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004  # the file is wrong, not a caller
    return _columns(fields, line, rows)


def _columns(record: Mapping[str, Any], line: int, rows: Rows) -> AnyRow | None:
    for name, column in rows.columns.items():
        if column not in record:
            raise ValueError(f"no column {column!r}; there are {', '.join(map(str, record))}")
        if record[column] is None:
            raise ValueError(f"the {name} is empty")
    parts = {name: record[column] for name, column in rows.columns.items()}
    label = _label(parts.pop("label")) if "label" in parts else None
    texts = {name: _text(part, name) for name, part in parts.items()}
    if rows.longest is not None and sum(map(len, texts.values())) > rows.longest:
        return None
    name = str(record.get(rows.id, line)).strip()
    if label is not None:
        return LabelledRow(name, texts["text"], label)
    return AnsweredRow(name, **texts) if rows.holds == "answers" else TextRow(name, **texts)


def _label(label: object) -> int:
    if isinstance(label, str) and label.strip().isdecimal():
        label = int(label)
    if type(label) is not int or label < 0:
        raise ValueError(f"label {label!r} is no integer from 0")
    return label


def _text(text: object, name: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"the {name} is {text!r}, which is no text")  # noqa: TRY004  # the file is wrong, not a caller
    if not text.strip():
        raise ValueError(f"the {name} is empty")
    return text.strip()


_PARSERS: dict[str, Callable[[Any, int, Rows], AnyRow | None]] = {"valence-tsv": _valence, "jsonl": _json}
"""How a record that is a line becomes a row; others have columns."""
