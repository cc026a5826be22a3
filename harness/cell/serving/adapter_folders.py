"""Save adapters of a Cell's model in the format of peft, which model servers load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from harness.conformance.adapter_files.adapter_config import CONFIG
from harness.conformance.adapter_files.adapter_file import WEIGHTS
from harness.conformance.subject import Subject
from harness.errors import Unsupported


def save(subject: Subject, tensors: Mapping[str, Tensor], base: Path, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors into a new folder.

    subject: a model with LoRA. tensors: the trained tensors, by their names in `Adapted.tensors()`. These are A and B
    of each layer and, if the config has `lora_bias`, the bias of B. base: folder of the base model. Raises Unsupported
    if a layer is not linear.
    """
    for path, layer in subject.bases.items():
        if not isinstance(layer, nn.Linear):
            raise Unsupported(f"servers load adapters of linear layers, and {path} is a {type(layer).__name__}")
    config = subject.config
    keys = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "bias": "none",
        "r": config.rank, "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "use_rslora": config.rslora, "lora_dropout": config.dropout, "target_modules": _targets(subject),
        **({"lora_bias": True} if config.lora_bias else {}),
    }  # fmt: skip
    folder.mkdir()
    file = {_key(name): t.detach().contiguous().cpu().clone() for name, t in tensors.items()}
    save_file(file, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(keys, indent=1) + "\n", encoding="utf-8")


def _key(name: str) -> str:
    """Return the name that peft gives to the tensor `<path>.A`, `<path>.B` or `<path>.c` in its file."""
    path, _, letter = name.rpartition(".")
    return f"base_model.model.{path}.lora_" + ("B.bias" if letter == "c" else f"{letter}.weight")


def _targets(subject: Subject) -> list[str]:
    """Return peft's `target_modules`: the last part of the path of each adapted layer, e.g. `q_proj`.

    If other layers of the model have one of these last parts too, return the whole paths instead.
    """
    model: Any = subject.original.model or subject.model
    last = {path.rpartition(".")[2] for path in subject.bases}
    named = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in last]
    return sorted(last) if len(named) == len(subject.bases) else sorted(subject.bases)
