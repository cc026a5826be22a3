"""LoRA+: a higher learning rate for B than for A. Hayou et al., ICML 2024, arXiv:2402.12354. An Operation, not a Method.

The paper trains B at `ratio` (the paper's lambda) times the learning rate of A, because features are learned
efficiently only if the ratio of the two rates is of the order of the width. The authors' code divides the trainable
tensors of a model into these groups:

    tensors                                          learning rate   weight decay
    A, and all others with two or more dimensions    lr              weight_decay
    A and B of an embedding                          lr_embedding    weight_decay
    B                                                lr * ratio      weight_decay
    vectors: magnitudes of DoRA                      lr * ratio      weight_decay
    vectors: biases, and weights of norms            lr * ratio      0
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from reference.operations.adamw import adamw_step
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2402.12354, the ratio of learning rates; the groups are those of the authors' code",
    deviations=(
        Deviation(
            topic="vectors",
            paper="only A and B",
            here="all trainable vectors learn at the rate of B",
            why="the authors' code and peft do the same. The harness's own training (`lr_ratio` of a suite) gives only B "
            "and its bias (`lora_bias`) the higher rate: the paper names no other tensor",
        ),
        Deviation(
            topic="weights of norms",
            paper="not stated",
            here="no weight decay, whatever the class of the norm",
            why="transformers' Trainer does the same. The authors' code and peft leave out the classes that transformers "
            "lists as norms; Llama's RMSNorm was one of them, but today the list has torch.nn.LayerNorm alone",
        ),
        Deviation(
            topic="embeddings",
            paper="not stated",
            here="a learning rate of their own for A and B, without the ratio",
            why="the authors' code and peft do the same; their default is 1e-6",
        ),
    ),
)


def group_of(
    name: str, dimensions: int, *, lr: float, ratio: float, lr_embedding: float, weight_decay: float
) -> tuple[float, float]:
    """Return the learning rate and the weight decay of a trainable tensor.

    name: `<layer>.<tensor>`, such as `q_proj.lora_A`, `q_proj.lora_B`, `q_proj.lora_B.bias`, `embed.lora_embedding_A` or
    `norm.weight`. A layer whose name contains `norm`, in small letters, is a norm. dimensions: number of dimensions of the
    tensor.
    """
    layer, _, tensor = name.partition(".")
    if tensor.startswith("lora_embedding"):
        return lr_embedding, weight_decay
    if dimensions > 1 and tensor != "lora_B":
        return lr, weight_decay
    return lr * ratio, 0.0 if tensor.endswith("bias") or "norm" in layer else weight_decay


def loraplus_step(
    tensors: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    frozen: Collection[str],
    *,
    betas: tuple[float, float],
    eps: float,
    **rates: Any,
) -> dict[str, tuple[float, float, Tensor]]:
    """Return, by name, each tensor's learning rate, weight decay, and value after the first step of AdamW.

    The moments before the step are zero. frozen: names of tensors that do not change; their learning rate and weight
    decay are 0. Every other tensor has a gradient, and all tensors have one dtype. rates: lr, ratio, lr_embedding and
    weight_decay, for `group_of`.
    """
    found: dict[str, tuple[float, float, Tensor]] = {}
    for name, tensor in tensors.items():
        if name in frozen:
            found[name] = (0.0, 0.0, tensor)
            continue
        lr, weight_decay = group_of(name, tensor.dim(), **rates)
        none = torch.zeros_like(tensor)
        options: dict[str, Any] = {"step": 1, "lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        found[name] = (lr, weight_decay, adamw_step(tensor, gradients[name], none, none, **options)[0])
    return found
