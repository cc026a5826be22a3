"""peft's LoRA with several adapters in one batch, selected by `adapter_names` in the forward pass."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.registry import DTYPES, implements

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_NONE = "__base__"
"""Name in `adapter_names` with which peft uses no adapter for a sequence."""
_made = threading.local()
"""The last layer that this thread has made. peft takes seconds to make one with hundreds of adapters."""


@implements("multi_lora_linear", name="hf-peft", kind="operation", dtypes=DTYPES, requires=["peft"])
def multi_lora_linear(
    x: Tensor, W: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], scalings: Sequence[float], ids: Tensor
) -> Any:
    """Run one of peft's LoRA layers with several adapters on a batch, and return the output.

    ids: index of one adapter per sequence, or -1 for none. Adapters in 16 bits are cast to float32, as peft casts them
    on loading. Raises Unsupported without any adapter, because peft then has no model.
    """
    import torch

    if not As:
        raise Unsupported("peft has no model without an adapter")
    wanted = W.shape, W.device, W.dtype, tuple((len(A), scaling) for A, scaling in zip(As, scalings, strict=True))
    if getattr(_made, "wanted", None) != wanted:
        _made.wanted, _made.layer = wanted, _layer(*wanted)
    tensors = {"base_layer.weight": W}
    for name, pair in enumerate(zip(As, Bs, strict=True)):
        for letter, tensor in zip("AB", pair, strict=True):
            wide = torch.promote_types(tensor.dtype, torch.float32)
            tensors[f"lora_{letter}.{name}.weight"] = tensor.to(wide)
    names = [_NONE if i < 0 else str(i) for i in ids.tolist()]
    # The layer runs on the given tensors themselves, so that gradients reach them.
    return torch.func.functional_call(_made.layer, tensors, (x,), {"adapter_names": names})


def _layer(
    shape: Sequence[int], device: torch.device, dtype: torch.dtype, adapters: Sequence[tuple[int, float]]
) -> nn.Module:
    """Return one of peft's LoRA layers over a linear layer of `shape` (E, D), with an adapter per (rank, scaling)."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    base = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=dtype))
    model: Any = None
    for name, (rank, scaling) in enumerate(adapters):
        config = LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=["0"])
        if model is None:
            model = get_peft_model(base, config, adapter_name=str(name))
        else:
            model.add_adapter(str(name), config)
    return base[0]
