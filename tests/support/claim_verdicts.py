"""Judge claims that need no large model in this process, without a worker."""

from __future__ import annotations

from harness.claims import claim_file
from harness.claims.consistency import with_table_conventions
from harness.claims.judge import JudgedClaim, judge, plain
from harness.claims.worker import find


def verdicts(paper: str, starts: tuple[str, ...]) -> dict[str, JudgedClaim]:
    """Return the judged claims with an id that begins with one of `starts`, by id."""
    judged = []
    for claim in claim_file.load(claim_file.paths([paper])):
        if claim.id.startswith(starts):
            requests = [claim.request, *(other.request for other in claim.otherwise)]
            answers = [find(plain(one)) for one in requests]
            judged.append((claim, answers, judge(claim, answers)))
    return {row.id: row for row in with_table_conventions(judged)}
