"""LoRA's layer for stacked experts, computed expert by expert without forming the products B A."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness.kernels.nf4_format import BLOCK2
from harness.kernels.torch.lora_experts import StackedLinear, routed_experts
from harness.kernels.torch.support.packed_weight import PackedWeight
from reference.lora_experts import LoraExperts, QloraExperts
from reference.shared.nf4_weight import Nf4Weight


class FusedLoraExperts(LoraExperts):
    """Stacked experts of transformers with LoRA. Under autocast and torch.compile, the reference's code runs."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Return the output (T, D) of the experts for x (T, D), the chosen experts (T, N) and their weights (T, N)."""
        if named or torch.compiler.is_compiling() or torch.is_autocast_enabled(arguments[0].device.type):
            return super().forward(*arguments, **named)
        x, chosen, weights = arguments
        base: Any = self.base
        first = "gate_up_proj" if base.has_gate else "up_proj"
        activate: Callable[[Tensor], Tensor] = base._apply_gate if base.has_gate else base.act_fn
        up, down = self._stacked(first), self._stacked("down_proj")
        return routed_experts(x, chosen, weights, up, down, activate).to(x.dtype)

    def stored(self, name: str) -> Tensor | PackedWeight:
        """Return the stacked parameter `name` as it is stored: dense or, in a subclass, packed in 4 bits."""
        return self.weight(name)

    def _stacked(self, name: str) -> StackedLinear:
        bias = getattr(self.base, f"{name}_bias") if getattr(self.base, "has_bias", False) else None
        return StackedLinear(self.stored(name), self.A[name], self.B[name], self.scaling, self.transposed, bias)


class FusedQloraExperts(FusedLoraExperts, QloraExperts):
    """Stacked experts of transformers in NF4 with LoRA. On a CPU, an expert's weights are decoded just before their use."""

    def stored(self, name: str) -> PackedWeight:
        """Return the stacked parameter `name`, packed in 4 bits."""
        packed: Any = self.packed[name]
        return packed_weight(packed)


def packed_weight(weight: Nf4Weight) -> PackedWeight:
    """Return an NF4 weight of the reference as the PackedWeight that the kernels take."""
    second = (weight.absmax2, weight.offset, BLOCK2) if weight.two_levels else ()
    return PackedWeight(weight.codes, weight.absmax, weight.block, tuple(weight.shape), *second)


def why_not(base: nn.Module) -> str:
    """Return the reason why FusedLoraExperts cannot compute a module of experts, or an empty string."""
    if not hasattr(base, "has_gate") or not hasattr(base, "_apply_gate"):
        return "its class does not use transformers' interface for experts"
    if getattr(base, "has_post_expert_norm", False):
        return "it has a norm after every expert"
    return ""
