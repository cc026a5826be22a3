"""Training budget and recipe of a Cell, in a suite and in its Record. Imports no torch."""

from __future__ import annotations

from typing import ClassVar

from harness.records.base_model import ExtendedModel


class Training(ExtendedModel):
    """Training budget and recipe. Compared Cells share it, except for the learning rates and for options that
    change only the cost (`accumulate`, `checkpointing`, `compile`, `layerwise`)."""

    steps: int
    """Optimizer steps; 0: evaluation only (zero-shot)."""
    batch: int = 16
    """Examples per step."""
    lr: float = 1e-3
    """Peak learning rate. It is reached by a linear warm-up; then the rate falls linearly to zero at the last step."""
    head_lr: float | None = None
    """Learning rate of a new task head; None for `lr`."""
    warmup: int = 0
    """Steps of linear learning-rate warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW: a step reduces each weight by a share, this number times the learning rate."""
    max_tokens: int = 64
    """Length at which texts are truncated, in training and in evaluation."""
    accumulate: int = 1
    """Micro-batches per optimizer step: the `batch` examples go through the model in this number of equal parts. Their
    gradients are summed, each weighted by its labels (for a causal model: the tokens of its answers), so that loss
    and gradient equal those of the whole batch up to rounding. Only the activations of one part are in memory at a
    time."""
    checkpointing: bool = False
    """Gradient checkpointing, by transformers: each block of the model saves only its input and is recomputed in
    the backward pass. It takes time and saves memory; losses are the same up to rounding."""
    lr_ratio: float = 1.0
    """LoRA+ (arXiv:2402.12354): learning rate of every factor B, as a multiple of `lr`, which is the rate of A."""
    compile: bool = False
    """torch.compile of the model's calls in the parity gate and in training, in place; scoring and latencies are
    not compiled. Losses are the same up to rounding."""
    layerwise: bool = False
    """Layer-wise weight updates (GaLore, arXiv:2403.03507, section 4.3): each weight is updated within the
    backward pass, as soon as its gradient is complete; then the gradient is freed. So the gradients take only the
    memory of the largest one; losses are bitwise the same. It requires a method that trains the model's own weights,
    one pass per step, and an unscaled loss (no float16)."""

    later_fields: ClassVar = ("accumulate", "checkpointing", "lr_ratio", "compile", "layerwise")
