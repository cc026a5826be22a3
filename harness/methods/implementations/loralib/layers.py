"""Replacement of a model's layers by those of loralib."""

from __future__ import annotations

from typing import Any

import loralib
import torch
from torch import nn

from harness.errors import Unsupported
from harness.methods.wrap import WrappedLayers
from reference.lora import Config
from reference.shared.layers import KINDS, kind_of, replace, targets
from reference.shared.lora_start import write_initial_factors


def attach(model: nn.Module, config: Config, generator: torch.Generator) -> LoralibLayers:
    """Replace the targets by loralib's layers, and return the adapted model.

    Raises Unsupported for configs and layers that loralib does not support.
    """
    if config.rslora:
        raise Unsupported("loralib has no rslora: its scaling is alpha / r")
    bases = targets(model, config.targets, KINDS)
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        layers = {path: _layer(path, base, config) for path, base in bases.items()}
    for path, layer in layers.items():
        if config.init != "kaiming":  # kaiming is loralib's own start; its users write any other start themselves
            if kind_of(bases[path]) not in ("linear", "Conv1D"):
                raise Unsupported(f"{path}: init={config.init} with loralib supports linear layers only")
            write_initial_factors(config.init, layer.lora_A, layer.lora_B, generator)
    for path, layer in layers.items():
        replace(model, path, layer)
    loralib.mark_only_lora_as_trainable(model)
    return LoralibLayers(model, bases, layers)


def _layer(path: str, base: Any, config: Config) -> Any:
    """Return loralib's layer with the weight and the bias of `base`. Raises Unsupported if loralib has no such layer."""
    kind = kind_of(base)
    if kind != "Conv1D" and type(base) not in (nn.Linear, nn.Embedding, nn.Conv2d):
        raise Unsupported(f"{path}: loralib has no layer that computes as {type(base).__name__} does")
    # loralib merges at every eval() by default. The harness writes A and B in eval mode too; unmerging would then subtract
    # an update that was never added. So merging is on only inside `merge` and `unmerge`.
    options = {
        "r": config.rank, "lora_alpha": config.alpha, "merge_weights": False,
        "device": base.weight.device, "dtype": base.weight.dtype,
    }  # fmt: skip
    if kind != "embedding":
        options |= {"lora_dropout": config.dropout, "bias": base.bias is not None}
    if kind == "embedding":
        shared = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        options |= {name: getattr(base, name) for name in shared}
        layer = owner = loralib.Embedding(base.num_embeddings, base.embedding_dim, **options)
    elif kind == "Conv2d":
        if config.conv != "loralib":
            raise Unsupported(f"{path}: loralib's LoRA of a convolution is conv=loralib, not conv={config.conv}")
        if base.kernel_size[0] != base.kernel_size[1]:
            raise Unsupported(f"{path}: loralib takes square kernels only, and this one is {base.kernel_size}")
        if config.dropout:
            raise Unsupported(f"{path}: loralib's Conv2d takes a dropout and ignores it")
        shared = ("stride", "padding", "dilation", "groups", "padding_mode")
        options |= {name: getattr(base, name) for name in shared}
        layer = loralib.Conv2d(base.in_channels, base.out_channels, base.kernel_size[0], **options)
        owner = layer.conv
    else:
        D, E = (base.nx, base.nf) if kind == "Conv1D" else (base.in_features, base.out_features)
        layer = owner = loralib.Linear(D, E, fan_in_fan_out=kind == "Conv1D", **options)
    owner.weight = base.weight
    if getattr(base, "bias", None) is not None:
        owner.bias = base.bias
    layer.train(base.training)  # loralib's `train` returns None
    return layer


class LoralibLayers(WrappedLayers):
    """A model with loralib's layers. Tensors are named `<path>.A` and `<path>.B`.

    Linear and Conv1D: A (R, D), B (E, R).
    Embedding: A (R, num), B (dim, R).
    Conv2d with a kernel of k x k: A (R k, in k), B (out/groups k, R k).
    """

    def __init__(self, model: nn.Module, bases: dict[str, Any], layers: dict[str, Any]) -> None:
        super().__init__(model, bases, layers, {"A": "lora_A", "B": "lora_B"}, None)
        self.can_merge = True

    def merge(self) -> None:
        """Merge into the base weight, in place, as loralib does in `eval()`."""
        self._switch(training=False)

    def unmerge(self) -> None:
        """Unmerge by subtraction, as loralib does in `train()`."""
        self._switch(training=True)

    def _switch(self, training: bool) -> None:
        layers: dict[str, Any] = self.layers
        for layer in layers.values():
            was_training, was_merging = layer.training, layer.merge_weights
            layer.merge_weights = True
            layer.train(training)
            layer.merge_weights = was_merging
            layer.train(was_training)
