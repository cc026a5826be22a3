"""Files of a history: one small, sorted file per night, written atomically, to be committed to git.

results/history/<night>.jsonl        the night, its runs and places; then one row per attempt at a Cell
                cells.jsonl          the Cells by their ids, which rows refer to
                resets.jsonl         accepted levels; see `decisions`
                confirmations.jsonl  verdicts on changes; see `decisions`

Lines are TypedDicts: a history has up to a quarter of a million rows, and a row is used as it was read.
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
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeGuard, TypeVar, cast

from harness.errors import StoreError, UsageError, plural
from harness.records import files

SCHEMA = 1
PASSES = 3
"""Passes of a full night: the median of three ignores one disturbed pass."""
CELLS, RESETS, CONFIRMATIONS = "cells.jsonl", "resets.jsonl", "confirmations.jsonl"

Fields = dict[str, Any]
"""The fields of a Cell as JSON, of this or another version of the harness."""
_NOT_A_LINE = "a torn or foreign line"
_T = TypeVar("_T")


class AttemptRow(TypedDict):
    """One attempt at a Cell."""

    cell: str
    run: str
    attempt: int
    on: str
    """Id of the place."""
    values: NotRequired[dict[str, float]]
    """By metric, if the attempt ended ok."""
    status: NotRequired[str]
    """Otherwise its status."""


class RunHeader(TypedDict):
    """Facts shared by all rows of a run, to find differences from the night before."""

    run: str
    started: NotRequired[str]
    suite: NotRequired[str]
    code_version: NotRequired[str]
    git_sha: NotRequired[str]
    git_dirty: NotRequired[bool | None]
    software: NotRequired[dict[str, str]]


class Evidence(TypedDict):
    """The change that a verdict is about, as `detect` saw it."""

    old_night: str
    place: str
    before: float
    after: float


class Decision(TypedDict):
    """A line of resets.jsonl or confirmations.jsonl."""

    schema: int
    cell: str
    metric: str
    night: str
    reason: str
    author: str
    made: NotRequired[str]
    verdict: NotRequired[str]
    """Only of confirmations: `regressed`, `improved` or `refuted`."""
    revisions: NotRequired[list[str]]
    """The two revisions that were compared."""
    seen: NotRequired[Evidence]


@dataclass
class Night:
    """One night."""

    night: str
    """Its date, YYYY-MM-DD."""
    runs: dict[str, RunHeader] = field(default_factory=dict)
    """By run id."""
    places: dict[str, dict[str, str]] = field(default_factory=dict)
    """By the id of the place."""
    rows: list[AttemptRow] = field(default_factory=list)


@dataclass(frozen=True)
class History:
    """A history as read from disk."""

    folder: Path
    nights: tuple[Night, ...]
    """Oldest first."""
    cells: dict[str, Fields]
    """By cell_id."""
    resets: tuple[Decision, ...]
    confirmations: tuple[Decision, ...]
    broken: dict[str, str]
    """Reasons by file or file:line that could not be used; the rest of the history is used."""


def read(folder: Path) -> History:
    """Read a history; unreadable parts are named in `broken`. Raises UsageError if the folder does not exist."""
    if not folder.is_dir():
        raise UsageError(
            "no history in this folder", where=str(folder), hint="`peft-harness history add RUN` starts one"
        )
    broken: dict[str, str] = {}
    nights = [read_night(path, broken) for path in sorted(folder.glob("*.jsonl")) if _names_night(path, broken)]
    found = cells(folder, broken)
    resets = tuple(_lines(folder / RESETS, broken, _is_decision))
    confirmations = tuple(_lines(folder / CONFIRMATIONS, broken, _is_decision))
    return History(folder, tuple(night for night in nights if night is not None), found, resets, confirmations, broken)


def read_night(path: Path, broken: dict[str, str]) -> Night | None:
    """Read one night; return None, with the reason in `broken`, for a file that is not a night of this schema."""
    lines = _lines(path, broken, _is_line)
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
    before, night.rows = len(night.rows), _without_duplicates(night.rows)
    bad += before - len(night.rows)
    if bad:
        reason = f"{plural(bad, 'line')} not written by `history add`"
        broken[path.name] = "; ".join(filter(None, [broken.get(path.name, ""), reason]))
    return night


def _without_duplicates(rows: list[AttemptRow]) -> list[AttemptRow]:
    """Return one row per attempt; a merge of two branches may have left two."""
    known = {(row["cell"], row["run"]): row for row in rows}
    return rows if len(known) == len(rows) else list(known.values())


def cells(folder: Path, broken: dict[str, str]) -> dict[str, Fields]:
    """Read the fields of the Cells, by cell_id."""
    return {line["cell_id"]: line["cell"] for line in _lines(folder / CELLS, broken, _is_cell)}


def write_night(folder: Path, night: Night) -> None:
    """Write a night: headers first, then rows sorted by Cell and run, so that a diff shows the new rows."""
    rows = sorted(night.rows, key=lambda row: (row["cell"], row["run"], row["on"]))
    lines: list[Mapping[str, object]] = [
        {"schema": SCHEMA, "night": night.night},
        *(night.runs[run] for run in sorted(night.runs)),
        *({"place": place, "is": night.places[place]} for place in sorted(night.places)),
        *rows,
    ]
    write_lines(folder / f"{night.night}.jsonl", lines)


def write_cells(folder: Path, cells: Mapping[str, Fields]) -> None:
    """Write the fields of the Cells, by cell_id."""
    write_lines(folder / CELLS, [{"cell_id": cell_id, "cell": cells[cell_id]} for cell_id in sorted(cells)])


def write_lines(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON object per line, atomically."""
    _write(path, "".join(_text(line) for line in lines))


def append_line(path: Path, before: str, line: Mapping[str, object]) -> None:
    """Rewrite a file with one more line. before: its present text, which stays as it is, broken lines included."""
    _write(path, before + ("\n" if before and not before.endswith("\n") else "") + _text(line))


def _text(line: Mapping[str, object]) -> str:
    return json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    try:
        files.write_atomic(path, text.encode())
    except StoreError as error:
        raise StoreError(
            error.what, where=error.where, hint="make room, or name another --dir; then add again"
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and lock it; the kernel unlocks it if the process dies. Raises UsageError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        what = f"cannot make the folder: {error.strerror}"
        raise UsageError(what, where=f"--dir {folder}", hint="name a folder that can be written") from error
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks; store the results anyway
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


def _lines(path: Path, broken: dict[str, str], fits: Callable[[Any], TypeGuard[_T]]) -> Iterator[_T]:
    """Yield the lines of a file that fit; name the others, or a file that cannot be read, in `broken`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        broken[path.name] = f"cannot read: {error}"
        return
    try:  # one document is parsed four times as fast as single lines
        found = json.loads(f"[{text.rstrip().replace(chr(10), ',')}]", parse_constant=_refuse)
    except ValueError:
        found = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                found += [json.loads(line, parse_constant=_refuse)] if line else []
            except ValueError:
                broken[f"{path.name}:{number}"] = _NOT_A_LINE
    for line in found:
        if fits(line):
            yield line
        else:
            broken[path.name] = _NOT_A_LINE


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _is_line(line: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(line, dict) and bool(line)


def _is_row(line: Mapping[str, Any]) -> bool:
    values = line.get("values", {})
    return (
        isinstance(line.get("run"), str)
        and isinstance(line.get("on"), str)
        and isinstance(line["cell"], str)
        and isinstance(values, dict)
        and (not values or _are_numbers(values.values()))
    )


def _are_numbers(values: Collection[Any]) -> bool:
    try:  # a Python loop takes a second for a quarter of a million rows
        return bool(min(values) >= 0 and math.isfinite(sum(values)))
    except (TypeError, OverflowError):
        return False


def _is_cell(line: Any) -> TypeGuard[dict[str, Any]]:
    return _is_line(line) and isinstance(line.get("cell_id"), str) and isinstance(line.get("cell"), dict)


def _is_decision(line: Any) -> TypeGuard[Decision]:
    """Accept a complete decision of this schema; one of a newer schema has no effect."""
    if not _is_line(line):
        return False
    words = ("cell", "metric", "night", "reason", "author")
    whole = line.get("schema") == SCHEMA and all(isinstance(line.get(word), str) and line[word] for word in words)
    revisions, seen = line.get("revisions", []), line.get("seen")
    return (
        whole
        and isinstance(revisions, list)
        and all(isinstance(one, str) for one in revisions)
        and (seen is None or _is_seen(seen))
    )


def _is_seen(seen: Any) -> bool:
    return (
        isinstance(seen, dict)
        and all(isinstance(seen.get(word), str) for word in ("old_night", "place"))
        and all(isinstance(seen.get(word), (int, float)) for word in ("before", "after"))
    )
