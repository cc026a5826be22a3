"""The verdict on a claim, from what its measure found. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from typing import Any

from harness.claims.claim import Asking, Claim, Tier
from harness.claims.measure import MeasureResult
from harness.claims.printed_number import agrees, shown, undecided
from harness.records.base_model import FrozenModel


class ClaimVerdict(StrEnum):
    """What became of a claim."""

    REPRODUCED = "reproduced"
    UNDER = "reproduced-under"
    NOT_REPRODUCED = "not-reproduced"
    INCONCLUSIVE = "inconclusive"
    NOT_RUN = "not-run"


MEANING = {
    ClaimVerdict.REPRODUCED: "comes out as the paper prints it, computed as the paper says: ours rounds to the figure, or the "
    "claim has a looser rule, which stands beside ours (`explain rounding`)",
    ClaimVerdict.UNDER: "comes out under another convention, rank or unit than the paper states; which one is said",
    ClaimVerdict.NOT_REPRODUCED: "does not come out under any reading that was tried; what does is shown with its arithmetic",
    ClaimVerdict.INCONCLUSIVE: "cannot be decided: the paper leaves something out, or what was measured is too uncertain",
    ClaimVerdict.NOT_RUN: "was not computed here, and what it needs is said",
}


STAND_IN = "by a stand-in: "


@dataclass(frozen=True)
class Missing:
    """Why a measure found nothing. failed: whether it should have."""

    why: str
    failed: bool = False


class MeasureOutcome(FrozenModel):
    """One reading of a claim. under: in words, empty for the paper's own; value: None where nothing was found."""

    under: str
    measure: str
    arguments: dict[str, Any]
    value: float | bool | None = None
    ours: str = ""
    how: str = ""
    missing: str = ""


class JudgedClaim(FrozenModel):
    """A claim and its verdict. under: of `reproduced-under`, the convention; ours, how: of the reading that decides."""

    id: str
    paper: str
    version: str
    source: str
    sentence: str
    tier: Tier
    headline: str
    printed: str
    verdict: ClaimVerdict
    under: str
    ours: str
    how: str
    why: str
    note: str
    rule: str | None = None
    """By what other rule than rounding ours comes out as what is printed, in words. None where a ledger does not say it."""
    scale: str = ""
    """Of something smaller than the paper's own (a rehearsal, a small model): what it is."""
    tried: list[MeasureOutcome]
    failed: bool = False
    """Whether it should have been computed and was not."""

    @property
    def stood_in(self) -> bool:
        """Whether it came out by something smaller than the paper's own."""
        return bool(self.scale) and self.verdict in (ClaimVerdict.REPRODUCED, ClaimVerdict.UNDER)

    @property
    def got(self) -> str:
        """What was found, and the rule if it is not plain rounding, as part of a sentence; empty where nothing was."""
        is_property = any(isinstance(one.value, bool) for one in self.tried)
        rule = f" (rule: {self.rule})" if self.rule else ""
        return f"{'ours' if is_property else 'we get'} {self.ours}{rule}" if self.ours else ""


def judge(claim: Claim, answers: Sequence[MeasureResult | Missing]) -> JudgedClaim:
    """Judge a claim by what was found for its own reading and then for each of `otherwise`."""
    answers = [_placed(claim, one) for one in answers]
    readings = [("", claim.asking), *((one.under, one.asking) for one in claim.otherwise)]
    tried = [_tried(claim, under, asking, found) for (under, asking), found in zip(readings, answers, strict=True)]
    for one, found in zip(tried, answers, strict=True):
        if isinstance(found, Missing) or (words := _comes_out(claim, found)) is None:
            continue
        under = "; ".join(filter(None, [one.under, words]))
        why = f"{STAND_IN}{claim.scale}" if claim.scale else ""
        return _judged(
            claim, ClaimVerdict.UNDER if under else ClaimVerdict.REPRODUCED, tried, one, under=under, why=why
        )
    own, found = tried[0], answers[0]
    if isinstance(found, Missing):
        return _judged(claim, ClaimVerdict.NOT_RUN, tried, own, why=found.why, failed=found.failed)
    missing = [(one, other) for one, other in zip(tried, answers, strict=True) if isinstance(other, Missing)]
    if missing:  # one that was not computed might have come out
        why = "; ".join(f"not computed under {one.under}: {other.why}" for one, other in missing)
        failed = any(other.failed for _, other in missing)
        return _judged(claim, ClaimVerdict.INCONCLUSIVE, tried, own, why=why, failed=failed)
    if claim.scale:
        shows = "nothing is certain" if _open(claim, found) else "it comes out otherwise"
        why = f"{shows} by a stand-in ({claim.scale}), which refutes no paper"
        return _judged(claim, ClaimVerdict.INCONCLUSIVE, tried, own, why=why)
    if _open(claim, found):
        why = "some of the values that it can have come out, and some do not"
        return _judged(claim, ClaimVerdict.INCONCLUSIVE, tried, own, why=claim.needs or why)
    for one, answer in zip(tried, answers, strict=True):
        if isinstance(answer, MeasureResult) and (allowed := _allowed(claim, answer)):
            why = f"the printed figures that it is computed from are rounded; they allow {allowed}"
            return _judged(claim, ClaimVerdict.INCONCLUSIVE, tried, one, why="; ".join(filter(None, [one.under, why])))
    if claim.needs and found.most is None:
        return _judged(claim, ClaimVerdict.INCONCLUSIVE, tried, own, why=f"the paper leaves out {claim.needs}")
    return _judged(claim, ClaimVerdict.NOT_REPRODUCED, tried, own)


def _placed(claim: Claim, answer: MeasureResult | Missing) -> MeasureResult | Missing:
    """Say of what should have been found where the claim is written, for whoever has to mend it."""
    if isinstance(answer, MeasureResult) or not answer.failed:
        return answer
    return replace(answer, why=f"{claim.where}: {answer.why}")


def _comes_out(claim: Claim, found: MeasureResult) -> str | None:
    if claim.figure is None:
        return "" if found.value else None
    most = None if found.most is None else Fraction(found.most)
    return agrees(claim.figure, Fraction(found.value), claim.rounding, most)


def _open(claim: Claim, found: MeasureResult) -> bool:
    """Say whether a range decides nothing; of a property, it may hold and may not where `most` is true."""
    if claim.figure is None or found.most is None:
        return bool(found.most)
    return undecided(claim.figure, Fraction(found.value), claim.rounding, Fraction(found.most))


def _allowed(claim: Claim, found: MeasureResult) -> str:
    """Say from what to what printed figures allow a value to be, where some of that comes out; "" where none of it does."""
    if claim.figure is None or found.within is None:
        return ""
    least, most = Fraction(found.within[0]), Fraction(found.within[1])
    if not undecided(claim.figure, least, claim.rounding, most):
        return ""
    return " to ".join(shown(end, claim.dimension, claim.figure.unit) for end in (least, most))


def _tried(claim: Claim, under: str, asking: Asking, found: MeasureResult | Missing) -> MeasureOutcome:
    arguments = plain(asking)["with"]
    if isinstance(found, Missing):
        return MeasureOutcome(under=under, measure=asking.measure, arguments=arguments, missing=found.why)
    unit = claim.figure.unit if claim.figure else ""
    if claim.figure is None:
        ours = "holds" if found.value else "undecided" if found.most else "does not hold"
    else:
        ours = shown(Fraction(found.value), claim.dimension, unit)
        if found.most is not None:
            ours += f" to {shown(Fraction(found.most), claim.dimension, unit)}"
    value = found.value if isinstance(found.value, bool) else float(found.value)
    return MeasureOutcome(
        under=under, measure=asking.measure, arguments=arguments, value=value, ours=ours, how=found.how
    )


def plain(asked: Any) -> Any:
    """Return an asking and all that is in it as JSON can hold it."""
    if isinstance(asked, Asking):
        return {"measure": asked.measure, "with": {key: plain(value) for key, value in asked.arguments.items()}}
    if isinstance(asked, Fraction):
        short = int(asked) if asked.denominator == 1 else float(asked)
        return short if Fraction(str(short)) == asked else str(asked)  # 2/3 is no decimal
    return [plain(one) for one in asked] if isinstance(asked, list) else asked


def _judged(
    claim: Claim,
    verdict: ClaimVerdict,
    tried: list[MeasureOutcome],
    by: MeasureOutcome,
    under: str = "",
    why: str = "",
    failed: bool = False,
) -> JudgedClaim:
    return JudgedClaim(
        id=claim.id,
        paper=claim.paper,
        version=claim.version,
        source=claim.source,
        sentence=claim.sentence,
        tier=claim.tier,
        headline=claim.headline,
        printed=claim.printed,
        verdict=verdict,
        under=under,
        ours=by.ours,
        how=by.how,
        why=why,
        note=claim.note,
        rule=claim.rule,
        scale=claim.scale,
        tried=tried,
        failed=failed,
    )
