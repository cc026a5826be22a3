"""Find out whether memory suffices to merge adapters into a packed (4-bit) base.

During the merge, dense and packed weights are in memory at the same time.
"""

from __future__ import annotations

from typing import Any

import psutil
import torch

from harness.conformance.subject import DTYPES, Subject

_CHECK_B = 32
"""Bytes that the check `merge` needs for each element of the largest weight. The check copies one layer at a time to
float64."""


def merge_shortage(subject: Subject) -> str:
    """Return a message if memory is too small to merge the layers of a packed base, otherwise an empty string.

    The estimate is too high for a library that packs each merged weight again, so a merge may be skipped although
    memory would suffice. An estimate that is too low would be worse: the system might kill the process, and all
    measurements of the Cell would be lost.
    """
    sizes = [_weights(subject.original_base(path)) for path in subject.packed]
    if not sizes:
        return ""
    need = sum(sizes) * DTYPES[subject.dtype].itemsize + max(sizes) * _CHECK_B
    free = free_B(next(subject.model.parameters()).device)
    if need <= free:
        return ""
    return (
        f"merging may unpack all {len(sizes)} packed layers at once, which takes {need / 2**30:,.1f} GiB with its check; "
        f"{free / 2**30:,.1f} GiB are free"
    )


def free_B(device: torch.device) -> int:  # noqa: N802  # a unit
    """Return the number of bytes that can still be allocated on a device.

    On a GPU, this includes unused memory that torch has reserved.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available)


def _weights(layer: Any) -> int:
    return int(layer.out_features * layer.in_features)
