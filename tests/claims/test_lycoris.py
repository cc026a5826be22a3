"""Claims of LoHa and LoKr: what their measures count, by another route, and with a fault planted in the reference."""

from __future__ import annotations

import pytest

from harness.claims import claim_file
from harness.claims.judge import ClaimVerdict, judge, plain
from harness.claims.measures import lycoris, models_without_presets
from harness.claims.worker import find


@pytest.mark.parametrize("paper", ["loha", "lokr"])
def test_every_claim_is_reproduced(paper: str) -> None:
    claims = list(claim_file.load(claim_file.paths([paper])))
    assert claims
    found = {claim.id: judge(claim, [find(plain(claim.request))]).verdict for claim in claims}
    assert set(found.values()) == {ClaimVerdict.REPRODUCED}, found


def test_a_layer_is_counted_with_a_method() -> None:
    assert models_without_presets.linear_trainable(20, 12, "lora", {"rank": 3}).value == 3 * 20 + 3 * 12
    assert models_without_presets.linear_trainable(20, 12, "loha", {"rank": 3}).value == 2 * 3 * (20 + 12)
    # 20 = 4 x 5 and 12 = 3 x 4: C is 3 x 4, B 4 x 1, A 1 x 5
    assert models_without_presets.linear_trainable(20, 12, "lokr", {"rank": 1}).value == 12 + 4 + 5


def test_the_rank_of_an_update_is_that_of_its_form() -> None:
    assert models_without_presets.largest_update_rank(30, 40, "lora", {"rank": 3}).value == 3
    assert models_without_presets.largest_update_rank(30, 40, "loha", {"rank": 3}).value == 9
    assert models_without_presets.largest_update_rank(30, 40, "loha", {"rank": 8}).value == 30


def test_the_formula_fails_if_the_factor_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    from reference import lokr

    asked = ([[320, 256]], [4], 4)
    assert lycoris.kronecker_counts_by_formula(*asked).value
    divided = lokr.divided
    monkeypatch.setattr("reference.lokr.divided", lambda size, factor: divided(size, -1))
    assert not lycoris.kronecker_counts_by_formula(*asked).value


def test_ranks_that_do_not_multiply_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"inputs": 32, "outputs": 24, "factor": 4, "rank": 2}
    assert lycoris.kronecker_ranks_multiply(**asked).how.startswith("4 * 2, and 8 ")
    monkeypatch.setattr(
        "reference.lokr.LokrLinear.delta",
        lambda layer: (layer.right["B"] @ layer.right["A"]).repeat(layer.C.shape),
    )
    assert not lycoris.kronecker_ranks_multiply(**asked).value
