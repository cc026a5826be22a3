"""Verdicts: a kind, a reason, and the Records behind it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class VerdictKind(StrEnum):
    """Kinds of verdicts on a question."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    NOT_RUN = "not-run"


@dataclass(frozen=True)
class Verdict:
    """Verdict on one question."""

    word: VerdictKind
    """Kind of verdict."""
    reason: str
    """Reason, as a sentence."""
    records: tuple[str, ...] = ()
    """Ids of the Records behind it."""


def joint(words: Iterable[VerdictKind]) -> VerdictKind:
    """Return the joint verdict of several: the most serious one; NOT_RUN without any."""
    seen = set(words)
    for word in (VerdictKind.FAIL, VerdictKind.NOT_RUN, VerdictKind.INCONCLUSIVE):
        if word in seen:
            return word
    return VerdictKind.PASS if seen else VerdictKind.NOT_RUN
