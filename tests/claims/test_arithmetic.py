"""Arithmetic with printed figures: they are rounded, and what is computed from them is as wide as that leaves open."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from harness.claims import claim_file
from harness.claims.judge import ClaimVerdict, judge, plain
from harness.claims.measures import arithmetic
from harness.claims.worker import find

CLAIM = "paper: made\ntitle: Made\nversion: v1\nclaims:\n  - {{id: a, sentence: s, source: t, tier: exact, {0}}}\n"
TEN, THREE, ONE = (Fraction(n) for n in (10, 3, 1))


def test_a_quotient_of_printed_figures_is_as_wide_as_their_last_digits() -> None:
    widest = (Fraction("9.5") / Fraction("3.5"), Fraction("10.5") / Fraction("2.5"))
    assert arithmetic.ratio(TEN, THREE, ONE).within == arithmetic.share(TEN, THREE, ONE).within == widest
    assert arithmetic.ratio(TEN, THREE).within is arithmetic.share(TEN, THREE).within is None


def test_a_sum_of_printed_figures_is_as_wide_as_all_of_them_leave_open() -> None:
    found = arithmetic.bytes_sum([TEN, THREE, ONE], ONE)
    assert (found.value, found.within) == (14, (Fraction("12.5"), Fraction("15.5")))
    assert arithmetic.bytes_sum([TEN, THREE]).within is None


def test_the_most_of_several_is_as_wide_as_any_of_them_leaves_open() -> None:
    found = arithmetic.most_share_less(of=[THREE, Fraction(9)], than=[TEN, TEN], last=ONE)
    assert found.value == Fraction(7, 10)
    assert found.within == (1 - Fraction("3.5") / Fraction("9.5"), 1 - Fraction("2.5") / Fraction("10.5"))
    assert arithmetic.most_share_less(of=[THREE], than=[TEN]).within is None


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        ("printed: 4x, measure: ratio, with: {of: 10, to: 3", "2.71429x to 4.2x"),
        ("printed: 35%, measure: share, with: {of: 3, to: 10", "23.8095% to 36.8421%"),
        ("printed: 9B, measure: bytes_sum, with: {of: [3, 5]", "7 B to 9 B"),
        ("printed: 75%, measure: most_share_less, with: {of: [3, 9], than: [10, 10]", "63.1579% to 76.1905%"),
    ],
)
def test_what_rounding_alone_explains_is_not_refuted(tmp_path: Path, asked: str, allowed: str) -> None:
    exact, rounded = (_judged(tmp_path, f"{asked}{last}}}") for last in ("", ", last: 1"))
    assert exact.verdict is ClaimVerdict.NOT_REPRODUCED
    assert rounded.verdict is ClaimVerdict.INCONCLUSIVE
    assert f"which allow {allowed}" in rounded.why


def test_what_rounding_does_not_explain_stays_refuted(tmp_path: Path) -> None:
    asked = "printed: 40%, measure: share, with: {of: 3, to: 10, last: 1}"
    assert _judged(tmp_path, asked).verdict is ClaimVerdict.NOT_REPRODUCED


def _judged(folder: Path, asked: str) -> Any:
    path = folder / "made.yaml"
    path.write_text(CLAIM.format(asked))
    (claim,) = claim_file.load([path])
    return judge(claim, [find(plain(claim.request))])
