"""DoRA on embeddings and convolutions: each is a linear layer on other inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import dora
from support.two_layer_model import assert_same

SETTINGS: dict[str, Any] = {"rank": 3, "alpha": 8.0, "targets": ("layer",)}


def adapted(layer: nn.Module, **settings: Any) -> Any:
    """Return the Adapted of a float64 model with this one layer, whose trained tensors have random values."""
    model = nn.Sequential()
    model.add_module("layer", layer.double())
    made = dora.attach(model, dora.Config(**{**SETTINGS, **settings}), torch.Generator().manual_seed(1))
    values = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in made.tensors().values():
            tensor += torch.randn(tensor.shape, generator=values, dtype=torch.float64) / 4
    return made


def linear_twin(made: Any, W: Tensor, bias: Tensor | None, **settings: Any) -> Any:
    """Return a linear layer with the matrix W (E, D), adapted with the tensors of `made`, reshaped."""
    base = nn.Linear(W.shape[1], W.shape[0], bias=bias is not None)
    twin = adapted(base, **settings)
    with torch.no_grad():
        base.weight.copy_(W)
        if bias is not None:
            base.bias.copy_(bias)
        for name, tensor in twin.tensors().items():
            tensor.copy_(made.tensors()[name].reshape(tensor.shape))
    return twin


def run(made: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradients of the trained tensors for the output's gradient `dy`, all as matrices."""
    y = made.model(x)
    gradients = torch.autograd.grad(y, list(made.tensors().values()), dy)
    return {"y": y.detach(), **dict(zip(made.tensors(), gradients, strict=True))}


@pytest.mark.parametrize("detach_norm", [True, False])
def test_an_embedding_is_a_linear_layer_on_one_hot_rows(detach_norm: bool) -> None:
    ids = torch.tensor([4, 0, 4, 7])
    made = adapted(nn.Embedding(9, 6), detach_norm=detach_norm)
    twin = linear_twin(made, made.layers["layer"].base.weight.T, None, detach_norm=detach_norm)
    dy = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert_same(run(made, ids, dy), run(twin, nn.functional.one_hot(ids, 9).double(), dy))
    made.merge()
    twin.merge()
    assert_same({"W": made.model.layer.weight.data.T}, {"W": twin.model.layer.weight.data})


@pytest.mark.parametrize("options", [{}, {"padding": 1, "stride": 2}, {"padding": 2, "dilation": 2}], ids=str)
@pytest.mark.parametrize("detach_norm", [True, False])
def test_a_convolution_is_a_linear_layer_on_patches(options: dict[str, int], detach_norm: bool) -> None:
    base = nn.Conv2d(2, 5, 3, **options)
    made = adapted(base, detach_norm=detach_norm)
    twin = linear_twin(made, base.weight.flatten(1), base.bias, detach_norm=detach_norm)
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    patches = nn.functional.unfold(x, 3, **options).transpose(1, 2)
    dy = torch.randn(2, patches.shape[1], 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    side = int(patches.shape[1] ** 0.5)
    have, want = run(made, x, dy.transpose(1, 2).reshape(2, 5, side, side)), run(twin, patches, dy)
    want["y"] = want["y"].transpose(1, 2)
    assert_same({name: tensor.reshape(want[name].shape) for name, tensor in have.items()}, want)
    made.merge()
    twin.merge()
    assert_same({"W": made.model.layer.weight.data.flatten(1)}, {"W": twin.model.layer.weight.data})


def test_the_entry_at_padding_idx_gets_a_gradient_through_the_norm_alone() -> None:
    for detach_norm in (True, False):
        made = adapted(nn.Embedding(9, 6, padding_idx=4), detach_norm=detach_norm)
        with torch.no_grad():
            made.layers["layer"].base.weight[4] = 1.0
        made.model(torch.tensor([4, 0, 4, 7])).square().sum().backward()
        assert bool(made.tensors()["layer.A"].grad[:, 4].any()) is not detach_norm


def test_an_image_without_a_batch_dimension_gives_what_nn_conv2d_gives() -> None:
    made = adapted(nn.Conv2d(2, 5, 3, padding=1, padding_mode="reflect"))
    images = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    want, one = made.model(images).detach(), made.model(images[0]).detach()
    assert_same({"y": one}, {"y": want[0]})
    made.merge()
    assert_same({"y": made.model(images[0])}, {"y": one})


@pytest.mark.parametrize(
    ("layer", "settings", "message"),
    [
        (nn.Embedding(9, 6), {"per": "input"}, "layer: per=input is defined for linear layers, not for Embedding"),
        (nn.Conv2d(4, 6, 3), {"per": "input"}, "layer: per=input is defined for linear layers, not for Conv2d"),
        (nn.Conv2d(4, 6, 3, groups=2), {}, "layer: a convolution with 2 groups has no DoRA"),
    ],
)
def test_what_has_no_dora_is_refused_and_left_unchanged(
    layer: nn.Module, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        adapted(layer, **settings)
    assert all(parameter.requires_grad for parameter in layer.parameters())
