"""Selection of claims, and the exit code for their verdicts. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TypeVar

from harness.claims import claim_file
from harness.claims.claim import Claim
from harness.claims.judge import ClaimVerdict, JudgedClaim
from harness.errors import Exit, Problem, UsageError, usage_error

_NAMED = 3
"""Maximum number of similar ids that a hint suggests."""
_Claim = TypeVar("_Claim", Claim, JudgedClaim)


def chosen(
    claims: Sequence[_Claim], tiers: Sequence[str], ids: Sequence[str], *, headlines: bool = False
) -> list[_Claim]:
    """Return the claims whose tier is in `tiers` and whose id begins with one of `ids`.

    An empty sequence allows every tier or every id. headlines: return only claims that support a main claim of their
    paper (`Claim.headline`). Raises UsageError if no claim has a given id prefix, or if `headlines` leaves no claim.
    """
    known = [claim.id for claim in claims]
    wrong = [start for start in ids if not any(name.startswith(start) for name in known)]
    if wrong:
        raise usage_error(
            [Problem("--id", f"no claim id begins with `{start}`", _hint(start, known)) for start in wrong]
        )
    selected = [c for c in claims if (not tiers or c.tier in tiers) and (not ids or c.id.startswith(tuple(ids)))]
    if not headlines:
        return selected
    if not (parts := [c for c in selected if c.headline]):
        hint = "use fewer of --tier and --id; in your own claims write `headline: NAME`"
        raise UsageError("none of these claims belongs to a headline", where="--headlines", hint=hint)
    return parts


def _hint(start: str, known: Sequence[str]) -> str:
    """Return a hint for an id prefix that matches none of the known ids.

    The hint names the papers whose claims have this prefix. If there are no such papers, it names the most similar ids.
    """
    every = claim_file.load(claim_file.paths(claim_file.names()))
    if papers := sorted({claim.paper for claim in every if claim.id.startswith(start)} if start else ()):
        return f"claims of {' and '.join(papers)} match: `peft-harness claims {' '.join(papers)} --id {start}`"
    close = get_close_matches(start, known, n=_NAMED)
    few = f"did you mean {' or '.join(f'`{name}`' for name in close)}? " if close else ""
    return f"{few}`peft-harness list claims` shows all ids, e.g. `{every[0].id}`"


def exit_of(rows: Sequence[JudgedClaim], *, strict: bool) -> Exit:
    """Return the exit code for judged claims: the first in this list whose condition holds.

    - FAIL: a claim is not reproduced.
    - INFRASTRUCTURE: the computation of a claim failed.
    - NOTHING_COMPARED: no claim was computed.
    - INCONCLUSIVE: a claim is undecided, or was not computed. This code is returned only if `strict` is set.
    - PASS: otherwise.
    """
    verdicts = {row.verdict for row in rows}
    if ClaimVerdict.NOT_REPRODUCED in verdicts:
        return Exit.FAIL
    if any(row.failed for row in rows):
        return Exit.INFRASTRUCTURE
    if verdicts <= {ClaimVerdict.NOT_RUN}:
        return Exit.NOTHING_COMPARED
    return Exit.INCONCLUSIVE if strict and verdicts & {ClaimVerdict.INCONCLUSIVE, ClaimVerdict.NOT_RUN} else Exit.PASS
