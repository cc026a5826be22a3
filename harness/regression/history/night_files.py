"""Files of a history: one small, sorted file per night, written atomically, to be committed to git.

results/history/<night>.jsonl        the night, its runs and places; then one row per attempt at a Cell
                cells.jsonl          the Cells by their ids, which rows refer to
                resets.jsonl         accepted levels; see `decisions`
                confirmations.jsonl  verdicts on changes; see `decisions`

The lines of a night are parsed to TypedDicts and used without conversion, since a history has up to a quarter of a
million rows.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, TypeVar, cast

from pydantic import ConfigDict, Field, ValidationError

from harness.errors import StoreError, UsageError, plural
from harness.records import files
from harness.records.base_model import FrozenModel

SCHEMA = 1
PASSES = 3
"""Number of passes (runs of the same suite) that each nightly run should have. The median of three ignores one
disturbed pass."""
CELLS, RESETS, CONFIRMATIONS = "cells.jsonl", "resets.jsonl", "confirmations.jsonl"
EVERY = "*"
"""Text that stands for all Cells or all metrics."""
NEAR = 2
"""Uncertainty of the time of a change, in nights. A decision also applies to a change that is up to this many nights
away."""

Fields = dict[str, Any]
"""Fields of a Cell as JSON, written by this or another version of the harness."""
_NOT_A_LINE = "an incomplete or unknown line"
_Line = TypeVar("_Line")
_Word = Annotated[str, Field(min_length=1)]


class AttemptRow(TypedDict):
    """One row of a night's file: an attempt at a Cell, with its values or its status."""

    cell: str
    run: str
    attempt: int
    on: str
    """Id of the place, i.e. of the machine and its software."""
    values: NotRequired[dict[str, float]]
    """Values by metric; present if the attempt ended ok."""
    status: NotRequired[str]
    """Status of the attempt; present if it did not end ok."""


class RunHeader(TypedDict):
    """Facts about a run that all its rows share. They show how the run differs from the run of the night before."""

    run: str
    started: NotRequired[str]
    suite: NotRequired[str]
    code_version: NotRequired[str]
    git_sha: NotRequired[str]
    git_dirty: NotRequired[bool | None]
    software: NotRequired[dict[str, str]]


class _Stored(FrozenModel):
    """Base class of the pydantic models in a history. Unknown keys, which newer versions may write, are ignored."""

    model_config = ConfigDict(extra="ignore")


class Evidence(_Stored):
    """The change that a verdict is about, as `detect` found it at that time."""

    old_night: str
    place: str
    before: float
    after: float


class Decision(_Stored):
    """One line of resets.jsonl or confirmations.jsonl: the acceptance of a level, or a verdict on a change."""

    schema_: Literal[1] = Field(alias="schema", default=1)
    cell: _Word
    metric: _Word
    night: _Word
    reason: _Word
    author: _Word
    made: str | None = None
    """Time of the decision: UTC, ISO 8601."""
    verdict: str | None = None
    """Verdict of a confirmation: `regressed`, `improved` or `refuted`; None for a reset."""
    revisions: list[str] | None = None
    """The two revisions that were compared: old, then new. None if no revisions were compared."""
    seen: Evidence | None = None

    def applies(self, cell: str, metric: str) -> bool:
        """Return whether the decision is about the series of this Cell and metric.

        A decision about the metric `latency_s` is also about every metric `latency_s/...`.
        """
        return self.cell in (cell, EVERY) and self.metric in (metric, metric.partition("/")[0], EVERY)

    def document(self) -> dict[str, Any]:
        """Return the decision for JSON."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


@dataclass
class Night:
    """Results of one date: of the nightly runs, and of any other run that was added under this date."""

    night: str
    """Date of the night, YYYY-MM-DD."""
    runs: dict[str, RunHeader] = field(default_factory=dict)
    """Headers of the runs, by run id."""
    places: dict[str, dict[str, str]] = field(default_factory=dict)
    """Facts about each place (machine and software), by id of the place."""
    rows: list[AttemptRow] = field(default_factory=list)

    def rows_of(self, cell: str, place: str) -> Iterator[AttemptRow]:
        """Yield the attempts at a Cell that ran at a place. The Cell `*` stands for every Cell."""
        return (row for row in self.rows if cell in (EVERY, row["cell"]) and row["on"] == place)


@dataclass(frozen=True)
class History:
    """A history as read from disk."""

    folder: Path
    nights: tuple[Night, ...]
    """Nights, oldest first."""
    cells: dict[str, Fields]
    """Fields of each Cell as a JSON object, by cell_id."""
    resets: tuple[Decision, ...]
    confirmations: tuple[Decision, ...]
    broken: dict[str, str]
    """`file` or `file:line` -> reason why the file or line could not be used. The rest of the history is used."""

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of each night in `nights`, by date."""
        return {night.night: number for number, night in enumerate(self.nights)}

    def distance(self, night: str, other: str) -> float:
        """Return the number of nights between two dates. If the history lacks one of the dates, return infinity."""
        known = night in self.index and other in self.index
        return abs(self.index[night] - self.index[other]) if known else math.inf

    def night(self, day: str) -> Night:
        """Return the results that are stored under a date."""
        return self.nights[self.index[day]]


def read(folder: Path) -> History:
    """Read and return a history. Its field `broken` names the unreadable parts.

    Raises UsageError if the folder does not exist.
    """
    if not folder.is_dir():
        hint = "`peft-harness history add RUN` starts one"
        raise UsageError("no history in this folder", where=str(folder), hint=hint)
    broken: dict[str, str] = {}
    nights = [read_night(path, broken) for path in sorted(folder.glob("*.jsonl")) if _names_night(path, broken)]
    found = cells(folder, broken)
    resets, confirmations = (tuple(_lines(folder / name, broken, _decision)) for name in (RESETS, CONFIRMATIONS))
    return History(folder, tuple(night for night in nights if night is not None), found, resets, confirmations, broken)


def read_night(path: Path, broken: dict[str, str]) -> Night | None:
    """Read and return the results of one night. Put the reason for each invalid part into `broken`.

    If the first line is invalid or has another schema, return None.
    """
    lines = _lines(path, broken, _object)
    head = next(lines, None)
    if head is None or head.get("night") != path.stem:
        broken.setdefault(path.name, "not a night: the first line does not name the same night as the file")
        return None
    if head.get("schema") != SCHEMA:
        broken[path.name] = f"written with schema {head.get('schema')}, this version reads {SCHEMA}"
        return None
    night, bad = Night(path.stem), 0
    for line in lines:
        if "cell" in line:
            if _is_row(line) and line["run"] in night.runs and line["on"] in night.places:
                night.rows.append(cast(AttemptRow, line))
            else:
                bad += 1
        elif isinstance(line.get("run"), str):
            night.runs[line["run"]] = cast(RunHeader, line)
        elif isinstance(line.get("place"), str) and isinstance(line.get("is"), dict):
            night.places[line["place"]] = line["is"]
        else:
            bad += 1
    by_attempt = {(row["cell"], row["run"]): row for row in night.rows}
    bad += len(night.rows) - len(by_attempt)  # a merge of two branches may leave duplicates
    night.rows = list(by_attempt.values())
    if bad:
        reason = f"{plural(bad, 'line')} not written by `history add`"
        broken[path.name] = "; ".join(filter(None, [broken.get(path.name, ""), reason]))
    return night


def cells(folder: Path, broken: dict[str, str]) -> dict[str, Fields]:
    """Read and return the fields of the Cells, by cell_id. For each invalid line, put the reason into `broken`."""
    return dict(_lines(folder / CELLS, broken, _cell))


def write_night(folder: Path, night: Night) -> None:
    """Write the file of one night: the headers, then the rows.

    The rows are sorted by Cell and run, so that a diff shows only the new rows.
    """
    lines: list[Mapping[str, object]] = [
        {"schema": SCHEMA, "night": night.night},
        *(night.runs[run] for run in sorted(night.runs)),
        *({"place": place, "is": night.places[place]} for place in sorted(night.places)),
        *sorted(night.rows, key=lambda row: (row["cell"], row["run"], row["on"])),
    ]
    _write(folder / f"{night.night}.jsonl", lines)


def write_cells(folder: Path, cells: Mapping[str, Fields]) -> None:
    """Write the file with the fields of the Cells. cells: the fields, by cell_id."""
    _write(folder / CELLS, [{"cell_id": cell_id, "cell": cells[cell_id]} for cell_id in sorted(cells)])


def append_decision(folder: Path, name: str, decision: Decision) -> None:
    """Append a decision to the file `name` in `folder`. Broken lines in the file stay as they are."""
    path = folder / name
    with locked(folder):
        try:
            before = path.read_text(encoding="utf-8") if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"cannot read: {error}", where=str(path), hint="restore it from git") from error
        _write(path, [decision.document()], before + ("\n" if before and not before.endswith("\n") else ""))


def _write(path: Path, lines: Iterable[Mapping[str, object]], before: str = "") -> None:
    """Write a file atomically: first the text `before`, then one JSON object per line."""
    text = "".join(f"{json.dumps(line, separators=(',', ':'), allow_nan=False)}\n" for line in lines)
    try:
        files.write_atomic(path, f"{before}{text}".encode())
    except StoreError as error:
        hint = "make room, or name another --dir; then add again"
        raise StoreError(error.what, where=error.where, hint=hint) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, and create it if it is missing. If the process dies, the kernel unlocks the folder.

    Raises UsageError if the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        what = f"cannot make the folder: {error.strerror}"
        raise UsageError(what, where=f"--dir {folder}", hint="name a folder that can be written") from error
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks; the results are stored anyway
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_night(word: str) -> bool:
    """Return whether a word is a date, YYYY-MM-DD."""
    try:
        return date.fromisoformat(word).isoformat() == word
    except ValueError:
        return False


def _names_night(path: Path, broken: dict[str, str]) -> bool:
    if path.name in (CELLS, RESETS, CONFIRMATIONS):
        return False
    if not is_night(path.stem):
        broken[path.name] = "not a file of a history: its name is not a date"
        return False
    return True


def _lines(path: Path, broken: dict[str, str], parse: Callable[[Any], _Line | None]) -> Iterator[_Line]:
    """Yield the parsed lines of a file. If lines are invalid or the file is unreadable, put the reasons into `broken`.

    parse: function that converts a line, and returns None for an invalid line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        broken[path.name] = f"cannot read: {error}"
        return
    try:  # json parses one document four times as fast as single lines
        found = json.loads(f"[{text.rstrip().replace(chr(10), ',')}]", parse_constant=_refuse)
    except ValueError:
        found = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                found += [json.loads(line, parse_constant=_refuse)] if line else []
            except ValueError:
                broken[f"{path.name}:{number}"] = _NOT_A_LINE
    for line in found:
        parsed = parse(line)
        if parsed is None:
            broken[path.name] = _NOT_A_LINE
        else:
            yield parsed


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _object(line: Any) -> dict[str, Any] | None:
    return line if isinstance(line, dict) and line else None


def _cell(line: Any) -> tuple[str, Fields] | None:
    cell_id, fields = (line.get("cell_id"), line.get("cell")) if isinstance(line, dict) else (None, None)
    return (cell_id, fields) if isinstance(cell_id, str) and isinstance(fields, dict) else None


def _decision(line: Any) -> Decision | None:
    """Return the decision in a line. If the line is incomplete or has a newer schema, return None."""
    try:
        return Decision.model_validate(line)
    except ValidationError:
        return None


def _is_row(line: Mapping[str, Any]) -> bool:
    values = line.get("values", {})
    words = (line["cell"], line.get("run"), line.get("on"))
    return all(isinstance(word, str) for word in words) and isinstance(values, dict) and _are_numbers(values.values())


def _are_numbers(values: Collection[Any]) -> bool:
    try:  # min and sum are fast: a Python loop takes a second for a quarter of a million rows
        return not values or bool(min(values) >= 0 and math.isfinite(sum(values)))
    except (TypeError, OverflowError):
        return False
