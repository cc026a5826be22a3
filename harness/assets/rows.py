"""Rows of a data set: read from its file, split once into train and test."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.assets.table import Rows, Source
from harness.errors import AssetError, Problem, UsageError


@dataclass(frozen=True)
class Row:
    """One labelled text."""

    id: str
    text: str
    label: int


def read(source: Source, path: Path) -> list[Row]:
    """Read every row of a data file, in its order. A row that cannot be read is an AssetError with its line."""
    found, wrong = _examine(source, path)
    if wrong:
        line, why = wrong[0]
        raise AssetError(f"cannot read {source.name}: {why}", where=f"{path}:{line}", mend=_MEND)
    return [row for _, row in found]


def problems(source: Source, path: Path, labels: int, test: int) -> list[Problem]:
    """Say all that keeps a task of `labels` classes and `test` test rows from using a data file; empty if nothing does.

    Of rows that are wrong in the same way the first is shown, and of a file's ways the first few.
    """
    found, wrong = _examine(source, path)
    told = [(line, f"cannot read {source.name}: {why}", _MEND) for line, why in wrong]
    told += [
        (line, f"label {row.label} of row `{row.id}`; the task's `labels` allows 0 to {labels - 1}", _MEND_LABEL)
        for line, row in found
        if row.label >= labels
    ]
    if not wrong and len(found) <= test:
        what = f"{source.name} has {len(found)} rows, and the task keeps {test} of them for its test: none is left"
        told.append((1, what, f"give it more rows, or lower the task's `test` to at most {len(found) - 1}"))
    first: dict[str, Problem] = {}
    for line, what, mend in sorted(told):
        first.setdefault(what, Problem(f"{path}:{line}", what, mend))
    shown, rest = list(first.values())[:_SHOWN], list(first.values())[_SHOWN:]
    if rest:
        shown.append(Problem(rest[0].where, f"{len(rest)} more mistakes from here on", "mend those before first"))
    return shown


def _examine(source: Source, path: Path) -> tuple[list[tuple[int, Row]], list[tuple[int, str]]]:
    """Return what can be read, and why what cannot be read cannot, each with its line."""
    if source.rows is None:
        raise UsageError(f"{source.name} is a model, not data", mend="name a source of kind data")
    # Data from the hub were written as jsonl, under these names, when they were fetched.
    rows = Rows(format="jsonl") if source.rows.format == "hub" else source.rows
    records, parse = _FORMATS[rows.format]
    found: list[tuple[int, Row]] = []
    wrong: list[tuple[int, str]] = []
    line = 0
    try:
        for line, record in records(_text(path)):
            try:
                row = parse(record, line, rows)
            except ValueError as error:
                wrong.append((line, str(error)))
                continue
            if row is not None:
                found.append((line, row))
    except UnicodeDecodeError as error:
        wrong.append((error.object[: error.start].count(b"\n") + 1, "not UTF-8"))
    except csv.Error as error:  # where the next record begins cannot be told
        wrong.append((line + 1, str(error)))
    except OSError as error:
        raise AssetError(f"cannot read {source.name}: {error.strerror}", where=str(path), mend=_MEND) from error
    if not found and not wrong:
        wrong.append((1, "not one row"))
    return found, wrong


def split(rows: Sequence[Row], test: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Cut rows into (train, test) after one shuffle; the first `test` rows are the test set.

    A text of the test set is taken out of train, so that no accuracy rests on a row that was learnt.
    """
    if not 0 < test < len(rows):
        raise UsageError(
            f"cannot keep {test} of {len(rows)} rows for the test", mend=f"set `test` between 1 and {len(rows) - 1}"
        )
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)  # noqa: S311  # reproducible, not secret
    tested = {row.text for row in shuffled[:test]}
    return [row for row in shuffled[test:] if row.text not in tested], shuffled[:test]


_MEND = "look at source, member and rows in the table"
_MEND_LABEL = "correct the row, or the task's `labels` and `doc_to_choice`"
_SHOWN = 5


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig")  # a byte-order mark is no part of the first column's name


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines(): a sentence may hold U+2028 or U+0085, which it takes for line ends.
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _csv_records(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    return ((reader.line_num, record) for record in reader)


def _valence(record: str, _line: int, rows: Rows) -> Row | None:
    columns = record.split("\t", 2)
    if len(columns) != 3:
        raise ValueError(f"{len(columns)} columns where id, valence and text should stand, with tabs between")
    valence = float(columns[1])
    if not math.isfinite(valence):
        raise ValueError(f"valence is {columns[1]}")
    return None if abs(valence) < rows.least else _row(columns[0], columns[2], int(valence > 0))


def _json(record: str, line: int, rows: Rows) -> Row:
    fields = json.loads(record)
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004  # the file is wrong, not a caller
    return _columns(fields, line, rows)


def _columns(record: Mapping[str, Any], line: int, rows: Rows) -> Row:
    for column in (rows.text, rows.label):
        if record.get(column) is None:
            raise ValueError(f"no column {column!r}; there are {', '.join(map(str, record))}")
    label = record[rows.label]
    if isinstance(label, str) and label.strip().isdecimal():
        label = int(label)
    if type(label) is not int or label < 0:
        raise ValueError(f"label {label!r} is no integer from 0")
    return _row(record.get(rows.id, line), record[rows.text], label)


def _row(name: object, text: object, label: int) -> Row:
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the text is empty")
    return Row(str(name).strip(), text.strip(), label)


_FORMATS: dict[str, tuple[Callable[[str], Iterator[tuple[int, Any]]], Callable[[Any, int, Rows], Row | None]]] = {
    "valence-tsv": (_lines, _valence),
    "jsonl": (_lines, _json),
    "csv": (_csv_records, _columns),
}
