"""Counted and predicted memory in a Cell's Record."""

from __future__ import annotations

from harness.records.base_model import Bytes, FrozenModel

ALLOCATED = "cuda allocated"
"""Value of `Memory.source` if torch's allocator counted the peaks. Such peaks are exact."""


class Predicted(FrozenModel):
    """Memory that `harness.memory_model` predicts from the sizes of a model, before the Cell trains."""

    weights_B: Bytes
    """Prediction of `Memory.weights_B`."""
    adapter_B: Bytes
    """Prediction of `Memory.adapter_B`."""
    gradients_B: Bytes
    """Prediction of `Memory.gradients_B`."""
    optimizer_B: Bytes
    """Prediction of `Memory.optimizer_B`."""
    optimizer_host_B: Bytes = 0
    """Prediction of `Memory.optimizer_host_B`."""
    activations_B: Bytes | None = None
    """Bytes of the activations that are saved for the backward pass, if every text has `max_tokens` tokens. None
    without training, or without a known formula."""
    logits_B: Bytes | None = None
    """Bytes of the logits and of their gradient, if every text has `max_tokens` tokens. None without training, without
    a known formula, or if only the tokens of answers have logits."""
    step_B: Bytes = 0
    """Bytes that exist only while the optimizer takes its step: float32 gradients of the master weights. Activations
    and logits are not included."""
    peak_B: Bytes | None = None
    """Prediction of `Memory.counted_peak_B`. To compute it, the Cell's own training loop takes one step on fake tensors
    (`harness/memory_model/dry_step.py`). In a Record, the step uses the batches of the training. In a plan, it uses the
    longest texts. None without training, and where `no_peak` gives a reason."""
    peak_by: str = ""
    """Replacement for the Cell's own code or base in the step for `peak_B`, because the original cannot run on fake
    tensors. Empty if nothing was replaced."""
    no_peak: str = ""
    """Reason why a Cell with training has no `peak_B`. Otherwise empty."""
    untouched: str = ""
    """Note on weights of experts that the Cell leaves unadapted and unpacked, although it adapts, or packs into 4 bits,
    all linear layers. Empty if the model has no such weights."""

    @property
    def passing_B(self) -> int:  # noqa: N802  # a unit, as of the fields
        """Known bytes that each training step allocates and frees again.

        Activations and logits are freed before `step_B` is allocated, so only the larger of the two is included.
        """
        return max((self.activations_B or 0) + (self.logits_B or 0), self.step_B)

    @property
    def total_B(self) -> int:  # noqa: N802
        """Highest known number of bytes on the device at one time.

        This is the larger of two predictions: the sum of the predicted parts, and `peak_B`.
        """
        by_formulas = self.weights_B + self.adapter_B + self.gradients_B + self.optimizer_B + self.passing_B
        # `peak_B` was counted on a CPU, so it includes the states that a run on a GPU keeps in the host's memory.
        return max(by_formulas, (self.peak_B or 0) - self.optimizer_host_B)


class Memory(FrozenModel):
    """Memory ledger: the bytes of tensors, counted one by one. The peak of each phase is in `Record.phases`."""

    source: str
    """Source of the peaks: `VmHWM` (Linux kernel), `cuda allocated` (torch's allocator), or `sampled` (a thread)."""
    baseline_B: Bytes
    """Resident memory of the process after its imports, before the model is loaded."""
    weights_B: Bytes
    """Bytes of the frozen weights."""
    adapter_B: Bytes
    """Bytes of the trainable tensors."""
    gradients_B: Bytes
    """Bytes of the gradients of all trained tensors. With layer-wise updates, only one gradient exists at a time, so
    these are the bytes of the largest one."""
    optimizer_B: Bytes
    """Bytes of the optimizer's states on the device."""
    optimizer_host_B: Bytes = 0
    """Bytes of the optimizer states that a run on a GPU keeps in the host's memory, e.g. paged states. `optimizer_B`
    does not include these states."""
    counted_peak_B: Bytes | None = None
    """Highest memory of tensors at one time in a training step, the weights included.

    On a CPU, the tensors are counted in one more step after the training. This step uses the batch with the most tokens
    in one pass. The count starts with the existing tensors and follows every allocation and release, so that equal
    programs have equal numbers. The count includes GaLore's SVD only if this extra step computes one.
    `harness/cell/measure/memory.py` lists the tensors that the count misses. On a GPU, torch's allocator reports the
    highest value of all steps. None without training, in older Records, and if the memory did not suffice for the count
    (see `Record.notes`).
    """
    predicted: Predicted | None = None
    """Predicted memory. None if there is no prediction."""
    not_predicted: str = ""
    """Reason why a requested prediction is missing."""
