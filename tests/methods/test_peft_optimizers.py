"""peft's optimizers of LoRA behind the harness's seam: they step as the references do, and other settings are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.conformance import operations
from harness.conformance.operation import Arguments, cloned
from harness.errors import Unsupported
from harness.methods.implementations import hf_peft
from support.two_layer_model import assert_same

OPERATIONS = {one.target: one for one in hf_peft.implementations() if (one.kind, one.name) == ("operation", "hf-peft")}
LAYERS = {"shape": [9, 14], "ranks": [2, 5], "weight_decay": 0.1}


def given(target: str, values: dict[str, Any]) -> Arguments:
    return operations.every()[target].arguments(torch.float64, torch.Generator().manual_seed(0), **values)


@pytest.mark.parametrize(
    ("target", "values"),
    [
        ("riemannian_lora_step", LAYERS),
        ("riemannian_lora_step", LAYERS | {"optimizer": "gd", "unused": "second", "other": "magnitude"}),
        ("loraplus_groups", {"layers": 2, "width": 5, "rank": 2, "embedding": "adapted", "head": "trained"}),
        ("loraplus_groups", {"layers": 1, "width": 5, "rank": 1, "vector": "magnitude", "norm": "layer-norm"}),
    ],
)
def test_a_step_of_peft_is_that_of_the_reference(target: str, values: dict[str, Any]) -> None:
    operation, arguments = operations.every()[target], given(target, values)
    mine = operation.named(OPERATIONS[target](**cloned(arguments)))
    assert_same(mine, operation.named(operation.reference(**cloned(arguments))))


def test_lora_fa_of_peft_scales_each_layer_by_its_own_scaling_and_keeps_a() -> None:
    operation, arguments = operations.every()["lorafa_step"], given("lorafa_step", LAYERS | {"gradient": "zero"})
    mine = operation.named(OPERATIONS["lorafa_step"](**cloned(arguments)))
    assert_same(mine, operation.named(operation.reference(**cloned(arguments))))
    arguments["gs"] = [torch.ones_like(B) for B in arguments["Bs"]]
    moved = operation.named(OPERATIONS["lorafa_step"](**cloned(arguments)))
    arguments["scalings"] = [arguments["scalings"][0], 2 * arguments["scalings"][1]]
    again = operation.named(OPERATIONS["lorafa_step"](**cloned(arguments)))
    assert_same({"A0": again["A0"], "m0": again["m0"]}, {"A0": arguments["As"][0], "m0": moved["m0"]})
    decayed = arguments["betas"][0] * arguments["ms"][1]
    assert_same({"m1": 4 * (again["m1"] - decayed)}, {"m1": moved["m1"] - decayed})


@pytest.mark.parametrize(
    ("target", "values", "says"),
    [
        ("lorafa_step", LAYERS | {"adamw": "torch"}, "AdamW of transformers"),
        ("lorafa_step", LAYERS | {"correction": "none"}, "always corrects"),
        (
            "loraplus_groups",
            {"layers": 1, "width": 5, "rank": 2, "embedding": "adapted", "vector": "lora-bias"},
            "refuses lora_bias",
        ),
    ],
)
def test_what_peft_does_not_offer_is_unsupported(target: str, values: dict[str, Any], says: str) -> None:
    with pytest.raises(Unsupported, match=says):
        OPERATIONS[target](**given(target, values))
