"""Training budget and recipe of a Cell, in a suite and in its Record. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from harness.records.base_model import ExtendedModel

Loop = Literal["harness", "trl"]
LOOP_MODULES = {"trl": "trl.trainer.sft_trainer"}
"""Training loop -> the optional module that it needs. The other loops need none."""


class Training(ExtendedModel):
    """Training budget and recipe.

    Cells that are compared have the same values, except for the learning rates and for options that change only the
    cost (`accumulate`, `checkpointing`, `compile`, `layerwise`, `loop`).
    """

    steps: int
    """Number of optimizer steps. 0 stands for evaluation without training (zero-shot)."""
    batch: int = 16
    """Number of examples in each optimizer step."""
    lr: float = 1e-3
    """Peak learning rate. The rate rises linearly to the peak during the warm-up, then falls linearly to zero at the
    last step."""
    head_lr: float | None = None
    """Learning rate of a new task head. None stands for `lr`."""
    warmup: int = 0
    """Number of steps in which the learning rate rises linearly."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW. Each step reduces each weight by a share of itself: this number times the
    learning rate."""
    max_tokens: int = 64
    """Number of tokens to which longer texts are truncated, in training and in evaluation."""
    accumulate: int = 1
    """Number of micro-batches in each optimizer step. The `batch` examples go through the model in this number of equal
    parts, so that only the activations of one part are in memory at a time. The gradients of the parts are summed, each
    in proportion to the number of labels in the part (for a causal model: of tokens in answers). So loss and gradient
    equal those of the whole batch up to rounding."""
    checkpointing: bool = False
    """True to use the gradient checkpointing of transformers. Each block of the model saves only its input, and the
    backward pass computes the block again. This saves memory but takes time. It changes the losses only by rounding."""
    lr_ratio: float = 1.0
    """Learning rate of every low-rank factor B and of its bias, divided by the rate `lr` of all other tensors (LoRA+,
    arXiv:2402.12354). HF peft gives the higher rate to other vectors too, such as the magnitudes of DoRA."""
    compile: bool = False
    """True to compile the model in place with torch.compile. The parity gate and the training call the compiled model,
    but scoring and latencies do not. This changes the losses only by rounding."""
    layerwise: bool = False
    """True to update the weights layer by layer (GaLore, arXiv:2403.03507, section 4.3). Each weight is updated within
    the backward pass, as soon as its gradient is complete. Then the gradient is freed. So the gradients take only the
    memory of the largest one. The losses stay bitwise equal. The option requires a Method that trains the model's own
    weights, one pass per step, and an unscaled loss (no float16)."""

    loop: Loop = "harness"
    """Training loop: `harness`, the harness's own plain loop, or `trl`, the SFTTrainer of trl. SFTTrainer gets the same
    adapted model, batches, optimizer and schedule as the harness's loop. Its defaults that would change training are
    switched off. So the losses of both loops are equal up to rounding, but step time and memory are those of
    SFTTrainer. DPO and GRPO are not offered."""

    later_fields: ClassVar = ("accumulate", "checkpointing", "lr_ratio", "compile", "layerwise", "loop")
