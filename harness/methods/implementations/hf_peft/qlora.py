"""peft's LoRA over bitsandbytes' Linear4bit, as made by transformers' `load_in_4bit` and a LoraConfig."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.implementations.bitsandbytes.weights import packed_layer
from harness.methods.implementations.hf_peft.adapted import PeftAdapted, tuner
from harness.methods.implementations.hf_peft.lora import lora_config, lora_tensors
from harness.methods.registry import implements

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from reference.qlora import Config


@implements("qlora", name="hf-peft", requires=["peft", "bitsandbytes"], offers=["lora_bias", "experts"])
def qlora(model: nn.Module, config: Config, generator: Generator) -> PeftAdapted:
    """Quantise linear layers to NF4 and attach peft's LoRA. bitsandbytes has no kernels for float64.

    The original layers stay available for `detach`; a Cell offloads their weights while it trains. Raises Unsupported for
    stacked experts.
    """
    from reference.qlora import KINDS
    from reference.shared.layers import kind_of, replace, targets

    bases = targets(model, config.targets, KINDS)
    for path, base in bases.items():
        if kind_of(base) == "experts":
            why = (
                "peft's LoRA over experts that bitsandbytes has packed gives one of both projections no gradient, and its "
                "second call raises (seen in peft 0.21.2; suites/parity/defects/peft_experts_4bit.py shows it)"
            )
            raise Unsupported(f"{path}: {why}")
    for path, base in bases.items():
        replace(model, path, packed_layer(base, base.weight.dtype, config.double_quant, config.block))
    tuner(model, lora_config(config, bases), generator)
    return PeftQLora(model, bases)


def _packed_tensors(layer: Any) -> dict[str, Tensor]:
    """Map `codes` and `absmax` to the tensors of bitsandbytes. Double quantisation adds `absmax2` and `offset`."""
    weight = layer.base_layer.weight
    quantised = weight.quant_state
    tensors = {"codes": weight.data.flatten(), "absmax": quantised.absmax}
    return tensors | ({"absmax2": quantised.state2.absmax, "offset": quantised.offset} if quantised.nested else {})


class PeftQLora(PeftAdapted):
    """A model with peft's LoRA layers over 4-bit weights."""

    def __init__(self, model: nn.Module, originals: dict[str, Any]) -> None:
        super().__init__(model, lora_tensors, _packed_tensors)
        self.originals = originals

    def bases(self) -> dict[str, nn.Module]:
        """Map the paths of the adapted layers to the original layers."""
        return self.originals
