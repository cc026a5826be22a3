"""Read the rows of a data set, and split them into training and test rows."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from harness.assets.table import Rows, Source
from harness.errors import AssetError, Problem, UsageError

_BATCH = 1024
"""Largest number of rows of a parquet file that are in memory at the same time."""


class UnreadableError(ValueError):
    """The rest of a file cannot be read.

    line: number of the first unreadable line. In a parquet file, it is the number of the first unreadable row.
    """

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line = line


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of every line that is not blank. The first line has the number 1."""
    with path.open("rb") as file:
        # Split at \\n only: str.splitlines also splits at U+2028 and U+0085, which a sentence may hold.
        for number, raw in enumerate(file, 1):
            text = _decoded(raw, number).rstrip("\n")
            if text.strip():
                yield number, text


def csv_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (number of the line, row as a mapping) for every row. The first line of the file names the columns."""
    reader = csv.DictReader(io.StringIO(_decoded(path.read_bytes(), 1), newline=""), strict=True)
    line = 1
    try:
        for record in reader:
            line = reader.line_num
            yield line, record
    except csv.Error as error:  # no more rows: the start of the next record is unknown
        raise UnreadableError(line + 1, str(error)) from error


def parquet_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (number of the row, row as a mapping) for every row. The first row has the number 1."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except ArrowException as error:
        raise UnreadableError(number + 1, f"not parquet: {str(error).partition(chr(10))[0]}") from error


def _decoded(raw: bytes, line: int) -> str:
    """Return the text of UTF-8 bytes. If `line` is 1, a byte-order mark at the start is removed.

    line: number of the line at which the bytes begin.
    """
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError(line + raw.count(b"\n", 0, error.start), "not UTF-8") from error


FORMATS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    "valence-tsv": lines,
    "jsonl": lines,
    "csv": csv_records,
    "parquet": parquet_records,
}
"""Value of `rows.format` -> function that reads a data file. The functions for the first two formats yield lines; the
others yield rows as mappings."""


@dataclass(frozen=True)
class LabelledRow:
    """A text and the number of its class."""

    id: str
    text: str
    label: int

    @property
    def overlap_key(self) -> str:
        """The text. No training row may have the same text as a test row."""
        return self.text


@dataclass(frozen=True)
class AnsweredRow:
    """A prompt and its answer."""

    id: str
    prompt: str
    answer: str

    @property
    def overlap_key(self) -> str:
        """The prompt. No training row may have the same prompt as a test row."""
        return self.prompt


@dataclass(frozen=True)
class TextRow:
    """A text to train a language model on."""

    id: str
    text: str

    @property
    def overlap_key(self) -> str:
        """The text that is compared to find overlap. No training text may contain the `overlap_key` of a test row."""
        return self.text


AnyRow = LabelledRow | AnsweredRow | TextRow
_R = TypeVar("_R", bound=AnyRow)


def read(source: Source, path: Path) -> list[AnyRow]:
    """Return every row of a data file, in order. Raises AssetError for the first row that cannot be read."""
    found, wrong = _examine(source, path)
    if wrong:
        line, why = wrong[0]
        raise AssetError(f"cannot read {source.name}: {why}", where=f"{path}:{line}", hint=_HINT)
    return [row for _, row in found]


def problems(source: Source, path: Path, labels: int = 0, test: int = 0, *, trains: bool = True) -> list[Problem]:
    """Return the mistakes in a data file of a task: the first few different ones.

    labels: number of classes, or 0 for a task without classes. test: number of test rows. trains: True if the file must
    have training rows besides the test rows.
    """
    found, wrong = _examine(source, path)
    wrong_rows = [(line, f"cannot read {source.name}: {why}", _HINT) for line, why in wrong]
    wrong_rows += [
        (line, f"label {row.label} of row `{row.id}`; the task's `labels` allows 0 to {labels - 1}", _HINT_LABEL)
        for line, row in found
        if labels and isinstance(row, LabelledRow) and row.label >= labels
    ]
    if not wrong and trains and len(found) <= test:
        what = f"{source.name} has {len(found)} rows, and the task tests {test} of them: none is left to train on"
        wrong_rows.append((1, what, f"add rows, or lower the task's `test` to at most {len(found) - 1}"))
    elif not wrong and len(found) < test:
        what = f"{source.name} has {len(found)} rows, and the task tests {test}"
        wrong_rows.append((1, what, f"add rows, or lower the task's `test` to at most {len(found)}"))
    first: dict[str, Problem] = {}
    for line, what, hint in sorted(wrong_rows):
        first.setdefault(what, Problem(f"{path}:{line}", what, hint))
    shown, rest = list(first.values())[:_SHOWN], list(first.values())[_SHOWN:]
    if rest:
        shown.append(Problem(rest[0].where, f"{len(rest)} more mistakes from here on", "correct the others first"))
    return shown


def _examine(source: Source, path: Path) -> tuple[list[tuple[int, AnyRow]], list[tuple[int, str]]]:
    """Return the rows of a file, and its mistakes. Each row and each mistake comes with the number of its line."""
    if source.rows is None:
        raise UsageError(f"{source.name} is a model, not data", hint="name a source of kind data")
    rows = source.rows
    if rows.format == "hub":  # `hub.write_rows` has saved it as jsonl, with our names
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
        wrong.append((1, "no row is left: `least` and `longest` drop them all" if some else "no rows"))
    return found, wrong


def split(
    rows: Sequence[AnyRow], test: int, seed: int, training: Sequence[AnyRow] | None = None
) -> tuple[list[AnyRow], list[AnyRow]]:
    """Shuffle the rows and return (training rows, test rows). The first `test` shuffled rows are the test rows.

    training: rows of a separate training set, in order. If None, all rows that are not test rows are training rows.
    Training rows that overlap with test rows are removed (see `without_overlap`).
    """
    most = len(rows) - 1 if training is None else len(rows)
    if not 0 < test <= most:
        raise UsageError(f"cannot test {test} of {len(rows)} rows", hint=f"set `test` between 1 and {most}")
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)  # noqa: S311  # reproducible, not secret
    trained = shuffled[test:] if training is None else training
    return without_overlap(trained, shuffled[:test]), shuffled[:test]


def without_overlap(trained: Sequence[_R], tested: Sequence[AnyRow]) -> list[_R]:
    """Return those rows of `trained` that do not overlap with any row of `tested`. Case and white space are ignored.

    The rows are compared by their `overlap_key`. A LabelledRow or AnsweredRow overlaps if its key equals the key of a
    test row. A TextRow overlaps if its text contains the key of a test row.
    """
    keys = {_plain(row.overlap_key) for row in tested}
    # Keys are grouped by their first characters, so that each text is searched only once.
    beginning: dict[int, dict[str, list[str]]] = {}
    for prompt in keys:
        size = min(len(prompt), _KEY)
        beginning.setdefault(size, {}).setdefault(prompt[:size], []).append(prompt)

    def holds_one(text: str) -> bool:
        return any(
            text.startswith(prompt, at) and not _INSIDE.match(text, at + len(prompt))
            for at in (found.start() for found in _BEGIN.finditer(text))
            for size, known in beginning.items()
            for prompt in known.get(text[at : at + size], ())
        )

    def overlaps(row: AnyRow) -> bool:
        plain = _plain(row.overlap_key)
        return plain in keys or (isinstance(row, TextRow) and holds_one(plain))

    return [row for row in trained if not overlaps(row)]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


_KEY = 24
_BEGIN = re.compile(r"\b\w|[^\w\s]")
_INSIDE = re.compile(r"(?<=\w)\w")
"""Matches a letter that follows another letter. A match at the end of a key means that the word goes on: a text about
parties does not contain the key `part`."""
_HINT = "look at source, member and rows in the table"
_HINT_LABEL = "correct the row, or the task's `labels` and `doc_to_choice`"
_SHOWN = 5


def _valence(record: str, _line: int, rows: Rows) -> LabelledRow | None:
    columns = record.split("\t", 2)
    if len(columns) != 3:
        raise ValueError(f"{len(columns)} columns instead of id, valence and text with tabs between them")
    valence = float(columns[1])
    if not math.isfinite(valence):
        raise ValueError(f"valence is {columns[1]}")
    if abs(valence) < rows.least:
        return None
    return LabelledRow(columns[0].strip(), _text(columns[2], "text"), int(valence > 0))


def _json(record: str, line: int, rows: Rows) -> AnyRow | None:
    fields = json.loads(record)
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004  # a mistake in the file
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
        raise ValueError(f"label {label!r} is no integer of at least 0")
    return label


def _text(text: object, name: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"the {name} is {text!r}, which is no text")  # noqa: TRY004  # a mistake in the file
    if not text.strip():
        raise ValueError(f"the {name} is empty")
    return text.strip()


_PARSERS: dict[str, Callable[[Any, int, Rows], AnyRow | None]] = {"valence-tsv": _valence, "jsonl": _json}
"""Format -> function that parses one line. `_columns` parses the formats that are not listed."""
