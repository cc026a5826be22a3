"""The memory that a training step takes, part by part. No torch."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = {
    "weights": "the model's weights and buffers, in the base's form, and what the Method keeps beside them and does not "
    "train (VeRA's projections, AdaLoRA's averages, PiSSA's residual in the place of the weight)",
    "adapter": "the tensors that the Method adds and trains",
    "gradients": "one number for each that trains, in the model's dtype; with layer-wise updates for those of the largest "
    "tensor alone, with the float32 gradient of its master, if it has one",
    "optimizer": "the optimizer's state on the device: moments, and for what trains in 16 bits its float32 masters, as "
    "Cells of a suite have them; a library that steps 16 bits as they are keeps less",
    "host": "the optimizer's state in host memory: paged optimizers only; not part of the total",
    "activations": "what is kept for the backward pass, by formula and for Llama-like models only: an estimate",
    "logits": "the logits of every token, their logarithms in at least float32, and the gradient of these: an estimate",
    "step": "float32 gradients of the masters, which exist only while the optimizer steps and the activations are gone",
}


@dataclass(frozen=True)
class Ledger:
    """Bytes of each of `PARTS`."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    host: int
    activations: int
    logits: int
    step: int

    @property
    def lasting(self) -> int:
        """What is on the device whatever the batch."""
        return self.weights + self.adapter + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """The most that is on the device at one time: activations have gone before the optimizer steps."""
        return self.lasting + max(self.activations + self.logits, self.step)
