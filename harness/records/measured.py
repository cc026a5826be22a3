"""Measurements in a Cell's Record: raw samples, counts, per-item results."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Literal

from pydantic import Field, model_validator

from harness.records.base_model import Count, FrozenModel, Json, Seconds
from harness.records.cost import Checkpoint, Energy
from harness.records.memory import Memory


class TrainingMeasured(FrozenModel):
    """Raw training samples, one entry per optimizer step. Warm-up steps are real steps, only marked."""

    losses: list[float]
    """Training loss of each step, in nats."""
    step_seconds: list[Seconds]
    """Wall time of each step: forward, backward, optimizer; no tokenising, no evaluation."""
    tokens: list[Count]
    """Real tokens of each step, padding not counted."""
    padded_tokens: list[Count]
    """Tokens of each step, padding counted."""
    gradient_norms: list[float]
    """Gradient norm of each step."""
    timing_warmup: int
    """Number of first steps that do not count as steady state."""
    cpu_seconds: Seconds | None = None
    """CPU time that all threads of the process spent during all `step_seconds`. If it is far less than the sum of
    `step_seconds` multiplied by the number of threads, the threads waited, e.g. for other processes."""
    optimizer: dict[str, Json] = Field(default={})
    """Optimizer: its class, the pager of its states, and the numbers of each of its groups."""
    text_rules: str = ""
    """Rules by which texts became tokens, and which tokens carry loss."""
    cut_examples: int | None = None
    """Trained examples that were too long and were cut; None: not counted."""
    data_order_sha256: str = ""
    """Hash over the ids of the examples of every batch, in order: equal for two Records that were trained on the
    same data."""
    initial_state_sha256: str = ""
    """Hash over names, dtypes, shapes and bytes of all trained tensors, before the first step."""


class Latency(FrozenModel):
    """Raw forward times of one variant of the model."""

    variant: Literal["base", "unmerged", "merged", "multi-adapter"]
    """Variant of the model. `multi-adapter`: each row of the batch has a different adapter."""
    kind: Literal["forward", "prefill", "decode"]
    """Kind of pass. A pass of `decode` generates one token, with a key-value cache."""
    batch: int
    """Prompts in the batch."""
    tokens: int
    """Tokens of the prompt; for `decode`, generated tokens."""
    seconds: list[Seconds]
    """Seconds of each pass or token."""
    because: str = ""
    """Reason for no samples."""
    adapters: int | None = None
    """Adapters in the batch: one per row, or 1 for the same batch with a single adapter; None for other variants."""


class Item(FrozenModel):
    """One scored test item."""

    id: str
    """Id of the test item, the same for every Cell that scores it."""
    correct: int
    """1 if the answer is right, 0 if not."""


class Accuracy(FrozenModel):
    """Accuracy on `items`, with its interval for a new sample of items. The interval does not cover other seeds."""

    metric: str
    """Metric of the task."""
    scored_by: str
    """Scorer: `lm-eval <version>` or `harness`."""
    value: float
    """Share of the items that are right."""
    low: float
    """Lower end of the interval for a new sample of items; it does not cover other seeds."""
    high: float
    """Upper end of the same interval."""
    interval: str
    """Kind of interval, e.g. `Wilson 95 %`."""
    items: list[Item]
    """Scored items."""
    cut_items: int | None = None
    """Scored items that were longer than `max_tokens` and were cut; None: not counted."""

    @property
    def answers(self) -> dict[str, int]:
        """Id of each item -> 1 if the answer is right, 0 if not."""
        return {item.id: item.correct for item in self.items}

    @model_validator(mode="after")
    def _items_decide_the_value(self) -> Accuracy:
        if self.items and not math.isclose(share := fmean(item.correct for item in self.items), self.value):
            raise ValueError(f"the accuracy is {self.value}, but {share} of its items are right")
        return self


class Parameters(FrozenModel):
    """Counts of scalars. `adapter` and `head` train; the rest of `total` is frozen. Full fine-tuning has no rest."""

    adapter: Count
    """Scalars that the Method trains."""
    head: Count
    """Scalars of a new task head, trained too."""
    total: Count
    """Scalars of the whole model."""

    @property
    def trainable(self) -> int:
        """Number of scalars that the optimizer updates."""
        return self.adapter + self.head


class Measurements(FrozenModel):
    """Everything that was measured; exists only in an `ok` Record."""

    parameters: Parameters
    """Counts of scalars."""
    training: TrainingMeasured | None
    """Samples of the training; None without training."""
    memory: Memory
    """Memory ledger."""
    latency: list[Latency]
    """Latencies."""
    accuracy: Accuracy | None
    """Accuracy; None where nothing was scored."""
    checkpoint: Checkpoint | None = None
    """Sizes of files; None in Records from before they were measured."""
    energy: Energy | None = None
    """Source of the energy of the phases; None in Records from before it was measured."""
