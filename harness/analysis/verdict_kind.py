"""The words of a verdict, and a verdict: always with a reason and the Records that it rests on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class VerdictKind(StrEnum):
    """How a question was decided."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    NOT_RUN = "not-run"


@dataclass(frozen=True)
class Verdict:
    """One decided question. `reason` is a sentence; `records` are the ids of the Records that were read."""

    word: VerdictKind
    reason: str
    records: tuple[str, ...] = ()


def joint(words: Iterable[VerdictKind]) -> VerdictKind:
    """Decide "all of them": one failure refutes it, whatever else is still open."""
    seen = set(words)
    for word in (VerdictKind.FAIL, VerdictKind.NOT_RUN, VerdictKind.INCONCLUSIVE):
        if word in seen:
            return word
    return VerdictKind.PASS if seen else VerdictKind.NOT_RUN
