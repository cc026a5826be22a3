"""What the harness writes down of a Cell: what was asked and what was found. No torch here, and nothing computed.

Units are base units (seconds, bytes, 1); every number is finite. Fields are only ever added (`SCHEMA` counts removals
and changes of meaning, so that an old reader refuses what it would misread).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

from pydantic import Field, model_validator

from harness.records.base_model import Bytes as Bytes
from harness.records.base_model import Count, Joules
from harness.records.base_model import FrozenModel as FrozenModel
from harness.records.base_model import Json as Json
from harness.records.base_model import Scalar as Scalar
from harness.records.base_model import Seconds as Seconds
from harness.records.check import CheckResult as CheckResult
from harness.records.check import Outcome as Outcome
from harness.records.cost import Checkpoint, Energy, GpuPhase
from harness.records.memory import Memory as Memory
from harness.records.memory import Predicted as Predicted
from harness.records.training import LATER
from harness.records.training import Training as Training

SCHEMA = 1

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Optimizer = Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"]
Quantization = Literal["none", "nf4", "nf4-dq"]


class Status(StrEnum):
    """How one attempt at a Cell ended."""

    OK = "ok"
    NONCONFORMING = "nonconforming"
    OOM = "oom"
    TIMEOUT = "timeout"
    ERROR = "error"
    SKIPPED = "skipped"
    LOST = "lost"


class Base(FrozenModel):
    """The frozen weights under an adapter."""

    quantization: Quantization = "none"
    """`nf4-dq`: NF4 with double quantisation, that is, the constants of its blocks in 8 bits."""
    implementation: str = ""
    """Who quantises, e.g. `bitsandbytes`; empty when nothing is quantised."""

    def __str__(self) -> str:
        return self.quantization if not self.implementation else f"{self.quantization} ({self.implementation})"


DECODED = 8
"""Tokens that are decoded after a prompt of latencies, again and again where more are asked for; they take positions too."""
_LATER = ("skip", "latency", "prompt_batch", "prompt_tokens", "passes")


class Evaluation(FrozenModel):
    """What is scored."""

    items: int
    """The first `items` of the task's test split (after `skip`), the same for every Cell."""
    batch: int = 32
    skip: int = 0
    """Test items passed over before the first that is scored: what chooses a learning rate must not be what ranks it."""
    latency: bool = True
    """Whether latencies are measured as well: of Cells that differ in the seed alone, those of one may do."""
    prompt_batch: int = 1
    """Of latencies: prompts in a forward pass."""
    prompt_tokens: int = 32
    """Of latencies: tokens of each prompt, or as many as the model has positions for."""
    passes: int | None = None
    """Of latencies: timed passes (when decoding, tokens) of each variant, at least; None: a few."""

    def untimed(self) -> Evaluation:
        """Return the same without latencies, and so of no prompts."""
        return Evaluation(items=self.items, batch=self.batch, skip=self.skip, latency=False)

    def later(self) -> dict[str, Json]:
        """Return the fields that old Records lack, where they are not at their defaults."""
        defaults = Evaluation(items=0)
        return {name: value for name in _LATER if (value := getattr(self, name)) != getattr(defaults, name)}


class Cell(FrozenModel):
    """One point of a matrix. `cell_id` hashes exactly these fields: never the machine, never the suite's name."""

    model: str
    task: str
    method: str
    implementation: str
    config: dict[str, Json] = {}
    base: Base = Base()
    optimizer: Optimizer = "adamw"
    dtype: Dtype = "float32"
    seed: int = 0
    training: Training
    evaluation: Evaluation

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Cell:
        """Return a copy; one that is changed has an id of its own."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("cell_id", None)
        return copied

    @cached_property
    def cell_id(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON of this Cell.

        A later field of Training or Evaluation is in it only where it is not at its default: an old Cell keeps its id.
        """
        absent = {
            "training": {*LATER} - self.training.later().keys(),
            "evaluation": {*_LATER} - self.evaluation.later().keys(),
        }
        values = self.model_dump(mode="json", exclude=absent)
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def recipe(self) -> Cell:
        """This Cell with seed 0 and latencies: equal for Cells that differ in the seed, and in which seed has latencies."""
        if self.seed == 0 and self.evaluation.latency:
            return self
        timed = self.evaluation.model_copy(update={"latency": True})
        return self.model_copy(update={"seed": 0, "evaluation": timed})

    @property
    def recipe_id(self) -> str:
        """The recipe's cell_id: equal for Cells that are repeats of each other."""
        return self.recipe.cell_id

    @property
    def label(self) -> str:
        """A short name for tables and progress lines; unique inside most suites, `cell_id` always is."""
        rank = f" r={self.config['rank']}" if "rank" in self.config else ""
        method = "zero-shot" if self.method == "frozen" and self.training.steps == 0 else self.method
        if isinstance(any_method := self.config.get("adapter_config"), dict):  # `method: peft` says only whose it is
            method = f"{method} {str(any_method.get('peft_type', '')).lower()}"
        base = "" if self.base.quantization == "none" else f" on {self.base}"
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        optimizer = "" if self.optimizer == "adamw" else f" {self.optimizer}"
        told = self.training.later() if self.training.steps else {}
        later = "".join(f" {name}" if value is True else f" {name}={value:g}" for name, value in told.items())
        # Only what searches for a learning rate passes test items over.
        tried = f" tried with lr={self.training.lr:g}" if self.evaluation.skip else ""
        return f"{self.model} {method}{rank} [{self.implementation}]{base}{dtype}{optimizer}{later}{tried}"


class Phase(FrozenModel):
    """One phase in the life of a Cell."""

    name: str
    seconds: Seconds
    peak_memory_B: Bytes | None = None
    """Highest resident (CPU) or allocated (GPU) memory inside the phase; None where the system cannot say."""
    end_memory_B: Bytes | None = None
    load_start: float | None = None
    """The machine's load average over one minute, as the phase began; None where the system does not say."""
    load_end: float | None = None
    energy_J: Joules | None = None
    """Of what `Energy.source` counts; None where nothing does, and for a phase of under 2 s, which no counter resolves."""
    gpu: GpuPhase | None = None
    """Of a run on a GPU."""


class TrainingMeasured(FrozenModel):
    """Raw training samples, one entry per optimizer step. Warm-up steps are real steps, only marked."""

    losses: list[float]
    step_seconds: list[Seconds]
    """Forward, backward, optimizer step; no tokenising, no evaluation."""
    tokens: list[Count]
    """Real tokens of each step, padding not counted."""
    padded_tokens: list[Count]
    gradient_norms: list[float]
    timing_warmup: int
    """The first steps, not to be counted as steady state."""
    cpu_seconds: Seconds | None = None
    """CPU time of the whole process, all its threads, over the time of all `step_seconds`: far less than that time times
    the threads means that they waited, e.g. for other processes."""
    optimizer: dict[str, Json] = {}
    """The optimizer as it was: its class, what paged its states, and the numbers of each of its groups."""
    text_rules: str = ""
    """How texts became tokens, and which of them carry loss."""
    cut_examples: int | None = None
    """Of the trained examples, those that were too long and lost something; None where nobody counted."""
    data_order_sha256: str = ""
    """Over the ids of the examples of every batch, in order: equal for two Records that were trained on the same."""
    initial_state_sha256: str = ""
    """Over names, dtypes, shapes and bytes of all that trains, as training began."""


class Latency(FrozenModel):
    """Raw forward times of one variant of the model."""

    variant: Literal["base", "unmerged", "merged", "multi-adapter"]
    """`multi-adapter`: every row of the batch goes through an adapter of its own."""
    kind: Literal["forward", "prefill", "decode"]
    """`decode` is seconds per generated token, with a key-value cache."""
    batch: int
    tokens: int
    seconds: list[Seconds]
    because: str = ""
    """Why there are no samples, if there are none."""
    adapters: int | None = None
    """How many adapters a batch of several mixes: as many as rows, or 1, the same batch beside it. None of other batches."""


class Item(FrozenModel):
    """One scored test item."""

    id: str
    correct: int


class Accuracy(FrozenModel):
    """Task accuracy on `items`, with its interval for a new sample of items (one seed: says nothing of seeds)."""

    metric: str
    scored_by: str
    """`lm-eval <version>` or `harness`."""
    value: float
    low: float
    high: float
    interval: str
    """How the interval was made, e.g. `Wilson 95 %`."""
    items: list[Item]
    cut_items: int | None = None
    """Of the items, those whose text was longer than `max_tokens` and lost something; None where nobody counted."""

    @model_validator(mode="after")
    def _items_decide_the_value(self) -> Accuracy:
        if self.items and not math.isclose(share := fmean(item.correct for item in self.items), self.value):
            raise ValueError(f"an accuracy of {self.value} over items of which {share} are right")
        return self


class Parameters(FrozenModel):
    """Counts of scalars. `adapter` and `head` train, the rest of `total` is frozen (or trains, for full fine-tuning)."""

    adapter: Count
    head: Count
    total: Count

    @property
    def trainable(self) -> int:
        """What the optimizer updates."""
        return self.adapter + self.head


class Measurements(FrozenModel):
    """Everything measured; exists only in an `ok` Record."""

    parameters: Parameters
    training: TrainingMeasured | None
    memory: Memory
    latency: list[Latency]
    accuracy: Accuracy | None
    checkpoint: Checkpoint | None = None
    energy: Energy | None = None


class Failure(FrozenModel):
    """Why an attempt did not end well."""

    kind: str
    """Exception class, signal name, or the runner's own word."""
    message: str
    traceback: str = ""
    phase: str = ""
    requested_B: Bytes | None = None
    """What an out-of-memory allocation asked for."""
    last_peak_B: Bytes | None = None


class Environment(FrozenModel):
    """Where a Record was made. `id` hashes `software` and `machine`: what must agree for timings to be comparable."""

    id: str
    software: dict[str, str]
    machine: dict[str, str]
    code_version: str
    """SHA-256 over the Python files of harness/ and reference/: exact also outside a checkout."""
    git_sha: str = ""
    git_dirty: bool | None = None
    threads: int | None = None
    extra: dict[str, Json] = {}


class AssetUse(FrozenModel):
    """A model, data set or task that a Cell used."""

    name: str
    source: str
    sha256: str = ""
    revision: str = ""
    licence: str = ""


class Provider(FrozenModel):
    """The distribution that an implementation came from."""

    distribution: str
    version: str


class Record(FrozenModel):
    """The immutable outcome of one attempt at a Cell."""

    schema_: int = Field(default=SCHEMA, alias="schema")
    run: str
    cell_id: str
    attempt: int
    status: Status
    because: str = ""
    """Why the status is not `ok`, in one sentence."""
    cell: Cell
    provider: Provider | None = None
    environment: Environment
    device: str = ""
    """`cpu` or `cuda`."""
    assets: list[AssetUse] = []
    """The model, the data and the task, as they were: what a name alone does not say."""
    layers: list[str] = []
    """Paths of the layers of this model that the Cell's targets stand for (or of every linear layer, for a Method without
    targets); empty where it was not got so far."""
    started: str
    """UTC, ISO 8601."""
    duration_s: Seconds
    phases: list[Phase] = []
    checks: list[CheckResult] = []
    measurements: Measurements | None = None
    failure: Failure | None = None
    notes: list[str] = []
    """What a reader of the numbers must know, e.g. why a rerun would not be bitwise equal."""

    @model_validator(mode="after")
    def _status_decides_content(self) -> Record:
        if (self.measurements is not None) != (self.status is Status.OK):
            raise ValueError(f"measurements belong to an ok Record and to no other; status is {self.status}")
        if self.status is not Status.OK and not self.because:
            raise ValueError(f"a Record with status {self.status} must say why")
        if self.cell_id != self.cell.cell_id:
            raise ValueError(f"cell_id {self.cell_id} does not belong to this Cell ({self.cell.cell_id})")
        return self

    @property
    def id(self) -> str:
        """The name other files use for this Record: `cell_id.attempt`."""
        return f"{self.cell_id}.{self.attempt}"
