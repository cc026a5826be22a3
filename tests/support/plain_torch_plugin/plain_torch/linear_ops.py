"""Linear layers with adapters, as functions of their tensors."""

import torch
from torch import Tensor
from torch.nn import functional

from plain_torch.dora import ratio
from plain_torch.layers import wide
from plain_torch.nf4 import nf4_dequantize

Tensors = list[Tensor]


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the input of the adapter branch."""
    return x if mask is None else x * mask


def lora_linear(
    W: Tensor,
    A: Tensor,
    B: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """Return x W^T + bias + scaling ((x mask) A^T) B^T."""
    return functional.linear(x, W, bias) + scaling * functional.linear(functional.linear(masked(x, mask), A), B)


def gain(W: Tensor, A: Tensor, B: Tensor, m: Tensor, scaling: float) -> Tensor:
    """Return m / ||W + scaling B A|| per row, in at least float32. The norm is a constant."""
    dtype = wide(W.dtype)
    with torch.no_grad():
        V = W.to(dtype) + scaling * (B.to(dtype) @ A.to(dtype))
        norm = torch.linalg.vector_norm(V, dim=1)
    return ratio(m.to(dtype), norm)


def dora_linear(
    W: Tensor, A: Tensor, B: Tensor, m: Tensor, x: Tensor, bias: Tensor | None, mask: Tensor | None, scaling: float
) -> Tensor:
    """Return x W^T + bias + (g - 1) (x mask) W^T + g scaling ((x mask) A^T) B^T, where g is DoRA's gain."""
    g = gain(W, A, B, m, scaling)
    dropped = masked(x, mask)
    low = scaling * functional.linear(functional.linear(dropped, A), B)
    if mask is None:
        y = g.to(x.dtype) * (functional.linear(x, W) + low)
        return y if bias is None else y + bias
    return functional.linear(x, W, bias) + (g - 1).to(x.dtype) * functional.linear(dropped, W) + g.to(x.dtype) * low


def vera_linear(
    W: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor, x: Tensor, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Return x W^T + bias + b ((d ((x mask) A^T)) B^T)."""
    return functional.linear(x, W, bias) + b * functional.linear(d * functional.linear(masked(x, mask), A), B)


def nf4_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, block: int, shape: tuple[int, int], bias: Tensor | None, training: bool
) -> Tensor:
    """Return x W^T + bias, where W is decoded."""
    return functional.linear(x, nf4_dequantize(packed, absmax, block, shape, x.dtype), bias)


def nf4_lora_linear(
    packed: Tensor, absmax: Tensor, block: int, shape: tuple[int, int], x: Tensor, **adapter: object
) -> Tensor:
    """Return LoRA's linear layer with a decoded weight."""
    return lora_linear(nf4_dequantize(packed, absmax, block, shape, x.dtype), x=x, **adapter)


def adapted_layers(
    x: Tensor, Ws: Tensors, biases: list[Tensor | None] | None, As: Tensors, Bs: Tensors, scalings: list[float],
    ms: Tensors | None, layer: int,
) -> Tensor:  # fmt: skip
    """Return the output of one of several layers with LoRA, or with DoRA if there are magnitudes."""
    bias = None if biases is None else biases[layer]
    W, A, B, scaling = Ws[layer], As[layer], Bs[layer], scalings[layer]
    if ms is None:
        return lora_linear(W, A, B, x, bias, None, scaling)
    return dora_linear(W, A, B, ms[layer], x, bias, None, scaling)


def lora_qkv(x: Tensor, **layers: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of one input."""
    q, k, v = (adapted_layers(x, **layers, layer=layer) for layer in range(3))
    return q, k, v


def lora_mlp(x: Tensor, activation: str, **layers: object) -> Tensor:
    """Return down(activation(gate(x)) * up(x))."""
    gate, up = (adapted_layers(x, **layers, layer=layer) for layer in (0, 1))
    if activation == "silu":
        gate = functional.silu(gate)
    else:
        gate = functional.gelu(gate, approximate="tanh" if activation == "gelu-tanh" else "none")
    return adapted_layers(gate * up, **layers, layer=2)


def multi_lora_linear(x: Tensor, W: Tensor, As: Tensors, Bs: Tensors, scalings: list[float], ids: Tensor) -> Tensor:
    """Return x W^T plus the update of the adapter of each sequence; -1 is no adapter."""
    y = functional.linear(x, W)
    for adapter, (A, B, scaling) in enumerate(zip(As, Bs, scalings, strict=True)):
        rows = (ids == adapter).nonzero().flatten()
        if len(rows):
            update = scaling * functional.linear(functional.linear(x[rows], A), B)
            y = y.index_add(0, rows, update.to(y.dtype))
    return y


def lora_experts(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_A: Tensor, gate_up_B: Tensor,
    down_A: Tensor, down_B: Tensor, scaling: float, transposed: bool,
) -> Tensor:  # fmt: skip
    """Return for each token the weighted sum of its experts, each with LoRA on both of its weights."""
    experts = len(gate_up)
    if transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)

    def factors(A: Tensor, B: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return A.reshape(experts, -1, A.shape[1])[k], B.reshape(len(B), -1, experts)[:, :, k]

    y = torch.zeros_like(x)
    for k in range(experts):
        tokens, places = (chosen == k).nonzero(as_tuple=True)
        gate, up = lora_linear(gate_up[k], *factors(gate_up_A, gate_up_B, k), x[tokens], scaling=scaling).chunk(
            2, dim=-1
        )
        out = lora_linear(down[k], *factors(down_A, down_B, k), functional.silu(gate) * up, scaling=scaling)
        y = y.index_add(0, tokens, (weights[tokens, places][:, None] * out).to(y.dtype))
    return y
