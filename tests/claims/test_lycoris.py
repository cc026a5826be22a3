"""Claims of LoHa: what their measures count, by another route, and with a fault planted in the reference."""

from __future__ import annotations

import pytest

from harness.claims import claim_file
from harness.claims.judge import ClaimVerdict, judge, plain
from harness.claims.measures import models_without_presets
from harness.claims.worker import find


@pytest.mark.parametrize("paper", ["loha"])
def test_every_claim_is_reproduced(paper: str) -> None:
    claims = list(claim_file.load(claim_file.paths([paper])))
    assert claims
    found = {claim.id: judge(claim, [find(plain(claim.request))]).verdict for claim in claims}
    assert set(found.values()) == {ClaimVerdict.REPRODUCED}, found


def test_a_layer_is_counted_with_a_method() -> None:
    assert models_without_presets.linear_trainable(20, 12, "lora", {"rank": 3}).value == 3 * 20 + 3 * 12
    assert models_without_presets.linear_trainable(20, 12, "loha", {"rank": 3}).value == 2 * 3 * (20 + 12)


def test_the_rank_of_an_update_is_that_of_its_form() -> None:
    assert models_without_presets.largest_update_rank(30, 40, "lora", {"rank": 3}).value == 3
    assert models_without_presets.largest_update_rank(30, 40, "loha", {"rank": 3}).value == 9
    assert models_without_presets.largest_update_rank(30, 40, "loha", {"rank": 8}).value == 30
