"""A weight in NF4, and buffers for decoded weights.

Each thread has one buffer per dtype. A decoded weight overwrites the previous one in the buffer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from harness.kernels.cpp import nf4 as cpp
from harness.kernels.torch import nf4
from harness.kernels.torch.support.huge_pages import OWN_MAPPING


class Buffers:
    """Memory for large decoded weights, one buffer per dtype. It is reused, because fresh memory takes longer to map."""

    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}

    def take(self, count: int, dtype: torch.dtype) -> Tensor | None:
        """Return a tensor of `count` elements on the CPU. The next call for this dtype overwrites its memory.

        Return None below 32 MiB: the allocator's memory was used a moment ago, so that more of it is in the processor's
        cache.
        """
        if count * dtype.itemsize < OWN_MAPPING:
            return None
        if dtype not in self.by_dtype or self.by_dtype[dtype].numel() < count:
            self.by_dtype.pop(dtype, None)  # free the smaller buffer before the larger one is allocated
            with torch.inference_mode(False):  # else only inference mode could write to it
                self.by_dtype[dtype] = torch.empty(count, dtype=dtype, device="cpu")
        return self.by_dtype[dtype][:count]


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.buffers = Buffers()


_own = _OfThread()


def forget() -> None:
    """Free this thread's buffers. New ones are allocated when the next weight is decoded."""
    _own.buffers = Buffers()


@dataclass(frozen=True)
class PackedWeight:
    """A weight in NF4: a matrix (E, D) or a stack of matrices."""

    packed: Tensor
    """The packed codes, two per byte: uint8."""
    absmax: Tensor
    """One number per block of `block` weights: float32 or, if absmax2 and offset are given, an 8-bit code."""
    block: int
    shape: tuple[int, ...]
    absmax2: Tensor | None = None
    """One float32 number per `block2` codes of `absmax`."""
    offset: Tensor | None = None
    """One float32 number, which is added to the decoded numbers of `absmax`."""
    block2: int = 256

    def constants(self) -> Tensor:
        """Return the float32 absmax of every block. If absmax is stored in 8 bits, it is decoded first."""
        if self.absmax2 is None or self.offset is None:
            return self.absmax
        return nf4.double_dequantize(self.absmax, self.absmax2, self.offset, self.block2)

    def times_few(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return x W^T + bias (T, E) for a few rows x (T, D), or None if no kernel multiplies by packed weights."""
        E, D = self.shape
        constants = (self.absmax, self.absmax2, self.offset, self.block2)
        return cpp.multiply(x, self.packed.detach(), constants, self.block, (E, D), bias)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in its shape, decoded to this dtype, in fresh memory.

        torch.compile does not trace into the decoding: its graph has one node for it.
        """
        if torch.compiler.is_compiling():
            constants = self.absmax, self.absmax2, self.offset
            decoded: Tensor = _decode(self.packed, *constants, self.block, self.block2, self.shape, dtype)
            return decoded
        return self._decoded(dtype, None)

    def in_buffer(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, decoded to this dtype, in memory that this thread's next call may overwrite.

        Use the result immediately. A weight on a GPU, or of less than 32 MiB, gets fresh memory.
        """
        on_cpu = self.packed.device.type == "cpu"
        return self._decoded(dtype, _own.buffers.take(prod(self.shape), dtype) if on_cpu else None)

    def _decoded(self, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        with torch.no_grad():
            if self.absmax2 is None or self.offset is None:
                return nf4.dequantize(self.packed, self.absmax, self.block, self.shape, dtype, out)
            constants = self.absmax, self.absmax2, self.offset
            return nf4.dequantize_double(self.packed, *constants, self.block, self.block2, self.shape, dtype, out)


@torch.library.custom_op("peft_harness::decode_nf4", mutates_args=())
def _decode(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    block: int,
    block2: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return PackedWeight(packed, absmax, block, tuple(shape), absmax2, offset, block2).decoded(dtype)


@_decode.register_fake
def _(packed: Tensor, *others: Any) -> Tensor:
    *_, shape, dtype = others
    return packed.new_empty(tuple(shape), dtype=dtype)


@dataclass(frozen=True)
class PackedStack:
    """The weights of all experts of a layer in NF4.

    They were quantised as one tensor, so a block may hold weights of two experts.
    """

    weight: PackedWeight
    """The packed stack, of shape (K, E, D), or (K, D, E) if `transposed`."""
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (K, E, D): numbers of experts, output features and input features."""
        K, E, D = self.weight.shape
        return (K, D, E) if self.transposed else (K, E, D)

    def __len__(self) -> int:
        return self.weight.shape[0]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the matrices of all experts, (K, E, D), decoded to this dtype, in fresh memory."""
        return self._turned(self.weight.decoded(dtype))

    def matrices(self, dtype: torch.dtype) -> Callable[[int], Tensor]:
        """Return a function that maps an expert's number to the expert's matrix (E, D), decoded to this dtype.

        On a CPU, the function's next call may overwrite the result, unless autograd records the call.
        """
        block, (_, *shape) = self.weight.block, self.weight.shape
        constants, packed, count = self.weight.constants(), self.weight.packed.reshape(-1), prod(shape)

        def matrix(k: int) -> Tensor:
            begin = k * count
            first, last = begin // block, -(-(begin + count) // block)
            first -= first * block % 2  # a block of odd size may begin in the middle of a byte
            held = min(last * block, prod(self.weight.shape)) - first * block
            codes = packed[first * block // 2 :][: -(-held // 2)]
            reused = codes.device.type == "cpu" and not torch.is_grad_enabled()
            out = _own.buffers.take(held, dtype) if reused else None
            with torch.no_grad():
                values = nf4.dequantize(codes, constants[first:last], block, (held,), dtype, out)
            return self._turned(values[begin - first * block :][:count].view(*shape))

        return matrix

    def _turned(self, W: Tensor) -> Tensor:
        return W.transpose(-1, -2) if self.transposed else W
