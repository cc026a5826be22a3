"""Loading a model for a task, with a new head whose start depends on the seed alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.errors import AssetError


@dataclass
class Loaded:
    """model: on its device; head: path -> parameter of a head that the checkpoint does not have, trained by every method."""

    model: Any
    tokenizer: Any
    head: dict[str, nn.Parameter]


def load(path: Path, kind: str, labels: int, dtype: torch.dtype, device: torch.device, seed: int) -> Loaded:
    """Load an encoder with a classification head of `labels` classes, or a causal model, from a local folder."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    factory: Any = AutoModelForSequenceClassification if kind == "encoder" else AutoModelForCausalLM
    options = {"num_labels": labels} if kind == "encoder" else {}
    model, info = factory.from_pretrained(path, dtype=dtype, local_files_only=True, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if kind == "causal" and missing:
        raise AssetError(
            f"the checkpoint lacks {len(missing)} weights of a causal model: {', '.join(missing[:3])} ...",
            where=str(path),
            mend="is it an encoder? then declare it with kind: encoder",
        )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    parameters = dict(model.named_parameters())
    head = {name: parameters[name] for name in missing if name in parameters}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.values():
            if parameter.dim() > 1:
                # Drawn in float64 so that every dtype starts from the same numbers; BERT's own spread.
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.02
                parameter.copy_(drawn)
            else:
                parameter.zero_()
    return Loaded(model.to(device), tokenizer, head)
