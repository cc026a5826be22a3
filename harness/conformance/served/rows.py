"""Answers of a server with the reference's numbers for them, and metrics of several such rows. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.conformance.served.noise import Errors, rms
from harness.conformance.served.report import PhaseResult
from harness.conformance.served.session import RequestPhase, ServedAnswer

_LARGEST_EXPONENT = 700.0
"""Largest exponent that is passed to `math.exp`, which overflows above 709."""


@dataclass(frozen=True)
class ReferenceScore:
    """The log-probabilities that the reference computes for the tokens of one answer."""

    values: tuple[tuple[float, ...], ...]
    """Log-probabilities in nats, one tuple per position. The first is that of the answer's token; other tokens follow,
    as in `Position.values`."""
    best: tuple[int, ...]
    """Id of the most likely token at each position."""
    margins: tuple[float, ...]
    """For each position, how much more likely the most likely token is than the server's token: the difference of their
    log-probabilities, in nats."""


@dataclass(frozen=True)
class ScoredAnswer:
    """One answer, and the reference's numbers for its tokens."""

    observation: ServedAnswer
    score: ReferenceScore

    @property
    def differences(self) -> list[list[float]]:
        """Absolute differences between the server's log-probabilities and the reference's, in nats, one list per
        position. A difference is infinite where the server returned NaN.
        """
        return [
            [_distance(have, want) for have, want in zip(one.values, expected, strict=True)]
            for one, expected in zip(self.observation.positions, self.score.values, strict=True)
        ]

    @property
    def flat(self) -> list[float]:
        """The absolute differences of all positions in one list."""
        return [one for several in self.differences for one in several]

    def unlikely(self, limit: Errors) -> list[int]:
        """Return the positions where the server's token cannot be the most likely one.

        Each log-probability may be wrong by the largest allowed error. So the server's token counts as a tie if the
        most likely one exceeds it by at most twice this error.
        """
        margins = self.score.margins if self.observation.greedy else ()
        return [i for i, margin in enumerate(margins) if margin > 2 * limit.largest]

    def inaccurate(self, limit: Errors) -> list[int]:
        """Return the positions where a log-probability differs from the reference by more than `limit.largest`."""
        return [i for i, several in enumerate(self.differences) if max(several) > limit.largest]

    def is_wrong(self, limit: Errors) -> bool:
        """Return whether the errors of the answer exceed `limit`, the largest errors of a right server."""
        return bool(self.inaccurate(limit) or self.unlikely(limit)) or rms(self.flat) > limit.row_rms


def distances(have: Sequence[ReferenceScore], want: Sequence[ReferenceScore]) -> list[list[float]]:
    """Return the absolute differences between the log-probabilities in `have` and in `want`, one list per answer.

    have, want: scores of the same answers.
    """
    return [
        [abs(a - b) for x, y in zip(one.values, other.values, strict=True) for a, b in zip(x, y, strict=True)]
        for one, other in zip(have, want, strict=True)
    ]


def of_phase(rows: Iterable[ScoredAnswer], phase: RequestPhase) -> list[ScoredAnswer]:
    """Return the rows of one phase."""
    return [row for row in rows if row.observation.request.phase is phase]


def measure(phase: RequestPhase, rows: Sequence[ScoredAnswer], limit: Errors, failed: int) -> PhaseResult:
    """Return the metrics of the rows of one phase. failed: number of further requests that the server failed to answer."""
    flat = [one for row in rows for one in row.flat]
    own = [several[0] for row in rows for several in row.differences]
    margins = [
        margin
        for row in rows
        if row.observation.greedy
        for token, best, margin in zip(row.observation.tokens, row.score.best, row.score.margins, strict=True)
        if token != best
    ]
    differ = sum(len(row.unlikely(limit)) for row in rows)
    return PhaseResult(
        phase=phase,
        requests=len(rows) + failed,
        wrong=sum(row.is_wrong(limit) for row in rows) + failed,
        largest=max(flat, default=0.0),
        mean=sum(flat) / max(len(flat), 1),
        mean_exp=sum(math.exp(one) if one < _LARGEST_EXPONENT else math.inf for one in own) / max(len(own), 1),
        tokens=len(own),
        differ=differ,
        ties=len(margins) - differ,
        margin=max(margins, default=0.0),
    )


def _distance(have: float, want: float) -> float:
    return math.inf if math.isnan(have) else abs(have - want)
