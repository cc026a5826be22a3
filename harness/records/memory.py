"""Counted and predicted memory in a Cell's Record."""

from __future__ import annotations

from harness.records.base_model import Bytes, FrozenModel

ALLOCATED = "cuda allocated"
"""The value of `Memory.source` if torch's allocator counted the peaks, which are then exact."""


class Predicted(FrozenModel):
    """Memory that the analytic model (`harness.memory_model`) predicts from a model's shape, before the Cell trains."""

    weights_B: Bytes
    """Predicted `weights_B` of the ledger."""
    adapter_B: Bytes
    """Predicted `adapter_B`."""
    gradients_B: Bytes
    """Predicted `gradients_B`."""
    optimizer_B: Bytes
    """Predicted `optimizer_B`."""
    optimizer_host_B: Bytes = 0
    """Predicted `optimizer_host_B`."""
    activations_B: Bytes | None = None
    """Activations saved for the backward pass, with texts of `max_tokens`; None without training, or where no
    formula is known."""
    logits_B: Bytes | None = None
    """Logits and their gradient, with texts of `max_tokens`; None also where only answers have logits."""
    step_B: Bytes = 0
    """Memory that exists only during the optimizer's step, without activations and logits: float32 gradients of
    its masters."""
    peak_B: Bytes | None = None
    """Predicted `counted_peak_B`: the peak of a step of the Cell's own loop on fake tensors
    (`harness/memory_model/dry_step.py`). In a Record, the step has the batches that were trained on; in a plan, it has
    the longest texts. None without training, and where `no_peak` gives the reason."""
    peak_by: str = ""
    """Code that took that step, if the Cell's code, or its base, cannot run on fake tensors."""
    no_peak: str = ""
    """Reason for no predicted peak."""
    untouched: str = ""
    """Note on weights of experts that are neither adapted nor packed, although the Cell adapts or packs all linear
    layers; empty if there are none."""

    @property
    def passing_B(self) -> int:  # noqa: N802  # a unit, as of the fields
        """Known bytes that each step allocates and frees: the larger of two parts that never exist at the same time."""
        return max((self.activations_B or 0) + (self.logits_B or 0), self.step_B)

    @property
    def total_B(self) -> int:  # noqa: N802
        """Highest known bytes on the device at one time: the larger one of two peaks, by formulas and by a step."""
        by_formulas = self.weights_B + self.adapter_B + self.gradients_B + self.optimizer_B + self.passing_B
        # The step was on a CPU, where the device's memory is also the host's memory.
        return max(by_formulas, (self.peak_B or 0) - self.optimizer_host_B)


class Memory(FrozenModel):
    """Memory ledger: bytes of tensors, counted one by one, and memory of the process. `phases` has the peaks of
    the phases."""

    source: str
    """Source of the peaks: `VmHWM`, `cuda allocated`, or `sampled`."""
    baseline_B: Bytes
    """Resident memory of the process after its imports, before the model is loaded."""
    weights_B: Bytes
    """Frozen weights, summed over tensors."""
    adapter_B: Bytes
    """Trainable tensors."""
    gradients_B: Bytes
    """Gradients of all trained tensors; with layer-wise updates, the largest gradient: only one exists at a time."""
    optimizer_B: Bytes
    """Optimizer states on the device."""
    optimizer_host_B: Bytes = 0
    """Optimizer states in the host's memory on a GPU run, e.g. paged ones; not in `optimizer_B`."""
    counted_peak_B: Bytes | None = None
    """Highest memory of tensors at one time in a training step, the weights included.

    On a CPU it is counted in one more step after the training, on the batch with the most tokens in one pass: existing
    tensors plus every allocation and release, so that equal programs have equal numbers. It includes GaLore's SVD only if
    that step has one; `harness/cell/measure/memory.py` lists the tensors that it misses. On a GPU it is the highest of
    all steps by torch's allocator. None without training, if the memory did not suffice for the count (see `notes`), and in
    older Records.
    """
    predicted: Predicted | None = None
    """Prediction from the model's shape."""
    not_predicted: str = ""
    """Reason for no prediction, where one was requested."""
