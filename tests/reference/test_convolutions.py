"""LoRA, DoRA and AdaLoRA of convolutions: each is a convolution whose kernel is the base's
kernel changed by the Method's formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.conformance.subject import attach_reference, configure, warm
from support.two_layer_model import assert_same, draw, generator

LAYERS = {
    "nn.Conv1d": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"),
    "Conv2d": lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
    "Conv3d": lambda: nn.Conv3d(4, 6, (3, 2, 1), stride=(2, 1, 1), padding=(1, 0, 2), bias=False),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "alpha": 6.0},
    "dora": {"rank": 3, "alpha": 6.0, "detach_norm": False},
    "adalora": {"rank": 3, "target_rank": 2, "alpha": 6.0},
}
CASES = [("lora", kind) for kind in LAYERS] + [("dora", kind) for kind in LAYERS] + [("adalora", "Conv2d")]


def adapted(method: str, layer: nn.Module) -> Any:
    config = configure(method, CONFIGS[method])
    made = attach_reference(method, nn.Sequential(layer.double()), config, ["0"], generator(5))
    warm(made.tensors(), generator(6))
    return made


def kernel(method: str, base: Any, tensors: dict[str, Tensor]) -> Tensor:
    """Return the kernel that the Method's paper gives, by matrices (E, C K) whose rows are the kernels of the outputs."""
    A, B, W = tensors["0.A"].flatten(1), tensors["0.B"].flatten(1), base.weight.detach().flatten(1)
    if method == "adalora":
        return (W + 6 / (3 + 1e-5) * B @ torch.diag(tensors["0.E"][:, 0]) @ A).view(base.weight.shape)
    V = W + 2 * B @ A
    if method == "dora":
        V = V * (tensors["0.m"].flatten() / V.square().sum(1).sqrt())[:, None]
    return V.view(base.weight.shape)


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_output_gradients_and_merged_kernel_are_those_of_the_formula(method: str, kind: str) -> None:
    base: Any = LAYERS[kind]()
    made = adapted(method, base)
    named = made.tensors()
    x = draw(2, 4, *[7] * len(base.kernel_size))
    y = made.model(x)
    dy = draw(*y.shape, seed=2)
    have = {"y": y.detach(), **dict(zip(named, torch.autograd.grad(y, list(named.values()), dy), strict=True))}
    W = kernel(method, base, named)
    want = torch.func.functional_call(base, {"weight": W}, x)
    gradients = torch.autograd.grad(want, list(named.values()), dy)
    assert_same(have, {"y": want.detach(), **dict(zip(named, gradients, strict=True))})
    assert_same({"one": made.model(x[0]).detach()}, {"one": want[0].detach()})  # no dimension for a batch
    made.merge()
    assert type(made.model[0]) is type(base)
    assert_same({"W": made.model[0].weight.data}, {"W": W.detach()})
    made.unmerge()
    assert torch.equal(made.model(x), y)


def test_adalora_of_a_convolution_with_groups_changes_the_kernel_of_each_group() -> None:
    base = nn.Conv2d(4, 6, 3, groups=2)
    made = adapted("adalora", base)
    assert made.tensors()["0.A"].shape == (3, 2 * 9)
    x = draw(2, 4, 7, 7)
    want = torch.func.functional_call(base, {"weight": kernel("adalora", base, made.tensors())}, x)
    assert_same({"y": made.model(x).detach()}, {"y": want.detach()})


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("adalora", {}, "0 is a Conv3d, which this method does not support"),
        ("pissa", {}, "0 is a Conv3d, which this method does not support"),
        ("lora", {"conv": "loralib"}, "0: conv=loralib is defined for square kernels, and this one is 3 x 3 x 3"),
        ("dora", {"per": "input"}, "0: per=input is defined for linear layers, not for Conv3d"),
    ],
)
def test_what_a_conv3d_lacks_is_refused(method: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        attach_reference(method, nn.Sequential(nn.Conv3d(4, 6, 3)), configure(method, values), ["0"], generator())
