"""torchtune, Axolotl, Unsloth and litgpt, each in its own environment; here only what needs more than one library.

CI does not install them: torchtune needs an older torchao than the tests, Axolotl and Unsloth pin other releases of torch
and peft, and Unsloth patches them. `peft-harness env create NAME && peft-harness check NAME` judges them.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from harness.conformance.comparison.functional_layer import dense_linear
from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.conformance.execution import suite_run
from harness.conformance.subject import load, warm
from harness.methods.implementations import axolotl, gated_activations, litgpt, torchao, torchtune, unsloth
from harness.methods.implementations.three_dimensions import in_shape_of, in_three_dimensions
from harness.methods.registry import Implementation
from reference import dora, lora
from support.two_layer_model import assert_same, draw, generator


def needs(library: str) -> pytest.MarkDecorator:
    """Skip where a library is not installed, and name the command that runs the test with it."""
    command = f"peft-harness env create {library}; then run this file with the Python of that environment"
    return pytest.mark.skipif(find_spec(library) is None, reason=f"CI does not install {library}: {command}")


def functions(*modules: Any) -> list[Implementation]:
    return [one for module in modules for one in module.implementations()]


def test_every_function_says_what_it_needs_and_where_it_runs() -> None:
    offered = {(one.name, one.target): one for one in functions(torchtune, axolotl, unsloth, litgpt)}
    assert {target for name, target in offered if name == "axolotl"} == {
        "lora_linear", "dora_linear", "lora_qkv", "lora_mlp", "lora", "dora", "qlora",
    }  # fmt: skip
    assert {target for name, target in offered if name == "torchtune"} == {"lora", "dora", "nf4-dq"}
    assert all(one.requires for one in offered.values())
    on_gpu_only = {key for key, one in offered.items() if "cpu" not in one.devices}
    assert on_gpu_only == {("axolotl", "qlora"), ("unsloth", "nf4_dequantize")}


@pytest.mark.parametrize(("module", "name"), [("swiglu", "forward"), ("geglu", "exact"), ("geglu", "approx")])
@pytest.mark.parametrize("up_first", [False, True])
def test_on_a_cpu_torch_computes_the_activation_and_its_gradients(module: str, name: str, up_first: bool) -> None:
    gate, up, dh = torch.randn(3, 2, 5, 7, dtype=torch.float64, generator=generator()).unbind()
    leaves = [t.clone().requires_grad_(True) for t in (gate, up)]
    forward, backward = gated_activations.activation_functions(f"any.{module}", name, "", gate, up_first=up_first)
    wanted = forward(*leaves)
    wanted.backward(dh)
    with torch.no_grad():
        h, *gradients = backward(dh, gate, up)
    own = [leaf.grad for leaf in leaves]
    mine = dict(zip("hgu", (h, *(reversed(gradients) if up_first else gradients)), strict=True))
    assert_same(mine, dict(zip("hgu", (wanted.detach(), *own), strict=True)))


def test_on_a_cpu_the_activation_refuses_a_gradient_of_a_gradient_as_the_library_does() -> None:
    dh, gate, up = torch.randn(3, 2, 5, generator=generator()).unbind()
    backward = gated_activations.activation_functions("any.swiglu", "forward", "", gate)[1]
    with pytest.raises(
        RuntimeError, match="records no graph"
    ):  # backward passes with create_graph=True enable gradients
        backward(dh, gate, up)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4)])
def test_an_input_of_any_shape_goes_through_three_dimensions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    X = in_three_dimensions(x)
    assert X.dim() == 3
    assert torch.equal(in_shape_of(x, X), x)


@needs("torchtune")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_torchtune_over_nf4_computes_and_merges_with_the_decoded_weight(method: str) -> None:
    reference = {"lora": lora, "dora": dora}[method]
    model, config = nn.Sequential(nn.Linear(256, 128, bias=False)), reference.Config(4, 8.0, ("0",))
    torchao.nf4_dq(model, ["0"], torch.float32)
    adapted = getattr(torchtune, method)(model, config, generator())
    warm(adapted.tensors(), generator(1))
    x, W = draw(5, 256, dtype=torch.float32), linear(torch.eye(256), adapted.bases["0"].packed[0]).T.detach()

    def expected(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        dense = nn.Sequential(dense_linear(W.to(dtype), None))
        load(reference.attach(dense, config, generator()), adapted.tensors())
        return {"y": dense(x.to(dtype)).detach()}

    truth, rounded = expected(torch.float64), expected(torch.float32)
    assert noise_floor({"y": model(x).detach()}, truth, rounded, "float32").passed
    adapted.merge()
    assert noise_floor({"y": model(x).detach()}, truth, rounded, "float32").passed


@needs("axolotl")
def test_the_check_trajectory_finds_that_axolotl_keeps_an_old_norm() -> None:
    found = suite_run.run(axolotl.dora, dtypes=("float32",))
    assert {one.result.outcome.value for one in found if one.check == "trajectory"} == {"fail"}
    assert {one.result.outcome.value for one in found if one.check == "step"} == {"pass"}
