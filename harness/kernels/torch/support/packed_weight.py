"""A weight in NF4, and the one piece of memory per thread and dtype that weights are decoded into, one after the other."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from harness.kernels.torch import nf4


class Buffers:
    """What weights are decoded into. A layer that is decoded for each product would else pay for fresh memory each time."""

    def __init__(self) -> None:
        self.of: dict[torch.dtype, Tensor] = {}

    def room(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return `count` elements that the next call overwrites."""
        if dtype not in self.of or self.of[dtype].numel() < count:
            self.of.pop(dtype, None)  # free the smaller one first
            with torch.inference_mode(False):  # or nobody outside of inference mode could write to it
                self.of[dtype] = torch.empty(count, dtype=dtype, device="cpu")
        return self.of[dtype][:count]


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.buffers = Buffers()


_own = _OfThread()


def forget() -> None:
    """Free what this thread decodes into; the next call makes it anew."""
    _own.buffers = Buffers()


@dataclass(frozen=True)
class PackedWeight:
    """A matrix (E, D) in NF4.

    packed: uint8 (ceil(E D / 2),). absmax: of blocks of `block`: float32, or, where absmax2 (float32, of blocks of `block2`
    constants) and offset (float32, one number) are given, their 8-bit codes.
    """

    packed: Tensor
    absmax: Tensor
    block: int
    shape: tuple[int, int]
    absmax2: Tensor | None = None
    offset: Tensor | None = None
    block2: int = 256

    def constants(self) -> Tensor:
        """Return the absmax of every block, float32."""
        if self.absmax2 is None or self.offset is None:
            return self.absmax
        return nf4.double_dequantize(self.absmax, self.absmax2, self.offset, self.block2)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in memory of its own."""
        return self._decoded(dtype, None)

    def lent(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in memory that the next call of this thread overwrites: use it at once, and do not keep it.

        The memory held is that of the largest matrix so far. On a GPU it is fresh: there the allocator keeps it, and
        knows about streams.
        """
        on_cpu = self.packed.device.type == "cpu"
        return self._decoded(dtype, _own.buffers.room(prod(self.shape), dtype) if on_cpu else None)

    def _decoded(self, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        with torch.no_grad():
            if self.absmax2 is None or self.offset is None:
                return nf4.dequantize(self.packed, self.absmax, self.block, self.shape, dtype, out)
            two = self.absmax, self.absmax2, self.offset
            return nf4.dequantize_double(self.packed, *two, self.block, self.block2, self.shape, dtype, out)
