"""Memory headroom for merging the layers of a packed base, which holds their dense and their packed form at once."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from harness.conformance.subject import DTYPES, Subject

_OF_THE_LARGEST = 32
"""Bytes per weight of the largest layer, in addition to the dense layers: the check decodes one layer at a time in
float64, with copies.
"""


def merge_shortage(subject: Subject) -> str:
    """Return the reason why the layers of a packed base cannot be merged here, or an empty string.

    Some libraries pack the merged weight again and would need less. They are refused too if the base is nearly too
    large: a process that the system kills has measured nothing.
    """
    sizes = [_weights(subject.original_base(path)) for path in subject.packed]
    if not sizes:
        return ""
    need = sum(sizes) * DTYPES[subject.dtype].itemsize + max(sizes) * _OF_THE_LARGEST
    there = free_B(next(subject.model.parameters()).device)
    if need <= there:
        return ""
    return (
        f"merging may unpack all {len(sizes)} packed layers at once, that takes {need / 2**30:,.1f} GiB with its check, and "
        f"{there / 2**30:,.1f} GiB are free"
    )


def free_B(device: torch.device) -> int:  # noqa: N802  # a unit
    """Return the bytes that can still be allocated on a device; on a GPU with the memory that torch has reserved and not
    used.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available)


def _weights(layer: Any) -> int:
    return int(layer.out_features * layer.in_features)
