"""Counts of models with equal blocks: they follow from one block and from two, and are those of the whole model."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from harness.assets import structure
from harness.conformance.subject import configure
from harness.memory_model import counting, equal_blocks
from reference.lora import LoraLinear
from support.small_llama import METHODS, SMALL

LAYERS = ("num_hidden_layers", "n_layer")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("causal", SMALL | {"num_hidden_layers": 7}),
    "gpt2": ("causal", {"model_type": "gpt2", "n_layer": 5, "n_embd": 64, "n_head": 4, "vocab_size": 100}),
    "bert": (
        "encoder",
        {"model_type": "bert", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
         "num_attention_heads": 4, "vocab_size": 100},
    ),
}  # fmt: skip


def whole(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Any:
    """Count without the shortcut."""
    with monkeypatch.context() as patch:
        patch.setattr(equal_blocks, "find_blocks", lambda *_: "")
        return counting.count(*arguments)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_counts_of_a_model_are_those_of_all_its_blocks(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, config = MODELS[name]
    model = structure.build(config, kind, torch.float32)
    assert equal_blocks.find_blocks(model, {})
    # Without targets, so that each Method adapts the layers of this model; rank 500 is too large for some of them.
    configs = {method: [{k: v for k, v in one.items() if k != "targets"}] for method, one in METHODS.items()}
    for method in ("lora", "pissa", "adalora"):
        configs[method].append({"rank": 500} | ({"target_rank": 500} if method == "adalora" else {}))
    arguments = (config, kind, dtype, configs, [])
    found = counting.count(*arguments)
    assert found == whole(monkeypatch, *arguments)
    assert {method for method, (one, *_) in found["methods"].items() if one["error"]} <= {"vera"}


@pytest.mark.parametrize(
    "targets", [["model.layers.5.mlp.down_proj"], ["layers.0.self_attn.q_proj", "up_proj"], ["down_proj"]]
)
def test_layers_of_some_blocks_are_counted_there_alone(targets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, config = MODELS["llama"]
    for asked, of_config in ((targets, {}), ([], {"targets": targets})):
        arguments = (config, kind, "float32", {"lora": [{"rank": 4} | of_config]}, asked)
        assert counting.count(*arguments) == whole(monkeypatch, *arguments)


def test_blocks_that_differ_are_all_counted() -> None:
    model = structure.build(MODELS["llama"][1], "causal", torch.float32)
    path = equal_blocks.find_blocks(model, {})
    assert path == "model.layers"
    assert equal_blocks.find_blocks(model, {"model.layers.3.mlp.up_proj.weight": None}) == ""
    shared = structure.build(MODELS["llama"][1], "causal", torch.float32)
    shared.model.layers[4].mlp.up_proj.weight = shared.model.layers[2].mlp.up_proj.weight
    assert equal_blocks.find_blocks(shared, {}) == ""
    model.model.layers[2].mlp.up_proj = torch.nn.Linear(128, 321, device="meta")
    assert equal_blocks.find_blocks(model, {}) == ""


def test_facts_about_a_model_follow_from_a_few_of_its_equal_blocks() -> None:
    model = structure.build(MODELS["llama"][1], "causal", torch.float32)
    found_in: list[int] = []

    def find() -> tuple[dict[str, Any], dict[str, int]]:
        found_in.append(len(model.model.layers))
        return {name: p.shape for name, p in model.named_parameters()}, {"model.norm": 1}

    assert list(map(list, equal_blocks.named_facts(model, find))) == [
        [n for n, _ in model.named_parameters()],
        ["model.norm"],
    ]
    assert found_in == [2, 3]
    assert equal_blocks.named_facts(model, find) == find()


@pytest.mark.parametrize("target", ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "layers.5.mlp.up_proj", "up_proj"])
def test_facts_about_some_blocks_are_found_there_alone(target: str) -> None:
    model = structure.build(MODELS["llama"][1], "causal", torch.float32)

    def find() -> tuple[dict[str, Any]]:
        config = configure("lora", {"rank": 4, "targets": [target, "q_proj"]})
        with counting.attached(model, "lora", config) as adapted:
            return ({name: t.shape for name, t in adapted.tensors().items()},)

    found = equal_blocks.named_facts(model, find)
    assert list(found[0].items()) == list(find()[0].items())
    assert not any(isinstance(module, LoraLinear) for module in model.modules())


@pytest.mark.parametrize("pattern", [r"layers\.[0-4]\.", r"layers\.[12]\.mlp", r"layers\.\d\.mlp", r"norm"])
def test_parameters_chosen_by_an_expression_are_those_of_the_whole_model(pattern: str) -> None:
    model = structure.build(MODELS["llama"][1], "causal", torch.float32)

    def choose() -> dict[str, Any]:
        return {name: p.shape for name, p in model.named_parameters() if re.search(pattern, name)}

    chosen = choose()
    assert equal_blocks.named_facts(model, lambda: (choose(),), chosen) == (chosen,)


def test_facts_that_depend_on_the_depth_are_found_in_the_whole_model() -> None:
    model = structure.build(MODELS["llama"][1], "causal", torch.float32)
    assert equal_blocks.named_facts(model, lambda: ({"blocks": len(model.model.layers)},)) == ({"blocks": 7},)


def test_counts_of_different_forms_are_refused() -> None:
    assert equal_blocks.extrapolate({"a": (1, 10), "b": "x"}, {"a": (1, 14), "b": "x"}, 5) == {"a": (1, 26), "b": "x"}
    with pytest.raises(ValueError, match="one block counts as"):
        equal_blocks.extrapolate({"a": 1}, {"b": 1}, 5)
