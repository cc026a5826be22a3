"""peft's LoRA over bitsandbytes' Linear8bitLt, as made by transformers' `load_in_8bit` and a LoraConfig."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.implementations.bitsandbytes.weights import eight_bit_layer
from harness.methods.implementations.hf_peft.adapted import PeftAdapted, tuner
from harness.methods.implementations.hf_peft.lora import lora_config, lora_tensors
from harness.methods.registry import implements

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from reference.lora_int8 import Config


@implements("lora_int8", name="hf-peft", requires=["peft", "bitsandbytes"])
def lora_int8(model: nn.Module, config: Config, generator: Generator) -> PeftLoraInt8:
    """Quantise linear layers to 8 bits and attach peft's LoRA. bitsandbytes scales the products of codes in float32.

    The original layers stay available for `detach`. Raises Unsupported on a GPU, where bitsandbytes quantises the input
    in training too.
    """
    from reference.shared.layers import replace, targets

    bases = targets(model, config.targets)
    for path, base in bases.items():
        if base.weight.device.type == "cuda":
            raise Unsupported(f"{path}: bitsandbytes' CUDA kernels quantise the input in training too")
    for path, base in bases.items():
        replace(model, path, eight_bit_layer(base, config.threshold))
    tuner(model, lora_config(config, bases), generator)
    return PeftLoraInt8(model, bases)


def _packed_tensors(layer: Any) -> dict[str, Tensor]:
    """Map `codes` and `absmax` to the tensors of bitsandbytes. The first call of a layer moves absmax to its `state`."""
    base = layer.base_layer
    return {"codes": base.weight.data, "absmax": base.state.SCB if base.weight.SCB is None else base.weight.SCB}


class PeftLoraInt8(PeftAdapted):
    """A model with peft's LoRA layers over 8-bit weights."""

    def __init__(self, model: nn.Module, originals: dict[str, Any]) -> None:
        super().__init__(model, lora_tensors, _packed_tensors)
        self.originals = originals

    def bases(self) -> dict[str, nn.Module]:
        """Map the paths of the adapted layers to the original layers."""
        return self.originals
