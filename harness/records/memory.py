"""The memory of a Cell, as its Record holds it: what was counted, and what its model's shape let expect."""

from __future__ import annotations

from harness.records.base_model import Bytes, FrozenModel


class Predicted(FrozenModel):
    """What the analytic memory model (`harness.memory_model`) says of a Cell from its model's shape alone, before it trains."""

    weights_B: Bytes
    adapter_B: Bytes
    gradients_B: Bytes
    optimizer_B: Bytes
    optimizer_host_B: Bytes = 0
    activations_B: Bytes | None = None
    """Of one pass with texts as long as `max_tokens` allows; None without training, or where no formula is known."""
    logits_B: Bytes | None = None
    """Of the same; None too where only answers have logits."""
    step_B: Bytes = 0
    """What exists only while the optimizer steps, when activations and logits are gone: float32 gradients of its masters."""
    peak_B: Bytes | None = None
    """The most that tensors take at one time in a training step on a CPU, of `counted_peak_B` to be: by a step of the Cell's
    own loop on tensors without data (`harness/memory_model/dry_step.py`). In a Record of the very batches that were trained on,
    in a plan of the longest texts. None without training, and where `no_peak` says why."""
    peak_by: str = ""
    """Whose code took that step, where the Cell's own, or that of its base, cannot do without data."""
    no_peak: str = ""
    untouched: str = ""
    """How many weights neither `all-linear` nor a base in 4 bits reaches, though the Cell means all: those of experts."""

    @property
    def passing_B(self) -> int:  # noqa: N802  # a unit, as of the fields
        """What comes and goes in every step, as far as it is known: of the two that are never there together, the larger."""
        return max((self.activations_B or 0) + (self.logits_B or 0), self.step_B)

    @property
    def total_B(self) -> int:  # noqa: N802
        """The most that is on the device at one time, as far as it is known, by formulas or by a step: the larger."""
        by_formulas = self.weights_B + self.adapter_B + self.gradients_B + self.optimizer_B + self.passing_B
        # The step was on a CPU, whose memory is that of the device and the host.
        return max(by_formulas, (self.peak_B or 0) - self.optimizer_host_B)


class Memory(FrozenModel):
    """The ledger: bytes of tensors counted one by one, and what the process took. Peaks per phase are in `phases`."""

    source: str
    """How peaks were taken: `VmHWM`, `cuda allocated`, or `sampled`."""
    baseline_B: Bytes
    """Resident memory of the process after its imports, before the model was loaded."""
    weights_B: Bytes
    adapter_B: Bytes
    gradients_B: Bytes
    """Of all that trains; with layer-wise updates the most that there was at one time: of the largest tensor alone."""
    optimizer_B: Bytes
    optimizer_host_B: Bytes = 0
    """Of a run on a GPU: optimizer states in the host's memory, e.g. paged ones; not in `optimizer_B`."""
    counted_peak_B: Bytes | None = None
    """The most that tensors took at one time in a training step, the weights and all that was there before included.

    On a CPU of one more step after the training (GaLore's SVD is in it only where that step has one), over the batch of
    which the model takes the most tokens at once: what was there plus every allocation and release, so that equal programs
    have the same number (`harness/cell/measure/allocations.py` says what it does not see). On a GPU the highest of all steps, as
    torch's allocator tells it. None without training, where there was no memory to count it in (`notes` says so), and in
    Records from before it was counted.
    """
    predicted: Predicted | None = None
    not_predicted: str = ""
    """Why there is no prediction, where one was asked for."""
