"""`offers`: an implementation gets a setting that came after it only if it names this setting."""

from __future__ import annotations

from typing import Any

import pytest

import harness
from harness.conformance import parity_suite
from harness.conformance.execution import suite_run
from harness.conformance.findings.outcomes import CheckStatus, Execution
from harness.conformance.subject import configure
from harness.errors import Unsupported
from harness.methods.registry import discover
from harness.methods.spec import methods
from reference import lora
from support.two_layer_model import Two, generator

NAMES = ("reference", "fused", "hf-peft")
SHAPE = parity_suite.CaseShape.model_validate({"tokens": 3, "in": 16, "out": 8})


def ignores_the_bias(model: Any, config: Any, generator: Any) -> Any:
    """Attach as a plug-in does that was written before `lora_bias` existed."""
    return lora.attach(model, lora.Config(rank=config.rank, alpha=config.alpha, targets=config.targets), generator)


def outcomes(implementation: harness.Implementation, **config: Any) -> list[Any]:
    case = parity_suite.MethodCase({"rank": 3, "alpha": 8.0, **config}, "linear", SHAPE, "float32", sampled=True)
    return list(suite_run.run_case(implementation, parity_suite.load_plan("lora"), case))


def test_a_plugin_that_ignores_the_setting_is_unsupported_and_does_not_fail() -> None:
    old = harness.implements("lora", name="old")(ignores_the_bias)
    assert {one.status for one in outcomes(old)} == {CheckStatus.PASS, CheckStatus.SKIPPED}
    (refused,) = outcomes(old, lora_bias=True)
    assert refused.execution is Execution.UNSUPPORTED
    assert refused.result.detail == "unsupported: old does not offer lora_bias of lora"


def test_a_plugin_that_offers_what_it_ignores_fails() -> None:
    liar = harness.implements("lora", name="liar", offers=["lora_bias"])(ignores_the_bias)
    failed = {one.result.check for one in outcomes(liar, lora_bias=True) if one.status is CheckStatus.FAIL}
    assert "lora/parameters/float32/warm" in failed


@pytest.mark.parametrize(
    ("method", "layer", "kind"),
    [
        ("qlora", "experts", "experts"),
        ("lora", "nn-conv1d", "nn.Conv1d"),
        ("dora", "conv3d", "Conv3d"),
        ("adalora", "conv2d-dilated", "Conv2d"),
    ],
)
def test_a_plugin_from_before_a_kind_of_layer_does_not_get_it(method: str, layer: Any, kind: str) -> None:
    def linear_only(model: Any, config: Any, generator: Any) -> Any:
        raise AssertionError("it was called")

    old = harness.implements(method, name="old")(linear_only)
    case = parity_suite.MethodCase({"alpha": 8.0}, layer, SHAPE, "float32")
    (refused,) = suite_run.run_case(old, parity_suite.load_plan(method), case)
    assert refused.execution is Execution.UNSUPPORTED
    assert refused.result.detail == f"unsupported: first: old does not offer {kind} for {method}"


@pytest.mark.parametrize("name", ["loralib", "torchtune", "axolotl"])
def test_a_cell_of_an_implementation_without_it_is_skipped_with_the_reason(name: str) -> None:
    implementation = discover().find("method", "lora", name)
    with pytest.raises(Unsupported, match=f"^{name} does not offer lora_bias of lora$"):
        implementation(Two(), configure("lora", {"rank": 2, "targets": ["q_proj"], "lora_bias": True}), generator())


def test_those_that_have_it_are_listed_with_it() -> None:
    offered = {(i.target, i.name): i.offers for i in discover().implementations if i.kind == "method" and i.offers}
    convolutions = ("nn.Conv1d", "Conv3d")
    common = {"lora": ("lora_bias",), "qlora": ("lora_bias", "experts"), "adalora": ("Conv2d",)}
    expected = {(method, name): features for method, features in common.items() for name in NAMES}
    for name in ("reference", "hf-peft"):
        expected |= {("lora", name): ("lora_bias", *convolutions), ("dora", name): convolutions}
    assert offered == expected


def test_the_setting_is_in_the_cell_only_if_it_is_on() -> None:
    field = methods()["lora"].fields["lora_bias"]
    assert (field.canonical(False), field.canonical(True)) == (None, True)
