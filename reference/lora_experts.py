"""LoRA on stacked experts: one update for each expert of a mixture-of-experts block. A part of `lora` and `qlora`.

    W'_k = W_k + (alpha / r) B_k A_k          for every expert k            (LoRA, arXiv:2106.09685, eq. 3)

transformers keeps the experts of a block in one module, whose parameters stack the matrices of all experts:
`gate_up_proj`, where the rows of the gate come before those of up, and `down_proj`. Models without a gate have `up_proj`
instead. The router is outside of this module and does not change. A parameter is (K, E, D), or (K, D, E) if the module
has `is_transposed`.

A and B of all experts are packed as HF peft packs them for `target_parameters`. So adapter files have the same layout:

    A (K R, D)     row k R + r is row r of A_k          expert by expert
    B (E, R K)     column r K + k is column r of B_k    rank by rank

Shape letters: T tokens, K experts, N chosen experts per token, D input features, E output features, H features between
up and down, R rank.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from reference.shared.adapted import AdaptedLayer
from reference.shared.layers import device_of, floating_dtype, stacked_weights
from reference.shared.lora_start import initial_factors
from reference.shared.nf4_weight import Nf4Weight


def unpacked(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return A (K, R, D) and B (K, E, R) of each expert, from the packed A (K R, D) and B (E, R K)."""
    return A.reshape(experts, -1, A.shape[-1]), B.reshape(len(B), -1, experts).permute(2, 0, 1)


def packed(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the packed A (K R, D) and B (E, R K), from A (K, R, D) and B (K, E, R) of each expert."""
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def stacked_update(A: Tensor, B: Tensor, experts: int, scaling: float, transposed: bool) -> Tensor:
    """Return scaling B_k A_k of each expert, shape (K, E, D), or (K, D, E) if `transposed`. A and B are packed."""
    A_KRD, B_KER = unpacked(A, B, experts)
    update_KED = scaling * (B_KER @ A_KRD)
    return update_KED.transpose(1, 2) if transposed else update_KED


def gated_experts(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, transposed: bool
) -> Tensor:
    """Return sum_n weights[t, n] down_k (silu(gate_k x_t) * up_k x_t) with k = chosen[t, n], shape (T, D).

    x (T, D), chosen (T, N) with numbers of experts, weights (T, N), gate_up (K, 2 H, D), down (K, D, H). If
    `transposed`, gate_up is (K, D, 2 H), and down is (K, H, D).
    """
    if transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    y_TD = torch.zeros_like(x)
    for k in chosen.unique().tolist():
        token, n = torch.where(chosen == k)
        gate, up = (x[token] @ gate_up[k].T).chunk(2, dim=-1)
        out = (silu(gate) * up) @ down[k].T
        y_TD = y_TD.index_add(0, token, out * weights[token, n, None])
    return y_TD


class LoraExperts(AdaptedLayer):
    """A frozen module of stacked experts, with a low-rank update of every expert's weights.

    `base` is a module whose class is named `...Experts`, as in transformers. Its own forward pass runs with the updated
    parameters. So this layer works with any activation, gate and bias.
    """

    def __init__(self, base: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.experts = len(next(iter(stacked_weights(base).values())))
        self.transposed = bool(getattr(base, "is_transposed", False))
        self.A = nn.ParameterDict([(name, nn.Parameter(A)) for name, (A, _) in factors.items()])
        self.B = nn.ParameterDict([(name, nn.Parameter(B)) for name, (_, B) in factors.items()])

    def tensors(self) -> dict[str, nn.Parameter]:
        """Map `<name of the stacked parameter>.A` and `.B` to the packed factors."""
        pairs = ((name, (self.A[name], self.B[name])) for name in self.A)
        return {f"{name}.{letter}": t for name, pair in pairs for letter, t in zip("AB", pair, strict=True)}

    def weight(self, name: str) -> Tensor:
        """Return the stacked parameter `name`, without the update."""
        return self.base.get_parameter(name)

    def update(self, name: str) -> Tensor:
        """Return the adapter's update of the stacked parameter `name`, in the shape of this parameter."""
        return stacked_update(self.A[name], self.B[name], self.experts, self.scaling, self.transposed)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Return what `base` returns for these arguments, with the updated weights."""
        weights = {name: self.weight(name) + self.update(name) for name in self.A}
        called = copy.copy(self.base)  # of its own, since threads may call the layer at the same time
        vars(called)["_parameters"] = {**called._parameters, **weights}
        return called(*arguments, **named)

    def merged(self) -> nn.Module:
        """Return a copy of `base` with the updates added to its weights."""
        dense = self.dense_base()
        with torch.no_grad():
            for name in self.A:
                dense.get_parameter(name).copy_(self.weight(name) + self.update(name))
        return dense


class QloraExperts(LoraExperts):
    """A frozen module of stacked experts in NF4, with a low-rank update of every expert's weights (QLoRA, eqs. 5 and 6).

    Each stacked parameter is quantised as a whole. The layer uses only those parameters of `base` that are not stacked,
    e.g. biases.
    """

    def __init__(
        self,
        base: nn.Module,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        scaling: float,
        block: int,
        two_levels: bool,
    ) -> None:
        super().__init__(base, factors, scaling)
        packed = {name: Nf4Weight(base.get_parameter(name).detach(), block, two_levels) for name in factors}
        self.packed = nn.ModuleDict(packed)

    def weight(self, name: str) -> Tensor:
        """Return the stacked parameter `name`, decoded to the dtype of the adapter, without the update."""
        packed: Any = self.packed[name]
        decoded: Tensor = packed.decoded()
        return decoded.to(self.A[name].dtype)

    def packed_weights(self) -> dict[str, Nf4Weight]:
        """Map the name of each stacked parameter of `base` to its NF4 weight."""
        packed: Any = self.packed
        return dict(packed.items())

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of the 4-bit weights: `<name of the stacked parameter>.codes`, `.absmax` and so on."""
        pairs = self.packed_weights().items()
        return {f"{name}.{part}": tensor for name, packed in pairs for part, tensor in packed.tensors().items()}


def expert_factors(
    base: nn.Module, rank: int, init: str, dropout: float, generator: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the initial packed A and B for each stacked parameter of a module of experts.

    Raises ValueError if `dropout` is not 0: the update is added to the weight, so the adapter has no input to drop.
    """
    if dropout:
        raise ValueError(f"LoRA on stacked experts has no dropout, and dropout is {dropout:g}; HF peft has none either")
    dtype, device = floating_dtype(base), device_of(base)
    factors = {}
    for name, weight in stacked_weights(base).items():
        experts, outputs, inputs = weight.shape
        if getattr(base, "is_transposed", False):
            outputs, inputs = inputs, outputs
        drawn = [initial_factors(init, rank, inputs, outputs, generator) for _ in range(experts)]
        A, B = packed(torch.stack([A for A, _ in drawn]), torch.stack([B for _, B in drawn]))
        factors[name] = A.to(device, dtype), B.to(device, dtype)
    return factors
