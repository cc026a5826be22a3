"""Checksums of tensors, to detect changes where a copy would take too much memory."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor


def crc32(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes, in the order of its elements."""
    return zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)


def crc32_by_name(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Map names to the checksums of their tensors."""
    return {name: crc32(tensor) for name, tensor in tensors.items()}


def quantisation_state(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in the `quant_state` of bitsandbytes' packed parameters, by `<name of the parameter>.<index>`.

    named: parameters by name. Those that are not packed are left out.
    """
    found = {name: tensors_in(getattr(parameter, "quant_state", None)) for name, parameter in named.items()}
    return {f"{name}.{index}": tensor for name, tensors in found.items() for index, tensor in enumerate(tensors)}


def tensors_in(value: object, depth: int = 3) -> list[Tensor]:
    """List the tensors in `value`, in its items and in its attributes, down to `depth` levels.

    More than one level is needed, because bitsandbytes nests one quantisation state in another.
    """
    if isinstance(value, Tensor):
        return [value]
    parts = value if isinstance(value, list | tuple) else getattr(value, "__dict__", {}).values()
    return [t for part in parts for t in tensors_in(part, depth - 1)] if depth else []  # an object may refer to itself
