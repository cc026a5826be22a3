"""Verdicts: each has a kind, a reason, and the Records that it is based on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class VerdictKind(StrEnum):
    """Kind of a verdict. INCONCLUSIVE: the data do not decide. NOT_RUN: nothing was judged."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    NOT_RUN = "not-run"


@dataclass(frozen=True)
class Verdict:
    """Verdict, with its reason and the Records that it is based on."""

    word: VerdictKind
    """Kind of verdict."""
    reason: str
    """Reason, as a sentence."""
    records: tuple[str, ...] = ()
    """Ids of the Records that the verdict is based on."""


def joint(words: Iterable[VerdictKind]) -> VerdictKind:
    """Return the most serious of several verdicts; NOT_RUN if there are none."""
    seen = set(words)
    for word in (VerdictKind.FAIL, VerdictKind.NOT_RUN, VerdictKind.INCONCLUSIVE):
        if word in seen:
            return word
    return VerdictKind.PASS if seen else VerdictKind.NOT_RUN
