"""peft's LoRA with several adapters in one batch, selected by `adapter_names` in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.registry import DTYPES, implements

if TYPE_CHECKING:
    from torch import Tensor
_NONE = "__base__"
"""Name in `adapter_names` with which peft uses no adapter for a sequence."""


@implements("multi_lora_linear", name="hf-peft", kind="operation", dtypes=DTYPES, requires=["peft"])
def multi_lora_linear(
    x: Tensor, W: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], scalings: Sequence[float], ids: Tensor
) -> Any:
    """Run one of peft's LoRA layers with several adapters on a batch, and return the output.

    ids: index of one adapter per sequence, or -1 for none. Adapters in 16 bits are cast to float32, as peft casts them
    on loading. Raises Unsupported without any adapter, because peft then has no model.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    if not As:
        raise Unsupported("peft has no model without an adapter")
    E, D = W.shape
    base = nn.Sequential(nn.Linear(D, E, bias=False, device=W.device, dtype=W.dtype))
    model: Any = None
    tensors = {"base_layer.weight": W}
    for name, (A, B, scaling) in enumerate(zip(As, Bs, scalings, strict=True)):
        config = LoraConfig(r=len(A), lora_alpha=scaling * len(A), target_modules=["0"])
        if model is None:
            model = get_peft_model(base, config, adapter_name=str(name))
        else:
            model.add_adapter(str(name), config)
        for letter, tensor in (("A", A), ("B", B)):
            wide = torch.promote_types(tensor.dtype, torch.float32)
            tensors[f"lora_{letter}.{name}.weight"] = tensor.to(wide)
    names = [_NONE if i < 0 else str(i) for i in ids.tolist()]
    # The layer runs on the given tensors themselves, so that gradients reach them.
    return torch.func.functional_call(base[0], tensors, (x,), {"adapter_names": names})
