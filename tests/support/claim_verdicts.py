"""Judge claims that need no large model in this process, without a worker."""

from __future__ import annotations

from harness.claims import claim_file
from harness.claims.judge import JudgedClaim, judge, plain
from harness.claims.worker import find


def verdicts(paper: str, starts: tuple[str, ...]) -> dict[str, JudgedClaim]:
    """Return the judged claims with an id that begins with one of `starts`, by id."""
    found = {}
    for claim in claim_file.load(claim_file.paths([paper])):
        if claim.id.startswith(starts):
            requests = [claim.request, *(other.request for other in claim.otherwise)]
            found[claim.id] = judge(claim, [find(plain(one)) for one in requests])
    return found
