"""What the measures of LoRA's claims compute, against modules that are built and counted here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import reference.lora
from harness.cell.training import optimizers
from harness.claims import claim_file
from harness.claims.judge import plain
from harness.claims.measure import measures
from harness.claims.worker import answer, find

WIDTH, DEPTH = 8, 3
SHAPE = {"model_type": "gpt2", "vocab_size": 50, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": 2, "n_positions": 16}
SPLIT = {"c_attn": ["query", "key", "value"]}
LORA = {"method": "lora", "split": SPLIT, "config": {"rank": 2, "targets": ["query", "value"]}}


@pytest.fixture
def shape(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE))
    return str(path)


@pytest.fixture(scope="module")
def built() -> Any:
    """The same model by transformers, with weights."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE))


def value(measure: str, **arguments: Any) -> Any:
    return find({"measure": measure, "with": arguments}).value


def size(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize("word", ["attention", "all-linear"])
def test_a_word_for_layers_means_what_it_means_in_a_suite(shape: str, word: str) -> None:
    config = {"rank": 2, "targets": word}
    alone = value("trainable_parameters", model=shape, method="lora", config=config)
    assert alone == value("trainable_parameters", model=shape, method="lora", config=config | {"targets": [word]})
    assert alone > 0


def test_a_method_of_peft_without_a_reference_is_counted(shape: str) -> None:
    config = {"peft_type": "IA3", "target_modules": ["c_attn"], "feedforward_modules": []}
    counted = {"model": shape, "method": "peft", "config": {"adapter_config": config}}
    assert value("trainable_parameters", **counted) == DEPTH * 3 * WIDTH  # a factor for each output
    # The model that other measures use is still the plain one.
    assert value("trainable_parameters", model=shape, **LORA) == DEPTH * 2 * 2 * 2 * WIDTH


def adapter(rank: int) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, rank), nn.ReLU(), nn.Linear(rank, WIDTH))


@pytest.mark.parametrize(
    ("design", "in_a_block"),
    [
        ("houlsby", lambda rank: [adapter(rank), adapter(rank)]),
        ("pfeiffer", lambda rank: [adapter(rank)]),
        ("lin", lambda rank: [adapter(rank), nn.LayerNorm(WIDTH)]),
    ],
)
def test_adapters_are_counted_as_the_modules_they_are(shape: str, design: str, in_a_block: Any) -> None:
    sizes = {rank: DEPTH * size(*in_a_block(rank)) for rank in (1, 3, 4)}
    assert {rank: value("adapters", model=shape, design=design, rank=rank) for rank in sizes} == sizes
    some = {"model": shape, "design": design, "last": 1}
    for near in (sizes[3] - 5, sizes[3] + 5):
        assert value("adapters_of_some_rank", printed=near, **some) == sizes[3]
    assert value("adapters_of_some_rank", printed=1, **some) == sizes[1]
    open_rank = find({"measure": "adapters_of_some_rank", "with": {"printed": sizes[3], **some}})
    assert (open_rank.value, open_rank.most) == (sizes[1], sizes[4])


def test_virtual_tokens_are_counted_as_embeddings_in_one_place_or_in_every_block(shape: str) -> None:
    embedding = size(nn.Embedding(5 + 2, WIDTH))
    assert value("prefix_embedding", model=shape, prefix=5, infix=2) == embedding
    assert value("prefix_layer", model=shape, prefix=5, infix=2) == DEPTH * embedding
    near = {"model": shape, "printed": DEPTH * embedding + 11, "last": 1}
    assert value("prefix_layer_of_some_length", **near) == DEPTH * embedding


def test_the_last_blocks_are_those_at_the_end(shape: str, built: Any) -> None:
    assert value("last_blocks", model=shape, blocks=2) == size(*built.transformer.h[-2:])
    assert "blocks 1 to 2" in find({"measure": "last_blocks", "with": {"model": shape, "blocks": 2}}).how
    with pytest.raises(ValueError, match="`blocks` is 4, but the model has 3 blocks"):
        value("last_blocks", model=shape, blocks=4)


def test_training_state_is_what_adam_holds_after_a_step(shape: str, built: Any) -> None:
    optimizer = torch.optim.Adam(built.parameters())
    built(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    weights = sum(p.nbytes for p in built.parameters())
    gradients = sum(p.grad.nbytes for p in built.parameters())
    moments = sum(s[name].nbytes for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    each = {"weight": 4, "gradient": 4, "moment": 4}
    assert value("adam_training", model=shape, method="full", **each) == weights + gradients + moments
    assert value("adam_training", model=shape, method="frozen", **each) == weights
    added = DEPTH * 2 * 2 * (WIDTH + WIDTH) * 4  # query and value of every block, rank 2
    assert value("adam_training", model=shape, **LORA, **each) == weights + 4 * added
    unknown = find({"measure": "full_finetuning_of_unknown_precision", "with": {"model": shape}})
    assert (unknown.value, unknown.most) == (6 * weights / 4, 16 * weights / 4)


def test_a_count_is_said_to_the_million_or_cut(shape: str) -> None:
    assert [value("whole_multiple", of=1_566, to=500, cut=cut) for cut in (False, True)] == [1500, 1500]
    assert [value("whole_multiple", of=1_766, to=500, cut=cut) for cut in (False, True)] == [2000, 1500]


def test_binary_millions() -> None:
    assert value("in_binary_millions", of=3 * 2**20) == 3_000_000


def test_gigabytes_that_are_binary_in_one_step_and_decimal_in_two() -> None:
    assert value("in_gigabytes_of_1024_million", of=3 * 1024 * 1000 * 1000) == 3_000_000_000


def test_rank_times_sides_holds_of_lora_and_not_of_dora_which_trains_magnitudes(shape: str) -> None:
    config = {"rank": 2, "targets": ["all-linear"]}
    assert value("rank_times_sides", model=shape, method="lora", config=config, split=SPLIT) is True
    dora = find({"measure": "rank_times_sides", "with": {"model": shape, **LORA, "method": "dora"}})
    assert dora.value is False
    assert f"trains {2 * 2 * WIDTH + WIDTH}, but r (in + out) is {2 * 2 * WIDTH}" in dora.how


PROMISES: dict[str, dict[str, Any]] = {
    "only_b_learns_at_first": {},
    "update_is_scaled_by": {"factor": "alpha/r", "alpha": 32, "ranks": [1, 3, 8]},
    "subtracting_restores_the_base": {},
    "merged_has_the_bases_layers": {},
    "b_learns_faster": {"ratio": 16},
}


def test_lora_keeps_its_promises() -> None:
    assert {name: value(name, **arguments) for name, arguments in PROMISES.items()} == dict.fromkeys(PROMISES, True)
    assert value("update_is_scaled_by", factor="alpha/sqrt(r)", alpha=16, ranks=[4, 8, 128]) is True


def _twice_merged(layer: Any) -> nn.Module:
    dense = layer.dense_base()
    dense.weight.data += 2 * layer.delta()
    return dense


@pytest.mark.parametrize(
    ("promise", "where", "name", "fault"),
    [
        (
            "only_b_learns_at_first",
            reference.lora,
            "initial_factors",
            lambda init, r, n, m, g: (torch.zeros(r, n), torch.ones(m, r)),
        ),
        (
            "only_b_learns_at_first",
            reference.lora,
            "initial_factors",
            lambda init, r, n, m, g: (torch.ones(r, n), torch.ones(m, r)),
        ),
        ("update_is_scaled_by", reference.lora.Config, "scaling", property(lambda self: self.alpha / (self.rank + 1))),
        ("update_is_scaled_by", reference.lora.Config, "scaling", property(lambda self: self.alpha / self.rank**0.5)),
        ("subtracting_restores_the_base", reference.lora.LoraLinear, "merged", _twice_merged),
        ("subtracting_restores_the_base", reference.lora.LoraLinear, "merged", lambda self: self.base),
        ("subtracting_restores_the_base", reference.lora.LoraLinear, "delta", lambda self: 0 * self.base.weight),
        ("merged_has_the_bases_layers", reference.lora.LoraLinear, "merged", lambda self: nn.Sequential(self.base)),
        ("b_learns_faster", optimizers, "_of_body", lambda adapted, body, recipe: [{"params": body, "lr": recipe.lr}]),
    ],
)
def test_a_broken_promise_does_not_hold(
    promise: str, where: Any, name: str, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, fault)
    assert value(promise, **PROMISES[promise]) is False


def test_a_share_such_as_two_thirds_and_a_list_reach_the_measure_whole(shape: str, tmp_path: Path) -> None:
    of = {"measure": "adam_training", "with": {"model": shape, "method": "full", "gradient": 0}}
    states = {"of": of, "to": {**of, "with": {**of["with"], "method": "frozen"}}}
    tokens = {"measure": "prefix_embedding", "with": {"model": shape, "prefix": 14, "infix": 0}}
    rows = {
        "two-thirds": {"printed": "2/3", "measure": "falls_by", "with": {"share": "2/3", **states}},
        "decimals": {"printed": "2/3", "measure": "falls_by", "with": {"share": 0.6667, **states}},
        "sum": {"printed": "312", "measure": "count_sum", "with": {"of": [200, tokens]}},
    }
    claims = [{"id": name, "sentence": "s", "source": "s", "tier": "exact", **row} for name, row in rows.items()]
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"paper": "mine", "title": "Mine", "version": "v1", "claims": claims}))
    asked = {claim.id: json.loads(json.dumps(plain(claim.request))) for claim in claim_file.load([path])}
    assert {name: answer(one)["value"] for name, one in asked.items()} == {
        "two-thirds": True, "decimals": False, "sum": str(200 + 14 * WIDTH),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("measure", "arguments"),
    [
        ("adapters", {"model": "gpt2-medium", "design": "housby", "rank": 1}),
        ("adapters", {"model": "gpt2-medium", "design": "lin", "rank": 0}),
        ("prefix_layer", {"model": "gpt2-medium", "prefix": -1, "infix": 0}),
        ("update_is_scaled_by", {"factor": "alpha", "alpha": 1, "ranks": [1]}),
    ],
)
def test_arguments_out_of_range_are_refused_with_the_file(measure: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="1 validation error"):
        measures()[measure].arguments.model_validate(arguments)
