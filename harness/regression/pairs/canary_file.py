"""File with the canaries of this machine, one per line. A canary is a comparison of a revision with itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from harness.analysis.statistics.canaries import Canaries, canaries
from harness.errors import StoreError
from harness.records import store

FILE = Path("results") / "canaries.jsonl"
SCHEMA = 1
LAST = 200
"""Largest number of canaries that are used per place (machine and software). If a place has more, the newest are used."""


def refuse_unwritable(path: Path) -> None:
    """Raise StoreError if no canary can be added to a file. This is called early, because pairs run for minutes."""
    _append(path, "")


def add(path: Path, place: str, cell_id: str, log_ratios: Sequence[float]) -> None:
    """Add a canary to a file.

    place: environment id of the canary's Records; canaries with the same place are counted together. log_ratios: the
    log ratio of the times of each pair.
    """
    facts = {"schema": SCHEMA, "at": store.now(), "place": place, "cell_id": cell_id, "log_ratios": list(log_ratios)}
    _append(path, f"{json.dumps(facts)}\n")


def _append(path: Path, line: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:  # one write per line, so that two gates can append to one file
            file.write(line.encode())
    except OSError as error:
        what = f"the canary cannot be written: {error.strerror}"
        hint = "make it a file that can be written to, or run `gate` with --no-canary"
        raise StoreError(what, where=str(path), hint=hint) from error


def read(path: Path, place: str, trim: float) -> tuple[Canaries, list[str]]:
    """Return the number of canaries at a place, how many of them gave a false alarm, and a text per unreadable line.

    Only the newest canaries are used. trim: the fraction of the lowest and of the highest log ratios to drop.
    """
    found, broken = [], []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if (schema := row.get("schema", 1)) > SCHEMA:
                broken.append(f"{path}:{number}: written with schema {schema}, this version reads up to {SCHEMA}")
                continue
            ratios = [float(ratio) for ratio in row["log_ratios"]]
            if row["place"] == place and len(ratios) > 1:
                found.append(ratios)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            broken.append(f"{path}:{number}: {type(error).__name__}: {error}")
    return canaries(found[-LAST:], trim), broken
