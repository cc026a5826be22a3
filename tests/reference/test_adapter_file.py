"""The reading of adapter files: scaling, patterns, which layers a config selects, and the weights of a layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from reference.adapter_file import PREFIX, AdapterSettings, apply, combine, read

# What HF peft 0.21.2 reads from the same configs.
SCALINGS = [
    ({}, 2.0),
    ({"use_rslora": True}, 4.0),
    ({"alpha_pattern": {"q": 32}}, 8.0),
    ({"rank_pattern": {"q": 2}}, 4.0),
    ({"rank_pattern": {"q": 2}, "use_rslora": True}, 8 / math.sqrt(2)),
    ({"rank_pattern": {"a.q": 2, "q": 1}}, 4.0),
    ({"alpha_pattern": {"q": 32, "a.q": 2}}, 8.0),
    ({"alpha_pattern": {"": 2}}, 2.0),
    ({"alpha_pattern": {"aq": 32}}, 2.0),
    ({"alpha_pattern": {r".*\\.q": 32}}, 2.0),
    ({"alpha_pattern": {r"a\.\w": 32}}, 8.0),
]


@pytest.mark.parametrize("pattern", [None, "", []])
def test_without_a_layers_pattern_every_block_counts(pattern: object) -> None:
    settings = AdapterSettings.of({"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": pattern})
    assert [settings.targets(f"model.layers.{n}.q") for n in range(2)] == [True, False]


@pytest.mark.parametrize(("config", "scaling"), SCALINGS, ids=str)
def test_scaling(config: dict[str, object], scaling: float) -> None:
    settings = AdapterSettings.of({"r": 4, "lora_alpha": 8, **config})
    assert settings.scaling("a.q") == scaling


@pytest.mark.parametrize(
    ("config", "selected"),
    [
        ({"target_modules": ["q"]}, ["blocks.0.q", "blocks.1.q"]),
        ({"target_modules": r"blocks\.0.*"}, ["blocks.0", "blocks.0.q", "blocks.0.v"]),
        ({"target_modules": r".*\.1\.[qv]"}, ["blocks.1.q", "blocks.1.v"]),
        ({"target_modules": ["q", "v"], "exclude_modules": ["0.v"]}, ["blocks.0.q", "blocks.1.q", "blocks.1.v"]),
        ({"target_modules": ["q", "v"], "modules_to_save": ["v"]}, ["blocks.0.q", "blocks.1.q"]),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "blocks"}, ["blocks.1.q"]),
        ({"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": ["other", "blocks"]}, ["blocks.0.q"]),
        ({"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "other"}, []),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "(h|blocks)"}, ["blocks.1.q"]),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "blocks|h"}, []),
        ({}, []),
    ],
    ids=str,
)
def test_targets(config: dict[str, object], selected: list[str]) -> None:
    settings = AdapterSettings.of(config)
    blocks = {f"blocks.{index}{name}" for index in range(2) for name in ("", ".q", ".v")}
    assert [path for path in sorted({"blocks", "head", *blocks}) if settings.targets(path)] == selected


def test_a_missing_key_and_null_are_the_default() -> None:
    assert AdapterSettings.of({"r": None, "rank_pattern": None}) == AdapterSettings.of({}) == AdapterSettings()


def test_the_weight_of_a_layer_is_the_formula() -> None:
    model = nn.ModuleDict({"q": nn.Linear(3, 2, bias=False, dtype=torch.float64)})
    W, A, B = model["q"].weight.detach().clone(), torch.randn(1, 3), torch.randn(2, 1)
    tensors = {f"{PREFIX}q.lora_A.weight": A, f"{PREFIX}q.lora_B.weight": B}
    apply(model, AdapterSettings(r=1, lora_alpha=3, target_modules=["q"]), tensors)
    assert torch.equal(model["q"].weight.detach(), W + 3 * (B.double() @ A.double()))


def test_every_key_has_one_meaning() -> None:
    model = nn.ModuleDict({"q": nn.Linear(3, 2), "v": nn.Linear(3, 2)})
    names = [
        "q.lora_A.weight",
        "q.lora_B.weight",
        "q.base_layer.bias",
        "v.lora_A.weight",
        "x.lora_B.weight",
        "y.weight",
    ]
    keys = [f"{PREFIX}{name}" for name in names]
    reading = read(AdapterSettings(target_modules=["q", "v"]), [*keys, "q.lora_A.weight"], model)
    assert [update.path for update in reading.updates] == ["q"]
    assert reading.replaced == {keys[2]: "q.bias"}
    assert reading.absent == ("v",)
    assert {key: reason.partition(" ")[0] for key, reason in reading.unused.items()} == {
        keys[3]: "the", keys[4]: "the", keys[5]: "the", "q.lora_A.weight": "it",
    }  # fmt: skip
    assert "no module x" in reading.unused[keys[4]]
    assert "no parameter" in reading.unused[keys[5]]


class _Keys(list[str]):
    """Keys of a file. A search of the whole list is an error: with all of them, reading would take quadratic time."""

    def __contains__(self, key: object) -> bool:
        raise AssertionError(f"a search for {key}")


def test_reading_searches_no_list_of_keys() -> None:
    config = MixtralConfig(
        vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    start = "model.layers.0.block_sparse_moe.experts"
    names = [f"{start}.{k}.{name}" for k in range(3) for name in ("w1", "w2", "w3")] + [
        "model.layers.0.self_attn.q_proj"
    ]
    keys = _Keys([f"{PREFIX}{name}.lora_{half}.weight" for name in names for half in "AB"])
    settings = AdapterSettings(r=2, target_modules=["w1", "w2", "w3", "q_proj"], use_dora=True)
    reading = read(settings, keys, MixtralForCausalLM(config))
    assert len(reading.updates) == len(names)
    assert reading.unused == {}


def test_the_update_of_one_expert_copies_no_stack() -> None:
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.Module()})})
    stack = nn.Parameter(torch.zeros(3, 4, 4), requires_grad=False)
    model["mlp"]["experts"].down_proj = stack
    tensors = {f"{PREFIX}mlp.experts.{k}.down_proj.lora_{half}.weight": torch.eye(4) for k in (0, 2) for half in "AB"}
    model = nn.ModuleDict({"block": model})
    tensors = {key.replace(PREFIX, f"{PREFIX}block."): one for key, one in tensors.items()}
    apply(model, AdapterSettings(r=4, lora_alpha=4, target_modules=["down_proj"]), tensors)
    assert model["block"]["mlp"]["experts"].down_proj.data_ptr() == stack.data_ptr()
    assert torch.equal(stack, torch.stack([torch.eye(4), torch.zeros(4, 4), torch.eye(4)]))


def test_a_sum_of_adapters_of_single_experts_weighs_each_update() -> None:
    experts = nn.Module()
    experts.down_proj = nn.Parameter(torch.zeros(3, 4, 4, dtype=torch.float64))
    model = nn.ModuleDict({"block": nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})})
    settings = AdapterSettings(r=4, lora_alpha=4, target_modules=["down_proj"])
    start = f"{PREFIX}block.mlp.experts"
    files = [{f"{start}.{k}.down_proj.lora_{half}.weight": torch.eye(4) for half in "AB"} for k in (0, 2)]
    combine(model, [(settings, files[0], 0.5), (settings, files[1], 2.0)])
    expected = torch.stack([0.5 * torch.eye(4), torch.zeros(4, 4), 2 * torch.eye(4)]).double()
    assert torch.equal(experts.down_proj.detach(), expected)


def test_a_sum_of_adapters_with_a_wrong_shape_leaves_the_base_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = AdapterSettings.of({"r": 2, "target_modules": ["0", "1"]})
    A, B = torch.ones(2, 4), torch.ones(4, 2)
    right = {f"{PREFIX}{n}.lora_{x}.weight": t for n in (0, 1) for x, t in (("A", A), ("B", B))}
    wrong = right | {f"{PREFIX}1.lora_B.weight": torch.ones(3, 2)}
    with pytest.raises(ValueError, match="shape"):
        combine(model, [(settings, right, 1.0), (settings, wrong, 1.0)])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    combine(model, [(settings, right, 1.0)])
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if name.endswith("weight"))
