"""Measure the sizes of the files that a user would save.

The adapter's file is written and measured. The size of the whole model's file is only calculated.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile

import torch
from safetensors.torch import save
from torch import Tensor

from harness.cell.measure.memory import storage_bytes, tensor_bytes
from harness.records.cost import Checkpoint


def model_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all tensors that a checkpoint of `model` contains. A shared tensor counts once.

    Call this function before the model is packed or adapted. The size is the same after training, because merging and
    unpacking restore the original shapes. The model may still be on the meta device.
    """
    return storage_bytes(model.state_dict().values())


def measure(
    adapter: Mapping[str, Tensor], head: Mapping[str, Tensor], model_B: int, folder: Path, *, trains_base: bool = False
) -> Checkpoint:
    """Write adapter and head as one safetensors file into `folder`, and return the sizes.

    The file is temporary and has no name, so nothing is left of it even if the process is killed. trains_base: whether
    the Method trains the model's own weights. If so, a user must save the whole model, and no adapter file is written.
    If the file cannot be written, e.g. to a full disk, no error is raised, and the result has the reason.
    """
    if trains_base or not (adapter or head):
        because = "the model's own weights are trained: all of them are saved" if trains_base else "nothing is trained"
        return Checkpoint(model_B=model_B, because=because)
    tensors = {f"head.{name}": t for name, t in head.items()} | dict(adapter)
    # safetensors refuses shared memory
    copies = {name: t.detach().contiguous().cpu().clone() for name, t in tensors.items()}
    head_B = tensor_bytes(copies[f"head.{name}"] for name in head)
    try:
        with TemporaryFile(dir=folder) as file:
            file.write(save(copies))
            file.flush()
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        because = f"the file could not be written: {error.strerror or error}"
        return Checkpoint(head_B=head_B, model_B=model_B, because=because)
    return Checkpoint(adapter_file_B=size, head_B=head_B, model_B=model_B)
