"""VeRA's claims: what their measures count and find, by another route, and with a fault planted in the reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.claims import attached_model, claim_file
from harness.claims.judge import ClaimVerdict, judge, plain
from harness.claims.measure import MeasureResult
from harness.claims.measures import models_without_presets, parameters, vera
from harness.claims.worker import find
from harness.errors import SuiteError

HIDDEN, BLOCKS, MLP = 12, 3, 20
VISION = {"width": 8, "blocks": 2, "heads": 2, "mlp": 24, "patch": 4, "pixels": 8}


@pytest.fixture
def shape(tmp_path: Path) -> str:
    """A llama whose q and o are square and whose v is not."""
    config = {
        "model_type": "llama", "vocab_size": 50, "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return f"{tmp_path}/config.json"


def verdicts(*ids: str) -> list[tuple[ClaimVerdict, str]]:
    """Judge claims of the file, each with the convention that it comes out under."""
    claims = {claim.id: claim for claim in claim_file.load(claim_file.paths(["vera"]))}
    found = []
    for claim in (claims[one] for one in ids):
        answers = [find(plain(one)) for one in (claim.request, *(one.request for one in claim.otherwise))]
        row = judge(claim, answers)
        found.append((row.verdict, row.under))
    return found


def test_the_formula_holds_until_a_vector_is_not_trained(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = vera.counts_by_formula(shape, ["q_proj", "o_proj"], [1, 5])
    assert found == MeasureResult(
        True, "L = 6, d = 12; r = 1: VeRA 78, LoRA 144; r = 5: VeRA 102, LoRA 720"  # 6 (12 + r) and 2 * 6 * 12 r
    )  # fmt: skip

    attached_model._tensors.cache_clear()
    monkeypatch.setattr("reference.vera.VeraLinear.tensors", lambda layer: {"b": layer.b})
    assert not vera.counts_by_formula(shape, ["q_proj", "o_proj"], [1, 5]).value
    attached_model._tensors.cache_clear()


def test_the_formula_is_refused_for_layers_that_are_not_square(shape: str) -> None:
    with pytest.raises(ValueError, match=r"the formula is for square layers of one size; q_proj, v_proj are not"):
        vera.counts_by_formula(shape, ["q_proj", "v_proj"], [1])


def test_what_layers_share_is_counted_once_and_at_its_whole_size(shape: str) -> None:
    # q is 12 -> 12, v 12 -> 6, down 20 -> 12: the pair is (3, 20) and (12, 3), of which every layer uses a slice.
    config = {"rank": 3, "targets": ["q_proj", "v_proj", "down_proj"]}
    assert parameters.frozen_tensors_of_the_method(shape, "vera", config).value == 3 * MLP + HIDDEN * 3
    assert parameters.frozen_tensors_of_the_method(shape, "lora", config).value == 0


def test_the_pair_is_pytorchs_kaiming_uniform_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vera.is_kaiming_uniform(20, 30, 5).value

    def normal(key: int, rank: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(key)
        return tuple(  # type: ignore[return-value]
            torch.nn.init.kaiming_normal_(torch.empty(s), generator=generator)
            for s in ((rank, inputs), (outputs, rank))
        )

    monkeypatch.setattr("reference.vera.projections", normal)
    assert not vera.is_kaiming_uniform(20, 30, 5).value
    assert vera.product_keeps_variance(16, 16, [1, 4, 16]).value  # which Kaiming's normal distribution does too


def _spread(scale: Callable[[int], float]) -> Any:
    from reference import vera as reference

    true = reference.projections

    def drawn(key: int, rank: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        A, B = true(key, rank, inputs, outputs)
        return A, B * scale(rank)

    return drawn


@pytest.mark.parametrize(("scale", "holds"), [(lambda r: 1.0, True), (lambda r: r**0.5, False), (lambda r: 1.1, False)])
def test_the_product_keeps_its_variance_at_every_rank(
    scale: Callable[[int], float], holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reference.vera.projections", _spread(scale))
    assert vera.product_keeps_variance(16, 16, [1, 4, 16]).value is holds


def test_a_vision_transformer_is_counted_with_and_without_a_method() -> None:
    width, blocks, mlp = VISION["width"], VISION["blocks"], VISION["mlp"]
    linear = 4 * (width * width + width) + (width * mlp + mlp) + (mlp * width + width)
    outside = (3 * 4 * 4 * width + width) + width + (4 + 1) * width + 2 * width  # patches, class token, positions, norm
    assert models_without_presets.vision_parameters(**VISION).value == blocks * (linear + 4 * width) + outside

    targets = ["q_proj", "v_proj"]
    for method, each in (("vera", width + 3), ("lora", 2 * width * 3)):
        found = models_without_presets.vision_trainable(**VISION, method=method, config={"rank": 3, "targets": targets})
        assert found.value == blocks * 2 * each


def test_the_misprint_of_table_1_is_found_and_its_bytes_come_out() -> None:
    assert verdicts("vera-t1-large-vera-r16", "vera-t1-bytes-large-vera-r16", "vera-t1-large-vera-r256") == [
        (ClaimVerdict.NOT_REPRODUCED, ""),
        (ClaimVerdict.UNDER, "KB read as KiB"),
        (ClaimVerdict.REPRODUCED, ""),
    ]


def test_a_size_that_is_none_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "paper: mine\ntitle: Mine\nversion: v1\nclaims:\n"
        "  - {id: one, sentence: A sentence., source: Table 1, tier: exact, printed: yes it is, "
        "measure: product_keeps_variance, with: {inputs: 8, outputs: 8, ranks: [0]}}\n"
    )
    with pytest.raises(SuiteError, match=r"mine\.yaml:5: `ranks` of `product_keeps_variance`: .* greater than .*got 0"):
        claim_file.load([path])


def test_a_pattern_that_fits_no_name_is_refused_with_names_that_there_are(shape: str) -> None:
    with pytest.raises(ValueError, match=r"`\^classifer` matches none of \d+ names, e.g. `model.embed_tok"):
        parameters.parameters(shape, without=["norm", "^classifer"])
    with pytest.raises(ValueError, match=r"`bias\$` matches none of \d+ names"):
        parameters.parameters(shape, only=["bias$"])
    lora = {"rank": 2, "targets": ["q_proj"]}
    with pytest.raises(ValueError, match=r"`\\.m\$` matches none of 6 names, e.g. `.*q_proj.A`"):
        parameters.trainable_parameters(shape, "lora", lora, only=[r"\.m$"])
    with pytest.raises(ValueError, match="`score` matches none"):
        parameters.trainable_parameters(shape, "lora", lora, also=["score"])


def test_what_trains_besides_and_already_counts_once(shape: str) -> None:
    every = parameters.parameters(shape).value
    assert parameters.trainable_parameters(shape, "full", also=["lm_head", "norm"]).value == every
    lora = {"rank": 2, "targets": ["q_proj"]}
    besides = parameters.trainable_parameters(shape, "lora", lora, also=["lm_head"]).value
    assert besides == BLOCKS * 2 * (HIDDEN + HIDDEN) + 50 * HIDDEN
