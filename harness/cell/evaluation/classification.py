"""Score an encoder with a classification head. The prediction is the class with the largest logit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from harness.cell.training.batches import Example, collate
from harness.records.record import Item


@torch.inference_mode()
def score(
    model: nn.Module, examples: Sequence[Example], pad: int, batch: int, report: Callable[[int, int], None]
) -> list[Item]:
    """Return one Item (id, and whether the prediction is right) per example, in the order of the examples.

    pad: id of the padding token. batch: texts per forward pass; texts of similar length share a batch. report: called
    after each batch with two numbers, the scored examples so far and all examples.
    """
    model.eval()
    device = next(model.parameters()).device
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    items: list[Item | None] = [None] * len(examples)
    for start in range(0, len(by_length), batch):
        chosen = by_length[start : start + batch]
        inputs = collate([examples[i] for i in chosen], pad, "right").to(device)
        for i, predicted in zip(chosen, model(**inputs.inputs).logits.argmax(-1).tolist(), strict=True):
            items[i] = Item(id=examples[i].id, correct=int(predicted == examples[i].label))
        report(min(start + batch, len(by_length)), len(by_length))
    return [item for item in items if item is not None]
