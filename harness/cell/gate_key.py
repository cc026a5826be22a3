"""Keys of parity gates. Cells with equal keys share one gate, because its result does not depend on anything else.

A gate tries the adapted layers, and the whole model on probe texts, with random adapter tensors. It steps no optimizer. So
the seed, the optimizer, the schedule and the texts are not part of a key: they choose the numbers that are tried, not the
code. Imports no torch.
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
"""Starts of the names of environment variables that may change a number: those of the libraries that compute (matrix
products, threads, compilers), and of this package."""
_LEFT_OUT = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PEFT_HARNESS_API_KEY", "PEFT_HARNESS_CACHE", "PEFT_HARNESS_CHILD",
    "PEFT_HARNESS_NIGHT",
)  # fmt: skip
"""Variables that may differ between processes with equal results. CUDA_VISIBLE_DEVICES chooses a device. Ray sets
OMP_NUM_THREADS, and a run on one machine may not. The key has the number of threads that torch reports instead. The
others are a secret, a folder, and marks of processes."""


def of_cell(cell: Cell, model: Asset, task: JobTask, device: str) -> str:
    """Return the part of a Cell's key that is known before its process starts.

    The result is empty for a Cell that never shares its gate. An imported adapter is compared with its own tensors. With
    `compile`, the gate also compiles the model, which would otherwise happen in measured steps.

    Long texts reach other code than short ones, so `max_tokens` counts. The labels give the model's last layer.
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
    """Return the key of a job in this process. It is empty if the Cell never shares its gate."""
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
