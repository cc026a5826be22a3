"""The training budget of a Cell and its recipe, as a suite asks for them and a Record holds them. No torch."""

from __future__ import annotations

from harness.records.base_model import FrozenModel, Scalar

LATER = ("accumulate", "checkpointing", "lr_ratio", "compile", "layerwise")
"""Fields of Training that came after the first published Records."""


class Training(FrozenModel):
    """The training budget and its recipe: equal for Cells that are to be compared, but for learning rates, and for what
    changes only the cost (`accumulate`, `checkpointing`, `compile`, `layerwise`)."""

    steps: int
    """Optimizer steps; 0 means evaluation only (zero-shot)."""
    batch: int = 16
    """Examples per step."""
    lr: float = 1e-3
    """Peak learning rate: reached by linear warm-up, then linearly down to zero at the last step."""
    head_lr: float | None = None
    """Learning rate of a new task head; None means `lr`."""
    warmup: int = 0
    """Steps of linear learning-rate warm-up."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay: of each step the weight loses this times the learning rate."""
    max_tokens: int = 64
    """Longer texts are truncated, in training and in evaluation."""
    accumulate: int = 1
    """Micro-batches per optimizer step: the `batch` examples go through the model in so many equal parts. Their gradients
    are summed, each weighted by its labels (a causal model's: the tokens of its answers), so that loss and gradient are
    those of the whole batch up to rounding. Only the activations of one part are in memory at a time."""
    checkpointing: bool = False
    """Gradient checkpointing, by transformers: each block of the model keeps only its input, and is computed again in the
    backward pass. It takes time and saves memory; losses are the same up to rounding."""
    lr_ratio: float = 1.0
    """LoRA+ (arXiv:2402.12354): every factor B has so many times the learning rate `lr`, which A and all else have."""
    compile: bool = False
    """torch.compile: the model's calls in the parity gate and in training are compiled, in place; what is scored and timed
    afterwards is not. Losses are the same up to rounding."""
    layerwise: bool = False
    """Layer-wise weight updates (GaLore, arXiv:2403.03507, section 4.3): each weight is stepped within the backward pass, as
    soon as its gradient is whole, which is then freed. The gradients take the memory of the largest one; losses are the same
    bits. For methods that train the model's own weights, in one pass a step, with a loss that is not scaled (no float16)."""

    def later(self) -> dict[str, Scalar]:
        """Return those of the fields that came after the first published Records which are not at their default."""
        return {n: value for n in LATER if (value := getattr(self, n)) != type(self).model_fields[n].default}
