"""Operations and bytes of a training step, held to what is counted by hand; and what the papers' speeds come to by them."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from harness.claims import meta_step
from harness.claims.judge import ClaimVerdict
from harness.claims.measures import paging, step_counts
from reference.operations.paged import Paged
from support.claim_verdicts import verdicts

D, F, V, T, BLOCKS, RANK = 64, 96, 100, 16, 5, 3
"""Features of the residual stream and of the MLP, words, tokens of a text; of a small Llama with as many keys as queries."""
LINEAR = 4 * D * D + 3 * D * F
"""Weights of a block's linear layers."""
ATTENTION = 2 * T * D
"""Of a block and token: queries by keys, and values by what these give."""
QV: dict[str, Any] = {"targets": ["q_proj", "v_proj"], "rank": RANK}
ADALORA = {**QV, "target_rank": 2}


def shape(folder: Path, blocks: int = BLOCKS) -> str:
    path = folder / f"{blocks}.json"
    path.write_text(
        json.dumps(
            {
                "model_type": "llama", "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_attention_heads": 2,
                "num_key_value_heads": 2, "num_hidden_layers": blocks, "architectures": ["LlamaForCausalLM"],
            }
        )
    )  # fmt: skip
    return str(path)


def counted(model: str, method: str, config: dict[str, Any] | None = None, batch: int = 1, again: bool = False) -> int:
    found = step_counts.training_operations(model, method, T, batch, config or {}, checkpointing=again)
    assert isinstance(found.value, int)
    return found.value


@pytest.mark.slow
def test_full_training_takes_six_operations_a_weight_and_token(tmp_path: Path) -> None:
    """Two in the forward pass, two for the gradient of the weight, two for that of its input; embeddings are no product."""
    products = BLOCKS * (LINEAR + ATTENTION) + D * V
    assert counted(shape(tmp_path), "full") == 6 * T * products
    assert counted(shape(tmp_path), "full", batch=3) == 3 * 6 * T * products


@pytest.mark.slow
def test_frozen_weights_take_four_and_adapters_six(tmp_path: Path) -> None:
    frozen, adapters = BLOCKS * LINEAR + D * V, BLOCKS * 2 * 2 * D * RANK
    # In the first block no gradient goes on to the input of q, k and v, frozen or adapter, and none to the keys.
    left_out = 3 * D * D + 2 * D * RANK + T * D
    assert counted(shape(tmp_path), "lora", QV) == 2 * T * (
        2 * frozen + 3 * adapters + 3 * BLOCKS * ATTENTION - left_out
    )


@pytest.mark.slow
def test_a_block_that_is_computed_again_takes_its_forward_pass_once_more(tmp_path: Path) -> None:
    """But for its last product, whose result nothing needs in the backward pass."""
    again = 2 * T * BLOCKS * (LINEAR - D * F + ATTENTION)
    assert counted(shape(tmp_path), "full", again=True) == counted(shape(tmp_path), "full") + again


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("method", "config", "again"),
    [("full", {}, False), ("lora", QV, True), ("dora", QV, False), ("vera", QV, True), ("adalora", ADALORA, False)],
)
def test_a_deep_model_is_counted_from_three_of_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, config: dict[str, Any], again: bool
) -> None:
    of_few = counted(shape(tmp_path), method, config, again=again)
    monkeypatch.setattr(meta_step, "_FEW", BLOCKS)
    meta_step.operations.cache_clear()
    assert counted(shape(tmp_path), method, config, again=again) == of_few


@pytest.mark.nightly
def test_what_a_method_adds_is_counted(tmp_path: Path) -> None:
    """DoRA takes the base's product again, forward and backward, and the norms of W + BA; VeRA trains no matrix."""
    of = {method: counted(shape(tmp_path), method, QV) for method in ("lora", "dora", "vera", "pissa", "qlora")}
    assert of["pissa"] == of["qlora"] == of["lora"]
    assert of["vera"] < of["lora"] < of["dora"]
    assert of["dora"] < counted(shape(tmp_path), "dora", {**QV, "detach_norm": False})
    assert of["lora"] < counted(shape(tmp_path), "lora", {**QV, "rank": RANK + 1})
    # AdaLoRA's term of the loss: P^T P and Q Q^T of both layers, forward and backward, whatever the number of tokens.
    term = BLOCKS * 2 * 2 * 3 * (2 * D * RANK**2)
    assert counted(shape(tmp_path), "adalora", ADALORA) == of["lora"] + term


def test_an_encoder_is_counted_too() -> None:
    config = {"targets": ["query_proj"], "rank": RANK}
    one, two, three = (
        step_counts.training_operations("deberta-v3-base/1-block", "lora", T, n, config).value for n in (1, 2, 3)
    )
    assert 0 < three - two == two - one < one  # what its relative positions take is the same for any number of texts
    with pytest.raises(ValueError, match="1024 tokens exceed the 512 positions"):
        step_counts.training_operations("deberta-v3-base/1-block", "lora", 1024, config=config)


@pytest.mark.slow
def test_the_graph_of_a_norm_keeps_a_weight_for_each_layer(tmp_path: Path) -> None:
    """Four bytes a number in float32 and two in 16 bits; detached, the norm's graph goes before the layer returns."""
    of = {
        (dtype, detached): step_counts.kept_for_backward(
            shape(tmp_path), "dora", T, config={**QV, "detach_norm": detached}, dtype=dtype
        ).value
        for dtype in ("float32", "bfloat16")
        for detached in (True, False)
    }
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        more = of[dtype, False] - of[dtype, True]
        norms = BLOCKS * 2 * D * size
        assert 0 <= more - BLOCKS * 2 * D * D * size <= 2 * norms


def test_more_time_lies_between_none_and_what_operations_allow() -> None:
    longer = step_counts.time_more_by_operations(Fraction(6), Fraction(4))
    shorter = step_counts.time_more_by_operations(Fraction(4), Fraction(6))
    assert (longer.value, longer.most) == (0, Fraction(1, 2))
    assert (shorter.value, shorter.most) == (-Fraction(1, 3), 0)


@pytest.mark.nightly
def test_what_operations_say_of_the_papers_speeds() -> None:
    lora = verdicts("lora", ("lora-throughput-rehearsal",))
    assert {one.verdict for one in lora.values()} == {ClaimVerdict.INCONCLUSIVE}
    assert [one.ours for one in lora.values()] == ["0% to 48.1683%", "0% to 32.1651%"]
    assert all("uncertain at a smaller scale" in one.why for one in lora.values())
    vera = verdicts("vera", ("vera-time-rehearsal",))["vera-time-rehearsal"]
    assert "differs at a smaller scale" in vera.why
    dora = verdicts("dora", ("dora-detached-rehearsal", "dora-cost-rehearsal"))
    assert {one.verdict for one in dora.values()} == {ClaimVerdict.REPRODUCED}
    assert dora["dora-detached-rehearsal"].ours == "24.1182%"
    assert "no GPU's peak was measured" in dora["dora-detached-rehearsal"].why


def test_paged_states_survive_a_spike_that_leaves_them_room_for_one_matrix() -> None:
    """Of six of equal size: a spike that takes five sixths of the device leaves room for one, a larger one for none."""
    assert paging.paging_survives_a_spike(spike=0.83).value
    assert not paging.paging_survives_a_spike(spike=0.84).value
    with pytest.raises(ValueError, match="too small to be paged"):
        paging.paging_survives_a_spike(rows=10)


@pytest.mark.parametrize("broken", ["make_room", "_bring_in"])
def test_a_pager_that_keeps_too_much_or_loses_states_does_not_pass(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(Paged, broken, lambda *_: None)
    assert not paging.paging_survives_a_spike().value
