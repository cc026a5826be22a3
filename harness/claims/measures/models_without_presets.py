"""Measures: numbers of parameters of BART, vision transformers and single layers, which have no model preset."""

from __future__ import annotations

from functools import cache
from typing import Any

from harness.claims import attached_model
from harness.claims.measure import Config, MeasureResult, Method, Positive, measure
from harness.claims.sums import summed

Shape = dict[str, int]
"""Arguments of transformers' BartConfig: `{d_model: 768, encoder_layers: 6, ...}`."""


@measure("count")
def bart_parameters(shape: Shape, only: list[str] | None = None) -> MeasureResult:
    """Number of parameters of BART without a head. Tied parameters count once.

    only: count only parameters whose names contain one of these texts.
    """
    named = _bart(shape).named_parameters()
    count = sum(p.numel() for name, p in named if not only or any(part in name for part in only))
    return MeasureResult(count, f"{count:,} parameters on the meta device")


@measure("count")
def bart_trainable_parameters(shape: Shape, method: Method, config: Config) -> MeasureResult:
    """Number of trainable parameters of a Method attached to BART."""
    return _trainable(_bart(shape), method, config)


@measure("count")
def vision_parameters(
    width: Positive, blocks: Positive, heads: Positive, mlp: Positive, patch: Positive, pixels: Positive
) -> MeasureResult:
    """Number of parameters of a vision transformer without its head.

    width, mlp: numbers of features of a token, and inside an MLP. patch, pixels: side of a patch, and of the image, in
    pixels.
    """
    return summed(p.shape for p in _vision(width, blocks, heads, mlp, patch, pixels).parameters())


@measure("count")
def vision_trainable(
    width: Positive,
    blocks: Positive,
    heads: Positive,
    mlp: Positive,
    patch: Positive,
    pixels: Positive,
    method: Method,
    config: Config = {},
) -> MeasureResult:
    """Number of trainable parameters of a Method attached to a vision transformer, without a new head."""
    return _trainable(_vision(width, blocks, heads, mlp, patch, pixels), method, config)


@measure("count")
def linear_trainable(inputs: Positive, outputs: Positive, method: Method, config: Config = {}) -> MeasureResult:
    """Number of trainable parameters of a Method attached to a single linear layer without a bias."""
    return _trainable(_linear(inputs, outputs), method, {**config, "targets": ["layer"]})


@measure("count")
def largest_update_rank(inputs: Positive, outputs: Positive, method: Method, config: Config = {}) -> MeasureResult:
    """Rank of a Method's update of a single linear layer, with random values in all of its trainable tensors.

    Random values give the largest rank that the form of the update allows. The rank is computed in float64.
    """
    import torch

    _, update = random_update(inputs, outputs, method, config)
    return MeasureResult(int(torch.linalg.matrix_rank(update)), f"of a random update of {outputs} x {inputs}")


def random_update(inputs: int, outputs: int, method: str, config: Config) -> tuple[dict[str, Any], Any]:
    """Return a Method's tensors of a single layer by name, filled with random values, and the update (outputs, inputs).

    All are float64. The update is what merging adds to a weight of zeros.
    """
    import torch

    from harness.conformance.subject import attach_reference, configure, warm

    model = _linear(inputs, outputs).to_empty(device="cpu").double()
    torch.nn.init.zeros_(model.layer.weight)
    adapted = attach_reference(method, model, configure(method, config), ["layer"], torch.Generator().manual_seed(0))
    warm(dict(adapted.tensors()), torch.Generator().manual_seed(0))
    adapted.merge()
    tensors = {name.rpartition(".")[2]: t.detach() for name, t in adapted.tensors().items()}
    layer: Any = adapted.model.get_submodule("layer")
    return tensors, layer.weight.detach()


def _trainable(model: Any, method: str, config: Config) -> MeasureResult:
    with attached_model.attached(model, method, config) as adapted:
        return summed(p.shape for p in adapted.parameters())


def _bart(shape: Shape) -> Any:
    return _built_bart(tuple(sorted(shape.items())))


@cache
def _built_bart(shape: tuple[tuple[str, int], ...]) -> Any:
    import torch
    from transformers import BartConfig, BartModel

    with torch.device("meta"):
        return BartModel(BartConfig(**dict(shape))).requires_grad_(False)


def _vision(width: int, blocks: int, heads: int, mlp: int, patch: int, pixels: int) -> Any:
    import torch
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, intermediate_size=mlp, patch_size=patch,
        image_size=pixels,
    )  # fmt: skip
    with torch.device("meta"):
        return ViTModel(config, add_pooling_layer=False).requires_grad_(False)


def _linear(inputs: int, outputs: int) -> Any:
    from torch import nn

    model = nn.Sequential()
    model.add_module("layer", nn.Linear(inputs, outputs, bias=False, device="meta"))
    return model.requires_grad_(False)
