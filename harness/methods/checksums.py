"""Checksums of tensors: they show that one has changed, where a copy of it would take too much memory."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor


def of(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes, in the order of its elements."""
    return zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)


def of_all(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the checksum of each, by the same names."""
    return {name: of(tensor) for name, tensor in tensors.items()}


def beside(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what packed parameters keep beside their codes (bitsandbytes' state of a weight), each by a name of its own."""
    held = {name: inside(getattr(parameter, "quant_state", None)) for name, parameter in named.items()}
    return {f"{name}.{index}": tensor for name, tensors in held.items() for index, tensor in enumerate(tensors)}


def inside(value: object, depth: int = 3) -> list[Tensor]:
    """List the tensors that `value` is or holds: bitsandbytes' state of a weight may hold a second one."""
    if isinstance(value, Tensor):
        return [value]
    parts = value if isinstance(value, list | tuple) else getattr(value, "__dict__", {}).values()
    return [t for part in parts for t in inside(part, depth - 1)] if depth else []  # an object may hold itself
