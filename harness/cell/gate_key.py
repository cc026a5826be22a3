"""Keys of parity gates. The gate compares a Cell's adapted model with a reference, before the Cell is measured.

Cells with equal keys share the result of one gate. A key is a hash of everything on which the result depends. A gate
runs the adapted layers, and the whole model on a few texts, with random adapter tensors. It takes no optimizer step. So
the seed, the optimizer, the schedule and the texts are not part of a key: they change the numbers that are compared,
but not the code that runs. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from harness.cell.job import Asset, Job, JobTask
from harness.records.record import ADAPTER_SHA256, Cell, Environment, Json, Provider

_VARIABLES = (
    "ATEN_", "BLIS_", "BNB_", "CUBLAS", "CUDA_", "CUDNN_", "DNNL_", "GOMP_", "KMP_", "MKL_", "NVIDIA_", "OMP_", "ONEDNN_",
    "OPENBLAS_", "PEFT_HARNESS_", "PYTORCH_", "TORCH", "TRITON_", "VECLIB_",
)  # fmt: skip
"""Prefixes of the names of environment variables that may change a result. The variables belong to libraries that
compute (matrix products, threads, compilers), or to this package."""
_LEFT_OUT = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PEFT_HARNESS_API_KEY", "PEFT_HARNESS_CACHE", "PEFT_HARNESS_CHILD",
    "PEFT_HARNESS_NIGHT",
)  # fmt: skip
"""Variables that begin with one of `_VARIABLES`, but change no result. CUDA_VISIBLE_DEVICES chooses a device. Not every
run sets OMP_NUM_THREADS, so the key has the number of threads instead. PEFT_HARNESS_API_KEY is a secret, and
PEFT_HARNESS_CACHE is a folder. PEFT_HARNESS_CHILD and PEFT_HARNESS_NIGHT mark processes."""


def of_cell(cell: Cell, model: Asset, task: JobTask, device: str) -> str:
    """Return the part of a gate's key that is known before the Cell's process starts.

    Return an empty string for a Cell that never shares its gate. A Cell with an imported adapter never shares its gate,
    because the gate compares the tensors of this adapter. A Cell with `compile` never shares its gate, because the gate
    also compiles the model before the measured steps.

    `max_tokens` is part of the key, because long texts may run other code than short texts. The number of labels is
    part of the key, because it is the size of the model's last layer.
    """
    if cell.training.compile or ADAPTER_SHA256 in cell.config:
        return ""
    facts: dict[str, Any] = cell.model_dump(
        mode="json", include={"method", "implementation", "config", "base", "dtype"}
    )
    facts |= {"environment": cell.environment, "max_tokens": cell.training.max_tokens, "device": device}
    facts |= {"model": model.use.model_dump(), "kind": model.source.kind, "labels": task.labels}
    return _hash(facts)


def of_process(job: Job, provider: Provider, environment: Environment) -> str:
    """Return the complete key of a job's gate: `of_cell`, plus the machine, software and variables of this process.

    Return an empty string for a Cell that never shares its gate.
    """
    known = of_cell(job.cell, job.model, job.task, job.device)
    if not known:
        return ""
    variables = {
        name: value for name, value in os.environ.items() if name.startswith(_VARIABLES) and name not in _LEFT_OUT
    }
    code = [environment.id, environment.code_version, environment.threads, provider.model_dump(), variables]
    return _hash([known, *code])


def _hash(facts: Json) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
