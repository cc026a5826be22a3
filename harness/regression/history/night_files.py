"""How a history is kept: a file per night, small, sorted, written whole or not at all; meant to be committed.

results/history/<night>.jsonl        the night, its runs, the places they ran in; then a row per attempt at a Cell
                cells.jsonl          the Cells by their ids, so that a row needs not repeat them
                resets.jsonl         levels that somebody accepted; see `decisions`
                confirmations.jsonl  what became of candidates
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
from typing import Any

from harness.errors import StoreError, UsageError
from harness.records import files

SCHEMA = 1
PASSES = 3
"""Passes of a full night: the median of three takes no notice of one that was disturbed."""
CELLS, RESETS, CONFIRMATIONS = "cells.jsonl", "resets.jsonl", "confirmations.jsonl"

Line = dict[str, Any]
_NOT_A_LINE = "a torn or foreign line"


@dataclass
class Night:
    """One night. runs: headers by run id. places: by id. rows: attempts, `{cell, run, attempt, on, values | status}`."""

    night: str
    runs: dict[str, Line] = field(default_factory=dict)
    places: dict[str, dict[str, str]] = field(default_factory=dict)
    rows: list[Line] = field(default_factory=list)


@dataclass(frozen=True)
class History:
    """A history as it stands on disk. nights: oldest first. broken: file, or file:line, to the reason; the rest is used."""

    folder: Path
    nights: tuple[Night, ...]
    cells: dict[str, Line]
    resets: tuple[Line, ...]
    confirmations: tuple[Line, ...]
    broken: dict[str, str]


def read(folder: Path) -> History:
    """Read a history. Raises UsageError where there is none; what cannot be read is named in `broken`."""
    if not folder.is_dir():
        raise UsageError("no history here", where=str(folder), hint="`peft-harness history add RUN` begins one")
    broken: dict[str, str] = {}
    nights = [read_night(path, broken) for path in sorted(folder.glob("*.jsonl")) if _names_night(path, broken)]
    found = cells(folder, broken)
    resets = tuple(_lines(folder / RESETS, broken, _is_decision))
    confirmations = tuple(_lines(folder / CONFIRMATIONS, broken, _is_decision))
    return History(folder, tuple(night for night in nights if night is not None), found, resets, confirmations, broken)


def read_night(path: Path, broken: dict[str, str]) -> Night | None:
    """Read one night; None, with the reason in `broken`, for a file that is no night of this schema."""
    lines = _lines(path, broken, bool)
    head = next(lines, None)
    if head is None or head.get("night") != path.stem:
        broken.setdefault(path.name, "not a night: its first line does not name the night that its name does")
        return None
    if head.get("schema") != SCHEMA:
        broken[path.name] = f"written with schema {head.get('schema')}, this version reads {SCHEMA}"
        return None
    night, bad = Night(path.stem), 0
    for line in lines:
        if "cell" in line:
            if _is_row(line) and line["run"] in night.runs and line["on"] in night.places:
                night.rows.append(line)
            else:
                bad += 1
        elif isinstance(line.get("run"), str):
            night.runs[line["run"]] = line
        elif isinstance(line.get("place"), str) and isinstance(line.get("is"), dict):
            night.places[line["place"]] = line["is"]
        else:
            bad += 1
    night.rows, twice = _once(night.rows), len(night.rows)
    bad += twice - len(night.rows)
    if bad:
        told = f"{bad} line{'s' * (bad != 1)} that no `history add` wrote"
        broken[path.name] = "; ".join(filter(None, [broken.get(path.name, ""), told]))
    return night


def _once(rows: list[Line]) -> list[Line]:
    """Return the rows without a second one of the same attempt: merging two branches may have left both."""
    known = {(row["cell"], row["run"]): row for row in rows}
    return rows if len(known) == len(rows) else list(known.values())


def cells(folder: Path, broken: dict[str, str]) -> dict[str, Line]:
    """Read the Cells, by their ids."""
    return {line["cell_id"]: line["cell"] for line in _lines(folder / CELLS, broken, _is_cell)}


def write_night(folder: Path, night: Night) -> None:
    """Write a night: headers first, then rows sorted by Cell and run, so that a diff shows what was added."""
    rows = sorted(night.rows, key=lambda row: (row["cell"], row["run"], row["on"]))
    lines: list[Mapping[str, Any]] = [
        {"schema": SCHEMA, "night": night.night},
        *(night.runs[run] for run in sorted(night.runs)),
        *({"place": place, "is": night.places[place]} for place in sorted(night.places)),
        *rows,
    ]
    write_lines(folder / f"{night.night}.jsonl", lines)


def write_cells(folder: Path, cells: Mapping[str, Line]) -> None:
    """Write the Cells, by their ids."""
    write_lines(folder / CELLS, [{"cell_id": cell_id, "cell": cells[cell_id]} for cell_id in sorted(cells)])


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON object per line, the whole file or nothing."""
    _write(path, "".join(_text(line) for line in lines))


def append_line(path: Path, before: str, line: Mapping[str, Any]) -> None:
    """Write a file of lines anew with one more; `before`: what it holds, which stays as it is."""
    _write(path, before + ("\n" if before and not before.endswith("\n") else "") + _text(line))


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    try:
        files.write_atomic(path, text.encode())
    except StoreError as error:
        raise StoreError(
            error.what, where=error.where, hint="make room, or name another --dir; then add again"
        ) from error


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and be the only one who changes it meanwhile; the kernel lets go when its holder dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        what = f"cannot make the folder: {error.strerror}"
        raise UsageError(what, where=f"--dir {folder}", hint="name a folder that can be written") from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks is no reason to keep nothing
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_night(word: str) -> bool:
    """Say whether a word is a date, YYYY-MM-DD."""
    try:
        return date.fromisoformat(word).isoformat() == word
    except ValueError:
        return False


def _names_night(path: Path, broken: dict[str, str]) -> bool:
    if path.name in (CELLS, RESETS, CONFIRMATIONS):
        return False
    if not is_night(path.stem):
        broken[path.name] = "a stranger: no night has this name"
        return False
    return True


def _lines(path: Path, broken: dict[str, str], fits: Callable[[Line], bool]) -> Iterator[Line]:
    """Yield the lines of a file that fit; the others, and a file that cannot be read, are named in `broken`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        broken[path.name] = f"cannot read: {error}"
        return
    try:  # as one document, four times as fast as line by line
        found = json.loads(f"[{text.rstrip().replace(chr(10), ',')}]", parse_constant=_refuse)
    except ValueError:
        found = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                found += [json.loads(line, parse_constant=_refuse)] if line else []
            except ValueError:
                broken[f"{path.name}:{number}"] = _NOT_A_LINE
    for line in found:
        if isinstance(line, dict) and fits(line):
            yield line
        else:
            broken[path.name] = _NOT_A_LINE


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _is_row(line: Line) -> bool:
    values = line.get("values", {})
    return (
        isinstance(line.get("run"), str)
        and isinstance(line.get("on"), str)
        and isinstance(line["cell"], str)
        and isinstance(values, dict)
        and (not values or _are_numbers(values.values()))
    )


def _are_numbers(values: Collection[Any]) -> bool:
    try:  # a loop in Python would take a second for a quarter of a million rows
        return bool(min(values) >= 0 and math.isfinite(sum(values)))
    except (TypeError, OverflowError):
        return False


def _is_cell(line: Line) -> bool:
    return isinstance(line.get("cell_id"), str) and isinstance(line.get("cell"), dict)


def _is_decision(line: Line) -> bool:
    """A decision with all that it needs; one of a newer schema is not understood, and so not obeyed."""
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
    """Say whether this is what made one try a change: a night and a place, and two numbers."""
    return (
        isinstance(seen, dict)
        and all(isinstance(seen.get(word), str) for word in ("old_night", "place"))
        and all(isinstance(seen.get(word), (int, float)) for word in ("before", "after"))
    )
