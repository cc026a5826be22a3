"""Claims of OFT: what their measures find, and that they fail with a fault planted in the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.claims import claim_file
from harness.claims.judge import ClaimVerdict, judge, plain
from harness.claims.measures import models_without_presets, oft
from harness.claims.worker import find
from reference.oft import rotations


def test_every_claim_is_reproduced() -> None:
    claims = list(claim_file.load(claim_file.paths(["oft"])))
    found = {claim.id: judge(claim, [find(plain(claim.request))]).verdict for claim in claims}
    assert {claim.tier for claim in claims} == {"exact"}
    assert set(found.values()) == {ClaimVerdict.REPRODUCED}, found


def test_a_layer_is_counted_by_its_blocks() -> None:
    assert models_without_presets.linear_trainable(20, 12, "oft", {"block_size": 4}).value == 5 * 6
    assert models_without_presets.linear_trainable(20, 300, "oft", {"block_size": 4}).value == 5 * 6


def test_the_formula_fails_if_whole_blocks_train(monkeypatch: pytest.MonkeyPatch) -> None:
    assert oft.rotation_counts_by_formula(24, 8, [1, 2, 6]).value
    monkeypatch.setattr(
        "reference.oft.OftLinear.__init__",
        lambda layer, base, Q, size, *_: whole_blocks(layer, base, Q, size),
    )
    assert not oft.rotation_counts_by_formula(24, 8, [1, 2, 6]).value


def whole_blocks(layer: torch.nn.Module, base: torch.nn.Module, Q: Tensor, size: int) -> None:
    torch.nn.Module.__init__(layer)
    layer.base, layer.Q = base, torch.nn.Parameter(Q.new_zeros(len(Q), size, size))


@pytest.mark.parametrize(
    "fault",
    [
        lambda packed, size, cayley, terms: rotations(packed, size, "neumann", terms),
        lambda packed, size, cayley, terms: -rotations(packed, size, cayley, terms),
        lambda packed, size, cayley, terms: rotations(packed + 0.1, size, cayley, terms),
    ],
    ids=["the series, which is only nearly orthogonal", "reflections", "a start that is not the identity"],
)
def test_blocks_that_are_no_rotations_fail(fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert oft.cayley_is_orthogonal([3]).value
    monkeypatch.setattr("reference.oft.rotations", fault)
    assert not oft.cayley_is_orthogonal([3]).value
