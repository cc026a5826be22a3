"""Parts of the memory of a training step, and names of the bases, optimizers and dtypes in predictions. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from harness.memory_model.messages import MethodCount
from harness.records.record import Dtype, Optimizer, Quantization

BASES, DTYPES, OPTIMIZERS = get_args(Quantization), get_args(Dtype), get_args(Optimizer)
OWN = "its own"
"""Name of the base of a Method that stores the weights in its own form, such as QLoRA's codes or PiSSA's residual."""

PARTS = {
    "weights": "the model's weights and buffers, in the base's format, and frozen tensors of the Method (VeRA's "
    "projections, AdaLoRA's averages, PiSSA's residual instead of the weight)",
    "adapter": "the tensors that the Method adds and trains",
    "gradients": "one number per trainable parameter, in the model's dtype; with layer-wise updates only those of the "
    "largest tensor, plus the float32 gradient of its master, if it has one",
    "optimizer": "the optimizer's state on the device: moments, and float32 masters of trainable 16-bit parameters, as in "
    "the Cells of a suite; libraries without masters need less",
    "host": "the optimizer's state in host memory, for paged optimizers only; not part of the total",
    "activations": "tensors saved for the backward pass: a closed-form estimate, for Llama-like models only; it leaves out "
    "tensors of a fixed size, such as those that OFT, LoHa and LoKr save",
    "logits": "the logits of every token, their logarithms in at least float32, and the gradient of these: an estimate",
    "step": "float32 gradients of the masters, which exist only during the optimizer's step, when there are no activations",
}
"""Description of each part of a `Ledger`, by the part's name."""


@dataclass(frozen=True)
class Ledger:
    """Number of bytes of each part in `PARTS`."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    host: int
    activations: int
    logits: int
    step: int

    @classmethod
    def of(
        cls,
        one: MethodCount,
        base: str,
        optimizer: str,
        logits: int | None,
        tokens: int,
        *,
        checkpointing: bool,
        layerwise: bool,
    ) -> Ledger:
        """Return the ledger of a Method: the bytes of each part of the memory.

        one: counts of the Method. logits: bytes of logits per token; None if unknown. tokens: number of tokens in one
        forward pass.
        """
        device, host = one["optimizer"][optimizer]
        return cls(
            weights=one["weights"][base],
            adapter=one["adapter"],
            gradients=one["layerwise"] if layerwise else one["gradients"],
            optimizer=device,
            host=host,
            activations=one["activations"][checkpointing] * tokens if one["activations"] else 0,
            logits=(logits or 0) * tokens,
            step=0 if layerwise else one["step"],
        )

    @property
    def lasting(self) -> int:
        """Bytes on the device that do not depend on the batch."""
        return self.weights + self.adapter + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Largest number of bytes on the device at one time. Activations are freed before the optimizer steps."""
        return self.lasting + max(self.activations + self.logits, self.step)
