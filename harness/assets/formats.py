"""Read files of rows record by record."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

_BATCH = 1024
"""Rows of a parquet file that are in memory at once."""


class UnreadableError(ValueError):
    """The rest of a file cannot be read. line: in a parquet file, the number of the row."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line = line


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every line that is not blank."""
    with path.open("rb") as file:
        # Split at \\n only: str.splitlines also splits at U+2028 and U+0085, which a sentence may hold.
        for number, raw in enumerate(file, 1):
            text = _decoded(raw, number).rstrip("\n")
            if text.strip():
                yield number, text


def csv_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (line, columns) of every row; the file's first line names the columns."""
    reader = csv.DictReader(io.StringIO(_decoded(path.read_bytes(), 1), newline=""), strict=True)
    line = 1
    try:
        for record in reader:
            line = reader.line_num
            yield line, record
    except csv.Error as error:  # the start of the next record is unknown
        raise UnreadableError(line + 1, str(error)) from error


def parquet_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (number of the row from 1, columns) of every row."""
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
    """Return UTF-8 as text; a byte-order mark at the start of the file is dropped."""
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
"""Readers by `rows.format`. Records of the first two are lines, of the others columns."""
