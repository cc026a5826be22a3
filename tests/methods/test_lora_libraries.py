"""hf-peft and loralib beside the reference: LoRA on every kind of layer that they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.conformance.subject import load, warm
from harness.methods.implementations import loralib
from harness.methods.implementations.hf_peft import lora as hf_peft
from reference import lora
from support.lora_layers import (
    CASES,
    GEOMETRIES,
    MADE,
    attached,
    config,
    model,
    run,
    sample,
    warmed,
)
from support.two_layer_model import assert_same, generator


def assert_same_as_reference(name: str, attach: Callable[..., Any], dtype: str, **keys: Any) -> None:
    """Judge a library's layer: output and gradients, from the same random state, as the float64 reference has them."""
    theirs, x = warmed(name, dtype, attach, **keys), sample(name, dtype)
    truth = lora.attach(model(name, dtype).double(), config(**keys), generator())
    rounded = attached(name, dtype, **keys)
    for mine in (truth, rounded):
        load(mine, theirs.tensors())
    want = run(truth, x.double() if x.is_floating_point() else x)
    torch.manual_seed(1)
    judged = noise_floor(run(theirs, x), want, run(rounded, x), dtype)
    assert judged.passed, judged
    assert {n: t.shape for n, t in theirs.tensors().items()} == {n: t.shape for n, t in rounded.tensors().items()}


# HF peft builds A without the base's dilation and padding mode; where there are any it is wrong, and is not asked here.
PEFTS = [(n, d) for n, d in CASES if not {"dilation", "padding_mode"} & GEOMETRIES.get(n, {}).keys()]


@pytest.mark.parametrize(("name", "dtype"), [*PEFTS, ("groups", "bfloat16")])
def test_hf_peft_computes_the_same(name: str, dtype: str) -> None:
    assert_same_as_reference(name, hf_peft.lora, dtype, rslora=dtype == "float64")


@pytest.mark.parametrize(("name", "dtype"), [(n, d) for n, d in CASES if n != "scaled"])
def test_loralib_computes_the_same(name: str, dtype: str) -> None:
    pytest.importorskip("loralib", reason="the extra `loralib` is not installed")
    assert_same_as_reference(name, loralib.lora, dtype, conv="loralib")


@pytest.mark.parametrize("name", ["linear", "Conv1D", "embedding", "everything"])
def test_loralib_merges_and_unmerges(name: str) -> None:
    pytest.importorskip("loralib", reason="the extra `loralib` is not installed")
    adapted, x = warmed(name, attach=loralib.lora, conv="loralib"), sample(name)
    before, weight = adapted.model(x), adapted.bases["layer"].weight.clone()
    adapted.model.eval()
    assert torch.equal(adapted.bases["layer"].weight, weight)  # no merge behind our back
    adapted.merge()
    adapted.merge()
    assert_same({"y": adapted.model(x)}, {"y": before.detach()})
    assert not torch.equal(adapted.bases["layer"].weight, weight)
    adapted.model.train().eval()
    adapted.unmerge()
    adapted.unmerge()
    assert_same({"W": adapted.bases["layer"].weight}, {"W": weight})
    adapted.detach()
    assert type(adapted.model.layer) is type(MADE[name]())
    assert_same(adapted.model.state_dict(), model(name).state_dict())


@pytest.mark.parametrize("name", ["linear", "Conv1D", "embedding", "everything"])
def test_loralib_merging_changes_the_weight_with_the_mode(name: str) -> None:
    pytest.importorskip("loralib", reason="the extra `loralib` is not installed")
    adapted = attached(name, attach=loralib.merging, conv="loralib")
    weight = adapted.bases["layer"].weight
    W, x = weight.clone(), sample(name)
    adapted.model.train()
    warm(adapted.tensors(), generator(6))
    y = adapted.model(x).detach()
    adapted.model.eval()
    assert not torch.equal(weight, W)
    assert_same({"y": adapted.model(x).detach()}, {"y": y})
    adapted.model.train()
    assert_same({"W": weight}, {"W": W})


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("linear", {"rslora": True}, "^loralib has no rslora"),
        ("plain", {}, "^layer: loralib's LoRA of a convolution is conv=loralib, not conv=peft$"),
        ("scaled", {}, "^layer: loralib has no layer that computes as Scaled does$"),
    ],
)
def test_loralib_reports_unsupported_configs(name: str, keys: dict[str, Any], says: str) -> None:
    pytest.importorskip("loralib", reason="the extra `loralib` is not installed")
    with pytest.raises(NotImplementedError, match=says):
        attached(name, attach=loralib.lora, **keys)


def test_hf_peft_reports_unsupported_configs() -> None:
    with pytest.raises(
        NotImplementedError, match=r"^layer: peft's LoRA of a convolution is conv=peft, not conv=loralib$"
    ):
        attached("plain", attach=hf_peft.lora, conv="loralib")
    attached("linear", attach=hf_peft.lora, conv="loralib")


@pytest.mark.parametrize("name", ["linear", "Conv1D", "plain"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_every_implementation_drops_the_same_features_from_the_same_seed(name: str, dtype: str) -> None:
    mine = warmed(name, dtype, dropout=0.3)
    theirs = {"hf-peft": attached(name, dtype, hf_peft.lora, dropout=0.3)}
    if name != "plain":  # loralib drops nothing before a convolution
        pytest.importorskip("loralib", reason="the extra `loralib` is not installed")
        theirs["loralib"] = attached(name, dtype, loralib.lora, dropout=0.3)
    x, truth = sample(name, dtype), lora.attach(model(name, dtype).double(), config(dropout=0.3), generator())
    load(truth, mine.tensors())

    def run_from_the_seed(adapted: Any, x: Any) -> dict[str, Any]:
        torch.manual_seed(11)
        return {"y": adapted.model.train()(x).detach()}

    want, rounded = run_from_the_seed(truth, x.double()), run_from_the_seed(mine, x)
    for other in theirs.values():
        load(other, mine.tensors())
        judged = noise_floor(run_from_the_seed(other, x), want, rounded, dtype)
        assert judged.passed, judged
