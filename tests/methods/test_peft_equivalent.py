"""The adapter config of a Cell is the config with which the implementation hf-peft trains its Method."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn

from harness.conformance.subject import configure
from harness.methods.adapter_config import peft_equivalent
from harness.methods.implementations import hf_peft
from reference.oft import block_of

peft = pytest.importorskip("peft", reason="peft is not installed")
ATTACH = {one.target: one for one in hf_peft.implementations() if one.name == "hf-peft"}


class _GivenError(Exception):
    """Carries the config that peft got."""


def _given(method: str, config: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the config that hf-peft gives to peft for a Method."""

    def stop(_: nn.Module, config: Any, **__: Any) -> Any:
        raise _GivenError(config)

    monkeypatch.setattr(peft, "get_peft_model", stop)
    model = nn.Sequential()
    model.add_module("query", nn.Linear(64, 64))
    with pytest.raises(_GivenError) as stopped:
        ATTACH[method](model, config, torch.Generator())
    found: dict[str, Any] = stopped.value.args[0].to_dict()
    return found


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("lora", {"rank": 4, "alpha": 3.0, "dropout": 0.1, "rslora": True}),
        ("lora", {"rank": 4, "init": "gaussian"}),
        ("lora", {"rank": 4, "lora_bias": True}),
        ("qlora", {"rank": 4, "lora_bias": True}),
        ("qlora", {"rank": 4}),
        ("lora_int8", {"rank": 4, "dropout": 0.1, "lora_bias": True}),
        ("dora", {"rank": 4}),
        ("pissa", {"rank": 4}),
        ("pissa", {"rank": 4, "niter": 2}),
        ("vera", {"rank": 4, "projection_key": 5, "d_initial": 0.2}),
        ("loha", {"rank": 4, "alpha": 6.0, "rank_dropout": 0.2}),
        ("lokr", {"rank": 4, "alpha": 6.0, "rank_dropout": 0.2, "factor": 4}),
        ("lokr", {"rank": 4, "init": "lycoris"}),
        ("oft", {"block_size": 16, "terms": 6}),
        ("adalora", {"rank": 6, "target_rank": 4, "total_steps": 40, "tinit": 8, "tfinal": 12, "delta_t": 4}),
    ],
)
def test_the_config_is_the_one_that_hf_peft_trains(
    method: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(method, {"targets": ["query"], **values})
    found = peft_equivalent(method, asdict(config) | {"targets": ["query"]})
    assert found.keys is not None
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[found.keys["peft_type"]]
    keys = {key: value for key, value in found.keys.items() if key != "peft_type"}
    assert kind(**keys).to_dict() == _given(method, config, monkeypatch)
    assert ("4 bits" in found.remark) is (method == "qlora")
    assert ("8 bits" in found.remark) is (method == "lora_int8")


@pytest.mark.parametrize(
    ("method", "config", "why"),
    [
        ("galore", {"rank": 4, "targets": ["query"]}, "peft has no such Method"),
        ("full", {}, "peft has no such Method"),
        ("lora", {"rank": 4, "alpha": 1.0, "targets": ["attention"]}, "peft needs the names of the layers"),
        ("lora", {"rank": 4, "alpha": 1.0}, "the Cell's config lacks targets"),
        ("dora", {"rank": 4, "alpha": 1.0, "targets": ["query"], "per": "input"}, "one magnitude per output feature"),
        ("qlora", {"rank": 4, "alpha": 1.0, "targets": ["query"], "block": 128}, "blocks of 64 weights"),
        ("lora", {"rank": 4, "alpha": 1.0, "targets": ["query"], "conv": "loralib"}, "LoRA of a convolution"),
        (
            "lora",
            {"rank": 4, "alpha": 1.0, "targets": ["query"], "lora_bias": True, "init": "gaussian"},
            "lora_bias only with its usual start",
        ),
        ("oft", {"block_size": 4, "targets": ["query"], "cayley": "exact", "terms": 5}, "turns the other way"),
        ("oft", {"block_size": 4, "targets": ["query"], "cayley": "neumann", "terms": 3}, "fewer than 4 terms"),
    ],
)
def test_without_an_equivalent_one_sentence_says_why(method: str, config: dict[str, Any], why: str) -> None:
    found = peft_equivalent(method, config)
    assert found.keys is None
    assert why in found.remark
    assert found.remark.count(".") == 2  # the end of the sentence, and adapter_config.json


@pytest.mark.parametrize(
    ("method", "quantization", "config", "twice"),
    [
        ("lora", "nf4", {}, False),
        ("lora", "nf4-dq", {}, True),
        ("qlora", "none", {}, True),
        ("qlora", "none", {"double_quant": False}, False),
    ],
)
def test_the_remark_names_the_base_that_was_trained(
    method: str, quantization: str, config: dict[str, Any], twice: bool
) -> None:
    found = peft_equivalent(method, {"rank": 4, "alpha": 1.0, "targets": ["query"], **config}, quantization)
    assert ("bnb_4bit_use_double_quant" in found.remark) is twice


def test_the_remark_on_oft_names_the_layers_that_peft_divides_otherwise() -> None:
    config = {"block_size": 32, "targets": ["query"], "cayley": "neumann", "terms": 5}
    found = peft_equivalent("oft", config)
    assert "If 32 does not divide the input features of a layer, peft takes the divisor nearest to 32" in found.remark
    assert found.keys is not None
    keys = {key: value for key, value in found.keys.items() if key != "peft_type"}
    with pytest.warns(UserWarning, match="Adjusted `oft_block_size`"):
        model = peft.get_peft_model(nn.Sequential(OrderedDict(query=nn.Linear(280, 8))), peft.OFTConfig(**keys))
    assert (model.base_model.model.query.oft_block_size["default"], block_of(280, 32)) == (35, 28)


def test_all_linear_is_a_word_of_peft_too() -> None:
    found = peft_equivalent("dora", {"rank": 4, "alpha": 1.0, "targets": ["all-linear"]})
    assert found.keys is not None
    assert found.keys["target_modules"] == "all-linear"


def test_a_config_of_the_method_peft_is_returned_as_it_is() -> None:
    keys = {"peft_type": "IA3", "target_modules": ["query"]}
    assert peft_equivalent("peft", {"adapter_config": keys}).keys == keys
