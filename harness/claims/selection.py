"""Which claims are asked for, and the exit code of what became of them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TypeVar

from harness.claims import claim_file
from harness.claims.claim import Claim
from harness.claims.judge import ClaimVerdict, JudgedClaim
from harness.errors import Exit, Problem, UsageError, usage_error

_NAMED = 3
"""Ids in a message."""
_Claim = TypeVar("_Claim", Claim, JudgedClaim)


def chosen(
    claims: Sequence[_Claim], tiers: Sequence[str], ids: Sequence[str], *, headlines: bool = False
) -> list[_Claim]:
    """Return the claims of these tiers whose ids begin so. Raises UsageError where none does.

    headlines: only those that are part of a headline; raises UsageError where none is.
    """
    known = [claim.id for claim in claims]
    wrong = [start for start in ids if not any(name.startswith(start) for name in known)]
    if wrong:
        raise usage_error(
            [Problem("--id", f"no claim's id here begins with `{start}`", _hint(start, known)) for start in wrong]
        )
    several = [c for c in claims if (not tiers or c.tier in tiers) and (not ids or c.id.startswith(tuple(ids)))]
    if not headlines:
        return several
    if not (parts := [c for c in several if c.headline]):
        hint = "ask for fewer of --tier and --id, or in claims of your own write `headline: its name`"
        raise UsageError("none of these claims is part of a headline", where="--headlines", hint=hint)
    return parts


def _hint(start: str, known: Sequence[str]) -> str:
    """Say of which paper ids begin so, else which are nearest: there are hundreds."""
    every = claim_file.load(claim_file.paths(claim_file.names()))
    if papers := sorted({claim.paper for claim in every if claim.id.startswith(start)} if start else ()):
        return f"ids of {' and '.join(papers)} begin so: `peft-harness claims {' '.join(papers)} --id {start}`"
    close = get_close_matches(start, known, n=_NAMED)
    few = f"did you mean {' or '.join(f'`{name}`' for name in close)}? " if close else ""
    return f"{few}`peft-harness list claims` shows those of all papers, e.g. `{every[0].id}`"


def exit_of(rows: Sequence[JudgedClaim], *, strict: bool) -> Exit:
    """Return the exit code: a claim that does not come out is a finding and comes first."""
    verdicts = {row.verdict for row in rows}
    if ClaimVerdict.NOT_REPRODUCED in verdicts:
        return Exit.FAIL
    if any(row.failed for row in rows):
        return Exit.INFRASTRUCTURE
    if verdicts <= {ClaimVerdict.NOT_RUN}:
        return Exit.NOTHING_COMPARED
    return Exit.INCONCLUSIVE if strict and verdicts & {ClaimVerdict.INCONCLUSIVE, ClaimVerdict.NOT_RUN} else Exit.PASS
