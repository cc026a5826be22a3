"""Measure checkpoint sizes: write the adapter's file, and sum up the tensors of the whole model."""

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
    """Return the bytes of the tensors that a checkpoint of `model` contains; a shared tensor counts once.

    Call this function before the model is packed or adapted: a merged and unpacked model, or a fully trained one, has the
    same shapes. The model may still be on the meta device.
    """
    return storage_bytes(model.state_dict().values())


def measure(
    adapter: Mapping[str, Tensor], head: Mapping[str, Tensor], model_B: int, folder: Path, *, trains_base: bool = False
) -> Checkpoint:
    """Write adapter and head as one safetensors file into `folder`, and return the sizes.

    trains_base: whether the model's own weights are trained, so that all of them must be saved. The file has no name, so
    that no file remains even if the process is killed. If the disk is full, the result has the reason; no error is raised.
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
