"""Judge a claim by the results of its measures. Imports no torch.

A reading is a way to understand a claim, e.g. with the rank that the paper states or with another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from typing import Any

from harness.claims.claim import Claim, MeasureRequest, Tier
from harness.claims.measure import MeasureResult
from harness.claims.printed_number import agrees, shown, undecided
from harness.records.base_model import FrozenModel


class ClaimVerdict(StrEnum):
    """Verdict on a claim. `MEANING` explains each verdict."""

    REPRODUCED = "reproduced"
    UNDER = "reproduced-under"
    MIXED = "reproduced-mixed"
    NOT_REPRODUCED = "not-reproduced"
    INCONCLUSIVE = "inconclusive"
    NOT_RUN = "not-run"


MEANING = {
    ClaimVerdict.REPRODUCED: "our result rounds to the printed figure, computed as the paper describes; if the claim has a "
    "looser rule (`explain rounding`), it is shown next to our result",
    ClaimVerdict.UNDER: "reproduced under another reading, rounding or unit than the paper states, which is shown",
    ClaimVerdict.MIXED: "reproduced, but not under its table's convention (rounding, unit, reading); the row names a "
    "figure that conflicts",
    ClaimVerdict.NOT_REPRODUCED: "not reproduced under any tried reading; our results are shown with their arithmetic",
    ClaimVerdict.INCONCLUSIVE: "cannot be decided: the paper omits information, or the measurement is too uncertain",
    ClaimVerdict.NOT_RUN: "not computed here; the reason and the requirement are shown",
}


STAND_IN = "by a stand-in: "
"""Beginning of `JudgedClaim.why` if the claim was reproduced at a smaller scale than the paper's."""


@dataclass(frozen=True)
class Missing:
    """Replaces the result of a measure that could not be computed."""

    why: str
    """The reason why there is no result."""
    failed: bool = False
    """True if an error prevented the result. False if the measure cannot be computed here."""


class MeasureOutcome(FrozenModel):
    """The result of one reading of a claim."""

    under: str
    """The reading in words; empty for the paper's own reading."""
    measure: str
    arguments: dict[str, Any]
    value: float | bool | None = None
    """The result: a number in base units, or whether a property holds. None without a result."""
    ours: str = ""
    how: str = ""
    missing: str = ""


class JudgedClaim(FrozenModel):
    """A claim and its verdict."""

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
    """The reading, rounding or unit under which the claim was reproduced; empty if it is the paper's own."""
    ours: str
    """Our result as text, under the reading that decides the verdict."""
    how: str
    """The arithmetic of our result."""
    why: str
    """Reason of the verdict."""
    note: str
    rule: str | None = None
    """The rule of comparison in words, if it is looser than rounding; otherwise empty. None in files of an older version."""
    scale: str = ""
    """Description of our measurement if it is smaller than the paper's (counted operations instead of a time, a small
    model); otherwise empty."""
    tried: list[MeasureOutcome]
    failed: bool = False
    """True if the computation of the claim failed."""

    @property
    def stood_in(self) -> bool:
        """True if the claim was reproduced at a smaller scale."""
        return bool(self.scale) and self.verdict in (ClaimVerdict.REPRODUCED, ClaimVerdict.UNDER)

    @property
    def got(self) -> str:
        """Our result as part of a sentence; empty without a result.

        If the rule of comparison is looser than rounding, the text names the rule.
        """
        is_property = any(isinstance(one.value, bool) for one in self.tried)
        rule = f" (rule: {self.rule})" if self.rule else ""
        return f"{'here it' if is_property else 'we get'} {self.ours}{rule}" if self.ours else ""


def judge(claim: Claim, answers: Sequence[MeasureResult | Missing]) -> JudgedClaim:
    """Judge a claim by the results of its measures and return the judged claim.

    answers: first the result under the paper's own reading, and then one result for each reading in `claim.otherwise`.
    """
    answers = [_placed(claim, one) for one in answers]
    readings = [("", claim.request), *((one.under, one.request) for one in claim.otherwise)]
    tried = [_tried(claim, under, request, found) for (under, request), found in zip(readings, answers, strict=True)]
    for one, found in zip(tried, answers, strict=True):
        if isinstance(found, Missing) or (words := _reproduces(claim, found)) is None:
            continue
        under = "; ".join(filter(None, [one.under, words]))
        verdict = ClaimVerdict.UNDER if under else ClaimVerdict.REPRODUCED
        why = f"{STAND_IN}{claim.scale}" if claim.scale else ""
        return _judged(claim, verdict, tried, one, under=under, why=why)
    own, found = tried[0], answers[0]
    if isinstance(found, Missing):
        return _judged(claim, ClaimVerdict.NOT_RUN, tried, own, why=found.why, failed=found.failed)
    missing = [(one, other) for one, other in zip(tried, answers, strict=True) if isinstance(other, Missing)]
    if missing:  # a reading that was not computed might reproduce
        why = "; ".join(f"not computed under {one.under}: {other.why}" for one, other in missing)
        failed = any(other.failed for _, other in missing)
        return _judged(claim, ClaimVerdict.INCONCLUSIVE, tried, own, why=why, failed=failed)
    if claim.scale:
        result = "is uncertain" if _open(claim, found) else "differs"
        why = f"the result {result} at a smaller scale ({claim.scale}), which does not refute the paper"
        return _judged(claim, ClaimVerdict.INCONCLUSIVE, tried, own, why=why)
    if _open(claim, found):
        why = "some values in the range of our result agree, and some do not"
        return _judged(claim, ClaimVerdict.INCONCLUSIVE, tried, own, why=claim.needs or why)
    for one, answer in zip(tried, answers, strict=True):
        if isinstance(answer, MeasureResult) and (allowed := _allowed(claim, answer)):
            why = f"our result is computed from rounded figures, which allow {allowed}"
            return _judged(claim, ClaimVerdict.INCONCLUSIVE, tried, one, why="; ".join(filter(None, [one.under, why])))
    if claim.needs and found.most is None:
        return _judged(claim, ClaimVerdict.INCONCLUSIVE, tried, own, why=f"the paper omits {claim.needs}")
    return _judged(claim, ClaimVerdict.NOT_REPRODUCED, tried, own)


def _placed(claim: Claim, answer: MeasureResult | Missing) -> MeasureResult | Missing:
    """Return the answer. If an error prevented the result, add the place of the claim, `file:line`, to the reason."""
    if isinstance(answer, MeasureResult) or not answer.failed:
        return answer
    return replace(answer, why=f"{claim.where}: {answer.why}")


def _reproduces(claim: Claim, found: MeasureResult) -> str | None:
    """Return, in words, how the printed figure must be read to agree with the result; None if no reading agrees.

    An empty string means: as printed. Another way to read a figure is, for example, to take MB for MiB.
    """
    if claim.figure is None:
        return "" if found.value else None
    most = None if found.most is None else Fraction(found.most)
    return agrees(claim.figure, Fraction(found.value), claim.rounding, most)


def _open(claim: Claim, found: MeasureResult) -> bool:
    """Return whether a result leaves the claim undecided.

    A range leaves the claim undecided if only a part of the range agrees with the claim. For a property, `found.most`
    says whether the claim is undecided.
    """
    if claim.figure is None or found.most is None:
        return bool(found.most)
    return undecided(claim.figure, Fraction(found.value), claim.rounding, Fraction(found.most))


def _allowed(claim: Claim, found: MeasureResult) -> str:
    """Return, as text, the range of results that the paper's rounded figures allow.

    If all values in this range agree with the claim, or none of them, return an empty string.
    """
    if claim.figure is None or found.within is None:
        return ""
    least, most = Fraction(found.within[0]), Fraction(found.within[1])
    if not undecided(claim.figure, least, claim.rounding, most):
        return ""
    return " to ".join(shown(end, claim.dimension, claim.figure.unit) for end in (least, most))


def _tried(claim: Claim, under: str, request: MeasureRequest, found: MeasureResult | Missing) -> MeasureOutcome:
    arguments = plain(request)["with"]
    if isinstance(found, Missing):
        return MeasureOutcome(under=under, measure=request.measure, arguments=arguments, missing=found.why)
    unit = claim.figure.unit if claim.figure else ""
    if claim.figure is None:
        ours = "holds" if found.value else "undecided" if found.most else "does not hold"
    else:
        ours = shown(Fraction(found.value), claim.dimension, unit)
        if found.most is not None:
            ours += f" to {shown(Fraction(found.most), claim.dimension, unit)}"
    value = found.value if isinstance(found.value, bool) else float(found.value)
    return MeasureOutcome(
        under=under, measure=request.measure, arguments=arguments, value=value, ours=ours, how=found.how
    )


def plain(value: Any) -> Any:
    """Return a value in a form that JSON can store.

    A MeasureRequest becomes a dict, as do the requests inside it. A Fraction becomes a number, or text such as `2/3` if
    no decimal number is equal to it.
    """
    if isinstance(value, MeasureRequest):
        return {"measure": value.measure, "with": {key: plain(one) for key, one in value.arguments.items()}}
    if isinstance(value, Fraction):
        short = int(value) if value.denominator == 1 else float(value)
        return short if Fraction(str(short)) == value else str(value)  # 2/3 is no decimal
    return [plain(one) for one in value] if isinstance(value, list) else value


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
        id=claim.id, paper=claim.paper, version=claim.version, source=claim.source, sentence=claim.sentence, tier=claim.tier,
        headline=claim.headline, printed=claim.printed, verdict=verdict, under=under, ours=by.ours, how=by.how, why=why,
        note=claim.note, rule=claim.rule, scale=claim.scale, tried=tried, failed=failed,
    )  # fmt: skip
