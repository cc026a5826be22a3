"""Which claims are asked for, and the exit code of what became of them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from harness.claims.claim import Claim
from harness.claims.judging import Judged, Verdict
from harness.errors import Exit, UsageError
from harness.spelling import near

_Claim = TypeVar("_Claim", Claim, Judged)


def chosen(
    claims: Sequence[_Claim], tiers: Sequence[str], ids: Sequence[str], *, headlines: bool = False
) -> list[_Claim]:
    """Return the claims of these tiers whose ids begin so. Raises UsageError where none does.

    headlines: only those that are part of a headline; raises UsageError where none is.
    """
    for start in ids:
        if not any(claim.id.startswith(start) for claim in claims):
            mend = near(start, [claim.id for claim in claims], "`peft-harness list claims` shows all; ids here")
            raise UsageError(f"no claim's id begins with `{start}`", where="--id", mend=mend)
    several = [c for c in claims if (not tiers or c.tier in tiers) and (not ids or c.id.startswith(tuple(ids)))]
    if not headlines:
        return several
    if not (parts := [c for c in several if c.headline]):
        mend = "ask for fewer of --tier and --id, or in claims of your own write `headline: its name`"
        raise UsageError("none of these claims is part of a headline", where="--headlines", mend=mend)
    return parts


def exit_of(rows: Sequence[Judged], *, strict: bool) -> Exit:
    """Return the exit code: a claim that does not come out is a finding and comes first."""
    verdicts = {row.verdict for row in rows}
    if Verdict.NOT_REPRODUCED in verdicts:
        return Exit.FAIL
    if any(row.failed for row in rows):
        return Exit.INFRASTRUCTURE
    if verdicts <= {Verdict.NOT_RUN}:
        return Exit.NOTHING_COMPARED
    return Exit.INCONCLUSIVE if strict and verdicts & {Verdict.INCONCLUSIVE, Verdict.NOT_RUN} else Exit.PASS
