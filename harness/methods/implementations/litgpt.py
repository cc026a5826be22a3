"""`litgpt`: LitGPT's LoRAQKVLinear, one layer that computes q, k and v, as an Operation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.implementations.three_dimensions import in_shape_of, in_three_dimensions
from harness.methods.registry import DTYPES, Implementation, implements

if TYPE_CHECKING:
    from torch import Tensor


@implements("lora_qkv", name="litgpt", kind="operation", dtypes=DTYPES, requires=["litgpt"])
def lora_qkv(
    x: Tensor, Ws: list[Tensor], biases: list[Tensor | None] | None, As: list[Tensor], Bs: list[Tensor],
    scalings: list[float], ms: list[Tensor] | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return q, k and v, computed by one LoRAQKVLinear from their stacked tensors, as LitGPT's checkpoints store them.

    The layer has a single scaling. It gets the scaling of q, and the B of k and v are rescaled in advance. Raises
    Unsupported for DoRA, for ranks that differ, and for a scaling of q that is 0.
    """
    import torch
    from litgpt.lora import LoRAQKVLinear

    rank, (E, shared) = len(As[0]), (len(Ws[0]), len(Ws[1]))
    if ms is not None or any(len(A) != rank for A in As):
        raise Unsupported("LoRAQKVLinear has no DoRA, and only one rank for q, k and v")
    if not scalings[0]:
        raise Unsupported("the scaling of q is 0, and those of k and v must be divided by it")
    head = math.gcd(E, shared)
    heads: dict[str, Any] = {"head_size": head, "n_head": E // head, "n_query_groups": shared // head}
    with torch.device("meta"):
        layer = LoRAQKVLinear(
            x.shape[-1], E + 2 * shared, r=rank, lora_alpha=1, enable_lora=True, bias=biases is not None, **heads
        )
    layer.scaling = scalings[0]
    tensors = {
        "linear.weight": torch.cat(Ws), "lora_A": torch.cat(As),
        "lora_B": torch.cat([B * (s / scalings[0]) for B, s in zip(Bs, scalings, strict=True)]),
    }  # fmt: skip
    if biases is not None:
        rows = [W.new_zeros(len(W)) if bias is None else bias for W, bias in zip(Ws, biases, strict=True)]
        tensors["linear.bias"] = torch.cat(rows)
    y = in_shape_of(x, torch.func.functional_call(layer, tensors, (in_three_dimensions(x),)))
    return torch.split(y, [E, shared, shared], dim=-1)


def implementations() -> list[Implementation]:
    """Return the Implementations of this file."""
    return [lora_qkv]
