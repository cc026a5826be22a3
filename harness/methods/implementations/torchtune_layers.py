"""Layers of torchtune, and a model that has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from harness.methods.wrap import WrappedLayers
from reference.shared.layers import dense_copy, floating_dtype, replace


def adapted_layer(kind: type[Any], base: Any, config: Any) -> Any:
    """Return a layer of torchtune with the weight and the bias of `base`.

    As in torchtune's recipes, the layer is made on the meta device. kind: LoRALinear or DoRALinear. base: an nn.Linear,
    or a layer whose `packed[0]` is an NF4Tensor.
    """
    packed = getattr(base, "packed", None)
    with torch.device("meta"):
        layer = kind(
            base.in_features,
            base.out_features,
            config.rank,
            config.alpha,
            config.dropout,
            use_bias=base.bias is not None,
        )
    dtype, device = floating_dtype(base), base.weight.device
    layer.to(dtype)
    layer.to_empty(device=device)
    layer.weight = base.weight if packed is None else nn.Parameter(packed[0], requires_grad=False)
    layer.bias = base.bias
    layer._quantize_base = packed is not None
    layer.initialize_parameters()
    if hasattr(layer, "magnitude"):
        layer.initialize_dora_magnitude()
    return layer


class TorchtuneLayers(WrappedLayers):
    """A model with torchtune's layers. Tensors are `<path>.A` (R, D), `<path>.B` (E, R) and, in DoRA, `<path>.m` (E,)."""

    def __init__(self, model: nn.Module, bases: Mapping[str, Any], layers: Mapping[str, Any], config: Any) -> None:
        super().__init__(model, bases, layers, None, None)
        self.can_merge, self.config = True, config
        for tensor in self.parameters():
            tensor.requires_grad_(True)

    def tensors(self) -> dict[str, Tensor]:
        """Map `<path>.<letter of the paper>` to torchtune's own parameters."""
        found: dict[str, Tensor] = {}
        layers: dict[str, Any] = self.layers
        for path, layer in layers.items():
            found |= {f"{path}.A": layer.lora_a.weight, f"{path}.B": layer.lora_b.weight}
            if hasattr(layer, "magnitude"):
                found[f"{path}.m"] = layer.magnitude
        return found

    @torch.no_grad()
    def merge(self) -> None:
        """Replace each layer by a plain one with the weight that torchtune's `get_merged_lora_ckpt` makes.

        An NF4 weight is decoded first, as torchtune does when it saves a checkpoint.
        """
        from torchtune.modules.peft import get_merged_lora_ckpt

        for path, layer in self.layers.items():
            if self.model.get_submodule(path) is not layer:
                continue  # what is merged already stays as it is
            state = {f"layer.{name}": t.clone() for name, t in layer.state_dict().items() if name != "weight"}
            dense = dense_copy(self.bases[path])
            state["layer.weight"] = dense.weight.clone()
            merged = get_merged_lora_ckpt(state, self.config.rank, self.config.alpha)
            dense.weight.copy_(merged["layer.weight"])
            replace(self.model, path, dense)
