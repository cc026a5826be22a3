"""peft's batch of mixed adapters: `adapter_names` in the forward pass."""

from __future__ import annotations

from typing import Any

from harness.methods.implementations.hf_peft.adapted import DTYPES
from harness.methods.registry import implements

_NONE = "__base__"
"""peft's name for no adapter."""


@implements("multi_lora_linear", name="hf-peft", kind="operation", dtypes=DTYPES, requires=["peft"])
def multi_lora_linear(x: Any, W: Any, As: Any, Bs: Any, scalings: Any, ids: Any) -> Any:
    """Run a layer of peft's that has all these adapters, on a batch whose sequences each name theirs.

    As peft does when it loads adapters, those in 16 bits are cast to float32.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

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
    # The tensors themselves, so that gradients reach them.
    return torch.func.functional_call(base[0], tensors, (x,), {"adapter_names": names})
