"""peft's LoRA over bitsandbytes' Linear4bit, as made by transformers' `load_in_4bit` and a LoraConfig."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.methods.implementations.hf_peft.adapted import PeftAdapted, tuner
from harness.methods.implementations.hf_peft.lora import lora_tensors
from harness.methods.registry import implements

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from reference.qlora import Config


# bitsandbytes has no kernels for float64.
@implements("qlora", name="hf-peft", dtypes=("float32", "bfloat16", "float16"), requires=["peft", "bitsandbytes"])
def qlora(model: nn.Module, config: Config, generator: Generator) -> PeftAdapted:
    """Quantise linear layers to NF4 and attach peft's LoRA.

    The original layers stay available for `detach`; a Cell offloads their weights while it trains.
    """
    from peft import LoraConfig

    from reference.shared.layers import replace, targets

    bases = targets(model, config.targets)
    for path, base in bases.items():
        replace(model, path, _packed(base, config))
    peft_config = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(bases)
    )
    tuner(model, peft_config, generator)
    return PeftQLora(model, bases)


def _packed(dense: nn.Linear, config: Config) -> Any:
    """Return bitsandbytes' 4-bit layer for `dense`; it multiplies in the dtype of the original weight."""
    import bitsandbytes
    import torch

    weight = dense.weight.detach()
    options = {"compress_statistics": config.double_quant, "quant_type": "nf4"}
    packed: Any = bitsandbytes.nn.Linear4bit(
        dense.in_features, dense.out_features, dense.bias is not None, weight.dtype, device="meta", **options
    )
    packed.weight = bitsandbytes.nn.Params4bit(
        weight.contiguous(), requires_grad=False, blocksize=config.block, module=packed, **options
    ).to(weight.device)
    if dense.bias is not None:
        packed.bias = torch.nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
    # See `harness/methods/implementations/bitsandbytes/weights.py`.
    packed.support_avx512bf16_for_cpu = False
    return packed.train(dense.training)


def _packed_tensors(layer: Any) -> dict[str, Tensor]:
    """Map the reference's names to bitsandbytes' tensors: two, or four with double quantisation."""
    weight = layer.base_layer.weight
    quantised = weight.quant_state
    found = {"codes": weight.data.flatten(), "absmax": quantised.absmax}
    return found | ({"absmax2": quantised.state2.absmax, "offset": quantised.offset} if quantised.nested else {})


class PeftQLora(PeftAdapted):
    """A model with peft's LoRA layers over 4-bit weights."""

    def __init__(self, model: nn.Module, bases: dict[str, Any]) -> None:
        super().__init__(model, lora_tensors, _packed_tensors)
        self.bases = bases

    def detach(self) -> None:
        """Restore the original layers."""
        from reference.shared.layers import replace

        super().detach()
        for path, base in self.bases.items():
            replace(self.model, path, base)
