"""A small encoder, its batches, and the arguments that train it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from harness.cell.training import optimizers
from harness.cell.training.batches import Batch, Example, collate, order
from harness.conformance.subject import configure
from harness.methods.registry import discover
from harness.records.record import Training

EXAMPLES = [Example(f"e{i}", tuple(range(1, 2 + i * 7 % 13)), i % 2) for i in range(50)]


class Encoder(nn.Module):
    """Minimal encoder for training: it adds up the embeddings of the tokens."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.scale = nn.Embedding(16, 4), nn.Linear(4, 2), scale

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        summed = (self.embed(input_ids) * attention_mask[..., None]).sum(1)
        return SimpleNamespace(logits=self.head(torch.tanh(summed)) * self.scale)


def setting(model: nn.Module, method: str = "full", implementation: str = "reference", **recipe: Any) -> Any:
    """Attach a method to a model; return the first arguments of train(), up to `schedule`, by name."""
    attach = discover().find("method", method, implementation)
    config = {} if method == "full" else {"rank": 2, "targets": ["head"]}
    adapted = attach(model, configure(method, config), torch.Generator().manual_seed(0))
    recipe = Training(**{"steps": 10, "warmup": 0, "lr": 1e-2, **recipe})
    optimizer, schedule = optimizers.make(adapted, [], recipe)
    return {"adapted": adapted, "head": [], "optimizer": optimizer, "schedule": schedule}


def batches(steps: int) -> list[Batch]:
    return [collate(group, 0, "right") for group in order(EXAMPLES, steps, 4, seed=0)]


def nothing(step: int, loss: float) -> None:
    """Report no progress."""
