"""Measurements in a Cell's Record: raw samples, counts, per-item results."""

from __future__ import annotations

import math
from functools import cached_property
from statistics import fmean
from typing import Literal

from pydantic import Field, model_validator

from harness.records.base_model import Count, FrozenModel, Json, Seconds
from harness.records.cost import Checkpoint, Energy
from harness.records.memory import Memory
from harness.records.served import Served


class TrainingMeasured(FrozenModel):
    """Raw samples of the training. Each list has one entry per optimizer step, warm-up steps included."""

    losses: list[float]
    """Training loss of each step, in nats."""
    step_seconds: list[Seconds]
    """Wall time of each step: forward, backward and optimizer. Tokenising and evaluation are not included."""
    tokens: list[Count]
    """Number of tokens in each step, without padding."""
    padded_tokens: list[Count]
    """Number of tokens in each step, padding included."""
    gradient_norms: list[float]
    """Norm of the gradient in each step."""
    timing_warmup: int
    """Number of warm-up steps at the start. Statistics of step times leave these steps out."""
    cpu_seconds: Seconds | None = None
    """CPU seconds of all threads of the process, summed over all steps. Fully busy threads would spend the sum of
    `step_seconds` times the number of threads. If the value is far less, the threads waited, e.g. for other
    processes."""
    outside_seconds: Seconds | None = None
    """Seconds between the timed steps, in which the training loop makes the next batch, steps the schedule and logs. None
    for the harness's own loop, whose batches are ready before the first step."""
    optimizer: dict[str, Json] = Field(default={})
    """Facts about the optimizer: its class, the settings of each parameter group, and the paging of its states, if any."""
    text_rules: str = ""
    """Description of how texts became tokens, and for which tokens a loss is computed."""
    cut_examples: int | None = None
    """Number of training examples that were truncated because they were too long. None if they were not counted."""
    data_order_sha256: str = ""
    """SHA-256 over the training examples of every batch, in order. Two Records have equal hashes if they were trained
    on the same data in the same order."""
    initial_state_sha256: str = ""
    """SHA-256 over the names, dtypes, shapes and values of all trained tensors, before the first step."""


class Latency(FrozenModel):
    """Times of inference with one variant of the model, for one kind of pass."""

    variant: Literal["base", "unmerged", "merged", "multi-adapter"]
    """Variant of the model. In `multi-adapter`, each row of the batch has a different adapter."""
    kind: Literal["forward", "prefill", "decode"]
    """Kind of pass. A pass of `decode` generates one token, with a key-value cache."""
    batch: int
    """Number of prompts in the batch."""
    tokens: int
    """Number of tokens in each prompt. For `decode`, number of generated tokens."""
    seconds: list[Seconds]
    """Seconds of each timed pass."""
    because: str = ""
    """Reason why `seconds` is empty. Empty if passes were timed."""
    adapters: int | None = None
    """Number of different adapters in the batch. It is 1 for an equally large batch with a single adapter, which is
    timed for comparison. None for all other latencies."""


class Item(FrozenModel):
    """One scored test item."""

    id: str
    """Id of the test item, the same for every Cell that scores it."""
    correct: int
    """1 if the answer is right, 0 if not."""


class Accuracy(FrozenModel):
    """Accuracy on `items`, with a confidence interval."""

    metric: str
    """Name of the task's metric."""
    scored_by: str
    """Scorer: `lm-eval <version>` or `harness`."""
    value: float
    """Share of items with a right answer, from 0 to 1."""
    low: float
    """Lower end of the confidence interval of the accuracy. The interval accounts for the choice of items. Other seeds
    may give values outside it."""
    high: float
    """Upper end of the confidence interval of the accuracy."""
    interval: str
    """Kind of interval, e.g. `Wilson 95 %`."""
    items: list[Item]
    """Scored items."""
    cut_items: int | None = None
    """Number of scored items that were truncated to `max_tokens`. None if they were not counted."""

    @cached_property
    def answers(self) -> dict[str, int]:
        """Map from the id of each item to 1 for a right answer, or to 0 for a wrong answer."""
        return {item.id: item.correct for item in self.items}

    @model_validator(mode="after")
    def _items_decide_the_value(self) -> Accuracy:
        if self.items and not math.isclose(share := fmean([item.correct for item in self.items]), self.value):
            raise ValueError(f"the accuracy is {self.value}, but {share} of its items are right")
        return self


class Parameters(FrozenModel):
    """Numbers of scalars. `adapter` and `head` are trained. All other scalars in `total` are frozen."""

    adapter: Count
    """Number of scalars that the Method trains."""
    head: Count
    """Number of scalars in a new task head, which is trained too."""
    total: Count
    """Number of scalars in the whole model."""

    @property
    def trainable(self) -> int:
        """Number of scalars that the optimizer updates."""
        return self.adapter + self.head


class Measurements(FrozenModel):
    """Everything that was measured. Only a Record with status `ok` has measurements."""

    parameters: Parameters
    """Numbers of trained scalars and of all scalars."""
    training: TrainingMeasured | None
    """Samples of the training. None if the Cell was not trained."""
    memory: Memory
    """Memory ledger: the bytes of each kind of tensor, as measured and as predicted."""
    latency: list[Latency]
    """Times of inference, for each variant of the model and kind of pass."""
    accuracy: Accuracy | None
    """Accuracy on the test items. None if nothing was scored."""
    checkpoint: Checkpoint | None = None
    """Sizes of checkpoint files. None in Records that are older than this field."""
    energy: Energy | None = None
    """Counter that measured the energy of the phases. None in Records that are older than this field."""
    served: Served | None = None
    """Times of a model server with the Cell's adapters. None if the Cell was not served."""
