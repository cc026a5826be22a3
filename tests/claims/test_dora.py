"""DoRA's claims: what their measures count, by hand on small shapes, and what the ledger says of the printed figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import reference.dora
from harness.claims import claim_file, compute
from harness.claims.judge import ClaimVerdict, JudgedClaim, judge, plain
from harness.claims.measures import arithmetic, baselines, dora, models_without_presets
from harness.claims.worker import answer, find

D, KV, F, LAYERS, V = 8, 4, 16, 3, 100
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OUTPUTS = D + KV + KV + D + F + F + D
BASE = LAYERS * (2 * D * D + 2 * D * KV + 3 * D * F + 2 * D) + 2 * V * D + D
BART = {
    "d_model": 8, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 50, "max_position_embeddings": 20,
}  # fmt: skip


@pytest.fixture
def shape(tmp_path: Path) -> str:
    """Write down a LLaMA whose keys and values are narrower than its queries."""
    path = tmp_path / "config.json"
    config = {
        "model_type": "llama", "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    path.write_text(json.dumps(config))
    return str(path)


def verdicts(folder: Path, ids: Sequence[str], changed: tuple[str, str] = ("", "")) -> dict[str, JudgedClaim]:
    """Judge some claims of DoRA's file, in which one text is another."""
    text = claim_file.paths(["dora"])[0].read_text()
    assert changed[0] in text
    (folder / "dora.yaml").write_text(text.replace(*changed))
    claims = [claim for claim in claim_file.load([folder / "dora.yaml"]) if claim.id in ids]
    return {c.id: judge(c, [find(plain(a)) for a in (c.request, *(o.request for o in c.otherwise))]) for c in claims}


def test_magnitudes_stand_on_more_layers_than_directions(shape: str) -> None:
    config = {"rank": 2, "targets": ["q_proj", "k_proj", "v_proj"]}
    found = dora.with_magnitudes(shape, "lora", config, SEVEN)
    assert found.value == LAYERS * (2 * (3 * D + D + 2 * KV) + OUTPUTS)


def test_what_is_added_is_a_share_of_the_model_alone_or_of_both(shape: str) -> None:
    assert baselines.added_share(Fraction(50), shape, "base").value == Fraction(50, BASE)
    assert baselines.added_share(Fraction(50), shape).value == Fraction(50, BASE + 50)


def test_a_prefix_is_as_wide_as_keys_and_values(shape: str) -> None:
    assert baselines.prefixes(shape, tokens=5).value == 5 * LAYERS * 2 * KV


def test_a_bottleneck_after_a_layer_has_its_width_on_both_sides(shape: str) -> None:
    after = baselines.bottlenecks(shape, 3, after=["up_proj"])
    beside = baselines.bottlenecks(shape, 3, beside=["up_proj"], bias=True)
    assert after.value == LAYERS * 3 * (F + F)
    assert beside.value == LAYERS * (3 * (D + F) + 3 + F)
    with pytest.raises(ValueError, match="needs `after` or `beside`"):
        baselines.bottlenecks(shape, 3)


def test_a_vision_tower_has_as_many_parameters_as_transformers_builds() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "patch_size": 4, "image_size": 24}
    with torch.device("meta"):
        built = CLIPVisionModel(CLIPVisionConfig(num_attention_heads=2, **sizes))
    found = baselines.vision_transformer(width=12, mlp=20, layers=2, patch=4, image=24)
    assert found.value == sum(p.numel() for p in built.parameters())


def test_bart_attends_once_in_the_encoder_and_twice_in_the_decoder() -> None:
    config = {"rank": 2, "targets": ["q_proj", "v_proj"]}
    blocks = BART["encoder_layers"] + 2 * BART["decoder_layers"]
    assert models_without_presets.bart_trainable_parameters(BART, "lora", config).value == blocks * 2 * 2 * (8 + 8)
    norms = 2 + 2 * BART["encoder_layers"] + 3 * BART["decoder_layers"]
    biases = blocks * 4 * 8 + (BART["encoder_layers"] + BART["decoder_layers"]) * (16 + 8) + norms * 8
    assert models_without_presets.bart_parameters(BART, only=["bias"]).value == biases


@pytest.mark.parametrize(
    ("equation", "detach_norm", "holds"),
    [("eq. 11", True, True), ("eq. 11", False, False), ("eq. 6", False, True), ("eq. 6", True, False)],
)
def test_the_gradient_is_that_of_one_equation(equation: Any, detach_norm: bool, holds: bool) -> None:
    assert dora.gradient_is(equation, detach_norm).value is holds


def test_a_gain_without_the_norm_has_neither_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference.dora, "gain", lambda m, norm: m)
    assert not dora.gradient_is("eq. 11", detach_norm=True).value
    assert not dora.gradient_is("eq. 6", detach_norm=False).value
    assert not dora.gradient_leaves_direction(detach_norm=False).value


def test_only_the_whole_gradient_leaves_the_direction_alone() -> None:
    assert dora.gradient_leaves_direction(detach_norm=False).value
    assert not dora.gradient_leaves_direction(detach_norm=True).value


def test_a_magnitude_belongs_to_an_output() -> None:
    assert dora.one_magnitude_per("output").value
    assert not dora.one_magnitude_per("input").value


def test_scores_of_one_task_count_once() -> None:
    found = arithmetic.mean_score([[90.0, 80.0], 60.1], last=Fraction("0.1"))
    assert found.value == Fraction("72.55")
    assert found.within == (Fraction("72.5"), Fraction("72.6"))


@pytest.mark.slow
def test_printed_shares_come_out_under_the_convention_that_fits(tmp_path: Path) -> None:
    found = verdicts(tmp_path, ["dora-t15-lora-r8", "dora-t15-lora-r16", "dora-t15-dora-r4", "dora-t15-dora-r8"])
    assert found["dora-t15-lora-r8"].verdict is found["dora-t15-dora-r8"].verdict is ClaimVerdict.REPRODUCED
    assert found["dora-t15-lora-r16"].under == "as a share of the model without the added parameters"
    assert found["dora-t15-dora-r4"].under == "digits cut off, not rounded"


@pytest.mark.slow
def test_another_rank_does_not_come_out(tmp_path: Path) -> None:
    row = "lora-r8, printed: 0.21%, with: {method: lora, config: {rank: "
    (judged,) = verdicts(tmp_path, ["dora-t15-lora-r8"], (f"{row}8", f"{row}9")).values()
    assert judged.verdict is ClaimVerdict.NOT_REPRODUCED
    # 5 layers of 32 blocks: three of 4096 x 4096 and two with the MLP's 11008.
    trained = 32 * 9 * (3 * (4096 + 4096) + 2 * (4096 + 11008))
    assert f"{trained:,} / " in judged.how


def test_two_places_that_disagree_are_found(tmp_path: Path) -> None:
    ids = ["dora-margin-llava", "dora-margin-llava-text", "dora-margin-13b-half"]
    found = verdicts(tmp_path, ids)
    assert found["dora-margin-llava"].verdict is ClaimVerdict.INCONCLUSIVE  # of rounded means it may be 0.6 and 0.7
    assert found["dora-margin-llava-text"].verdict is ClaimVerdict.REPRODUCED
    assert found["dora-margin-13b-half"].under == "DoRA with the full rank"


def test_printed_figures_stand_for_all_that_is_rounded_to_them() -> None:
    ids = ["dora-mean-text-lora-r8", "dora-mean-t6-7b-dora", "dora-table7-llama", "dora-margin-r4"]
    claims = [claim for claim in claim_file.load(claim_file.paths(["dora"])) if claim.id in ids]
    # As between the processes: an answer is written down as JSON and read again.
    found = {c.id: judge(c, [compute._read(json.dumps(answer(plain(c.request))))]) for c in claims}
    mean = found["dora-mean-text-lora-r8"]
    assert (mean.verdict, mean.ours) == (ClaimVerdict.INCONCLUSIVE, "40.7625")
    assert mean.why.endswith("rounded figures, which allow 40.7125 to 40.8125")
    assert found["dora-mean-t6-7b-dora"].verdict is ClaimVerdict.NOT_REPRODUCED
    assert found["dora-table7-llama"].verdict is found["dora-margin-r4"].verdict is ClaimVerdict.REPRODUCED
