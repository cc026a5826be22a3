"""LoRA over quantised weights: QLoRA (arXiv:2305.14314), and LoRA over the 8 bits of LLM.int8() (arXiv:2208.07339)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plain_torch.adapted import Adapted, AdapterLayer, replace
from plain_torch.blockwise import double_dequantize, double_quantize
from plain_torch.experts import LoraExperts
from plain_torch.factors import Generator
from plain_torch.int8 import int8_dequantize, int8_linear, int8_quantize
from plain_torch.layers import frozen, kind_of, matrix, with_matrix
from plain_torch.lora import LoraLinear, scaling_of
from plain_torch.nf4 import nf4_dequantize, nf4_quantize

SECOND_BLOCK = 256


class FixedBuffers(nn.Module):
    """Module whose buffers keep their dtypes and values if the model is cast to another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            if value is not None and self._buffers[name].dtype != value.dtype:
                self._buffers[name] = value.to(self._buffers[name].device)
        return self


class PackedNf4(FixedBuffers):
    """A tensor in NF4: packed codes, and one absmax per block, which double quantisation stores in 8 bits."""

    def __init__(self, W: Tensor, block: int, double: bool) -> None:
        super().__init__()
        self.block, self.double, self.shape = block, double, tuple(W.shape)
        codes, absmax = nf4_quantize(W.detach(), block)
        self.register_buffer("codes", codes)
        if double:
            small, absmax2, offset = double_quantize(absmax, SECOND_BLOCK)
            self.register_buffer("absmax", small)
            self.register_buffer("absmax2", absmax2)
            self.register_buffer("offset", offset)
        else:
            self.register_buffer("absmax", absmax)

    def constants(self) -> Tensor:
        """Return the float32 absmax of every block."""
        return double_dequantize(self.absmax, self.absmax2, self.offset, SECOND_BLOCK) if self.double else self.absmax

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Return the decoded tensor."""
        return nf4_dequantize(self.codes, self.constants(), self.block, self.shape, dtype)


class QloraLinear(LoraLinear):
    """Linear layer with a 4-bit weight. Only the bias of its base is used."""

    def __init__(self, base: nn.Module, config: Any, generator: Generator) -> None:
        super().__init__(base, config, generator)
        self.packed = PackedNf4(matrix(base), config.block, config.double_quant)

    def kept(self) -> dict[str, Tensor]:
        return dict(self.packed.named_buffers())

    def forward(self, x: Tensor) -> Tensor:
        low = functional.linear(functional.linear(self.dropped(x), self.A), self.B, self.c)
        return functional.linear(x, self.packed.decoded(x.dtype), self.base.bias) + self.scaling * low

    def merged(self) -> nn.Module:
        A, B = self.widened()
        return with_matrix(self.base, self.packed.decoded(A.dtype) + self.scaling * (B @ A), self.merged_bias())


class QloraExperts(LoraExperts):
    """Module of experts, each of whose stacked weights is packed as a whole."""

    def __init__(self, base: nn.Module, config: Any, generator: Generator) -> None:
        super().__init__(base, config, scaling_of(config), generator)
        self.packed = nn.ModuleDict(
            {name: PackedNf4(getattr(base, name), config.block, config.double_quant) for name in self.factors}
        )

    def kept(self) -> dict[str, Tensor]:
        return dict(self.packed.named_buffers())

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.packed[name].decoded(dtype)


class Int8Linear(FixedBuffers):
    """Linear layer with a weight in 8 bits, and no adapter."""

    def __init__(self, W: Tensor, bias: Tensor | None, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        codes, absmax = int8_quantize(W)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.bias = None if bias is None else frozen(bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.codes, self.absmax, self.bias, self.threshold, self.training)


class LoraInt8Linear(FixedBuffers, LoraLinear):
    """Linear layer with a weight in 8 bits, and LoRA's update. Only the bias of its base is used."""

    def __init__(self, base: nn.Module, config: Any, generator: Generator) -> None:
        super().__init__(base, config, generator)
        self.threshold = config.threshold
        codes, absmax = int8_quantize(matrix(base))
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)

    def forward(self, x: Tensor) -> Tensor:
        y = int8_linear(x, self.codes, self.absmax, self.base.bias, self.threshold, self.training)
        return y + self.scaling * functional.linear(functional.linear(self.dropped(x), self.A), self.B, self.c)

    def merged(self) -> nn.Module:
        A, B = self.widened()
        W = int8_dequantize(self.codes, self.absmax, A.dtype) + self.scaling * (B @ A)
        return Int8Linear(W, self.merged_bias(), self.threshold)


class Nf4Linear(FixedBuffers, nn.Linear):
    """Frozen linear layer whose `weight` holds the bytes of NF4, as a base for any adapter."""

    def __init__(self, base: nn.Linear, dtype: torch.dtype, block: int, double: bool) -> None:
        nn.Linear.__init__(self, base.in_features, base.out_features, bias=False, device="meta")
        self.packed = PackedNf4(base.weight, block, double)
        self.weight = nn.Parameter(self.packed.codes, requires_grad=False)
        del self.packed.codes
        self.bias = None if base.bias is None else frozen(base.bias.detach().to(dtype))
        self.compute_dtype = dtype
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed
        decoded = nf4_dequantize(self.weight, packed.constants(), packed.block, packed.shape, x.dtype)
        return functional.linear(x, decoded, self.bias)


def pack_base(model: nn.Module, paths: list[str], dtype: torch.dtype, double: bool) -> dict[str, tuple[Any, ...]]:
    """Replace linear layers by packed ones. Return the bytes, the decoded absmax and the block of each."""
    contents = {}
    for path in paths:
        layer = Nf4Linear(model.get_submodule(path), dtype, 64, double)
        model.set_submodule(path, layer)
        contents[path] = (layer.weight.detach(), layer.packed.constants(), 64, *((True,) if double else ()))
    return contents


def nf4_base(model: nn.Module, paths: list[str], dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Pack linear layers in NF4."""
    return pack_base(model, paths, dtype, double=False)


def nf4_dq_base(model: nn.Module, paths: list[str], dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Pack linear layers in NF4 with double quantisation."""
    return pack_base(model, paths, dtype, double=True)


def attach_qlora(model: nn.Module, config: Any, generator: Generator) -> Adapted:
    """Pack every target in NF4, and add a low-rank update."""

    def make(base: nn.Module) -> AdapterLayer:
        return (QloraExperts if kind_of(base) == "experts" else QloraLinear)(base, config, generator)

    return Adapted(model, replace(model, config.targets, ("linear", "experts"), make))


def attach_lora_int8(model: nn.Module, config: Any, generator: Generator) -> Adapted:
    """Quantise every target to 8 bits, and add a low-rank update."""
    layers = replace(model, config.targets, ("linear",), lambda base: LoraInt8Linear(base, config, generator))
    return Adapted(model, layers)
