"""An NF4 base in which faults are planted. A copy of the reference's quantiser packs the weights of the base."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from harness.conformance.faults.patched_copy import PackedForm, PatchedCopy
from reference.shared.layers import replace

_BLOCK = 64


class PackedLinear(nn.Linear):
    """A linear layer that stores its weight in 4 bits, and decodes the weight in each forward pass."""

    def __init__(self, dense: nn.Linear, nf4: Any, double_quant: Any, dtype: torch.dtype) -> None:
        super().__init__(dense.in_features, dense.out_features, bias=dense.bias is not None, device="meta")
        codes, absmax = nf4.quantize(dense.weight, _BLOCK)
        if double_quant is not None:
            absmax = double_quant.dequantize(*double_quant.quantize(absmax))
        self.weight = nn.Parameter(nf4.pack(codes), requires_grad=False)
        if dense.bias is not None:
            self.bias = nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
        self.register_buffer("absmax", absmax)
        self.unpack, self.dequantize, self.compute_dtype = nf4.unpack, nf4.dequantize, dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, where W is the decoded weight."""
        codes = self.unpack(self.weight, self.in_features * self.out_features)
        W = self.dequantize(codes, self.get_buffer("absmax"), _BLOCK).view(self.out_features, self.in_features)
        return nn.functional.linear(x, W.to(x.dtype), self.bias)


def pack(
    copy: PatchedCopy, double: bool, model: nn.Module, paths: list[str], dtype: torch.dtype
) -> dict[str, PackedForm]:
    """Replace the layers at `paths` by packed layers, as an implementation of a base does. Return the packed weights.

    double: True quantises absmax too.
    """
    double_quant = copy.module("reference.operations.double_quant") if double else None

    def right(model: nn.Module, paths: list[str]) -> dict[str, PackedForm]:
        forms = {}
        for path in paths:
            packed = PackedLinear(cast("nn.Linear", model.get_submodule(path)), copy.module(), double_quant, dtype)
            replace(model, path, packed)
            forms[path] = (packed.weight.data, packed.get_buffer("absmax"), _BLOCK, double)
        return forms

    return copy.packing(right)(model, paths)
