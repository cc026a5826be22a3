"""The Record of one attempt at a Cell: the request and the findings. Imports no torch, and computes nothing.

Units are base units (seconds, bytes, 1); every number is finite. Fields may be added. `SCHEMA` counts removals and changes
of meaning, so that an old reader refuses a file that it would misread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from harness.records.base_model import Bytes as Bytes
from harness.records.base_model import ExtendedModel, Joules
from harness.records.base_model import FrozenModel as FrozenModel
from harness.records.base_model import Json as Json
from harness.records.base_model import Scalar as Scalar
from harness.records.base_model import Seconds as Seconds
from harness.records.check import CheckResult as CheckResult
from harness.records.check import Outcome as Outcome
from harness.records.cost import GpuPhase
from harness.records.measured import Accuracy as Accuracy
from harness.records.measured import Item as Item
from harness.records.measured import Latency as Latency
from harness.records.measured import Measurements as Measurements
from harness.records.measured import Parameters as Parameters
from harness.records.measured import TrainingMeasured as TrainingMeasured
from harness.records.memory import Memory as Memory
from harness.records.memory import Predicted as Predicted
from harness.records.training import Training as Training

SCHEMA = 1
ADAPTER_CONFIG = "adapter_config"
"""Key of a Cell's config that holds the whole config of any adapter of PEFT (`method: peft`)."""

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Optimizer = Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"]
Quantization = Literal["none", "nf4", "nf4-dq"]


class Status(StrEnum):
    """Outcome of one attempt at a Cell."""

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
    """Quantisation of the frozen weights. `nf4-dq` is NF4 with double quantisation: the constants of its blocks
    are stored in 8 bits."""
    implementation: str = ""
    """Implementation that quantises, e.g. `bitsandbytes`; empty when nothing is quantised."""

    def __str__(self) -> str:
        return self.quantization if not self.implementation else f"{self.quantization} ({self.implementation})"


DECODED = 8
"""Number of tokens decoded after the prompt of a latency. If more are requested, decoding is repeated. The tokens take
positions of the model too."""


class Evaluation(ExtendedModel):
    """Settings for the scoring and for the latencies of a Cell."""

    items: int
    """Test items: the first `items` of the task's test split (after `skip`), the same for every Cell."""
    batch: int = 32
    """Test items per forward pass."""
    skip: int = 0
    """Test items before the first scored one. Items that choose a learning rate must not also score ranked Cells."""
    latency: bool = True
    """Whether latencies are measured. One of several Cells that differ only in the seed is enough."""
    prompt_batch: int = 1
    """Prompts in a forward pass of a latency."""
    prompt_tokens: int = 32
    """Tokens of each prompt of a latency, limited to the model's positions."""
    passes: int | None = None
    """Minimum of timed passes (when decoding, tokens) for each variant of a latency; None: a few."""

    later_fields: ClassVar = ("skip", "latency", "prompt_batch", "prompt_tokens", "passes")

    def untimed(self) -> Evaluation:
        """Return the same evaluation without latencies."""
        return Evaluation(items=self.items, batch=self.batch, skip=self.skip, latency=False)


class Cell(FrozenModel):
    """One point of a matrix. `cell_id` hashes exactly these fields: never the machine, never the suite's name."""

    model: str
    """Base model."""
    task: str
    """Task that is trained and scored."""
    method: str
    """Method, e.g. `lora`; see `peft-harness list methods`."""
    implementation: str
    """Implementation of the Method, e.g. `hf-peft`."""
    config: dict[str, Json] = {}
    """Config of the Method."""
    base: Base = Base()
    """Frozen weights under the adapter."""
    optimizer: Optimizer = "adamw"
    """Optimizer of all trained tensors."""
    dtype: Dtype = "float32"
    """Dtype of weights and computation."""
    seed: int = 0
    """Seed of all random numbers."""
    training: Training
    """Training budget and recipe."""
    evaluation: Evaluation
    """Scoring and latencies."""

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Cell:
        """Return a copy. A changed copy has a different cell_id."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("cell_id", None)
        return copied

    @cached_property
    def cell_id(self) -> str:
        """The first 16 hex digits of the SHA-256 over the Cell's canonical JSON.

        The JSON includes later fields of Training and Evaluation only if they differ from their defaults, so that the ids
        of older Cells stay the same.
        """
        parts: dict[str, ExtendedModel] = {"training": self.training, "evaluation": self.evaluation}
        absent = {name: {*part.later_fields} - part.later().keys() for name, part in parts.items()}
        values = self.model_dump(mode="json", exclude=absent)
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def recipe(self) -> Cell:
        """This Cell with seed 0 and with latencies. Cells that differ only in these two points have equal recipes."""
        if self.seed == 0 and self.evaluation.latency:
            return self
        timed = self.evaluation.model_copy(update={"latency": True})
        return self.model_copy(update={"seed": 0, "evaluation": timed})

    @property
    def recipe_id(self) -> str:
        """The cell_id of the recipe. Repeats of a Cell with other seeds have the same recipe_id."""
        return self.recipe.cell_id

    @property
    def label(self) -> str:
        """A short name for tables and progress lines. It is unique in most suites; `cell_id` is always unique."""
        rank = f" r={self.config['rank']}" if "rank" in self.config else ""
        method = "zero-shot" if self.method == "frozen" and self.training.steps == 0 else self.method
        if isinstance(any_method := self.config.get(ADAPTER_CONFIG), dict):  # `method: peft` names only the library
            method = f"{method} {str(any_method.get('peft_type', '')).lower()}"
        base = "" if self.base.quantization == "none" else f" on {self.base}"
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        optimizer = "" if self.optimizer == "adamw" else f" {self.optimizer}"
        settings = self.training.later() if self.training.steps else {}
        later = "".join(f" {name}" if value is True else f" {name}={value:g}" for name, value in settings.items())
        # Cells skip test items only in a search for a learning rate.
        tried = f" tried with lr={self.training.lr:g}" if self.evaluation.skip else ""
        return f"{self.model} {method}{rank} [{self.implementation}]{base}{dtype}{optimizer}{later}{tried}"


class Phase(FrozenModel):
    """One phase of a Cell."""

    name: str
    """Name of the phase, e.g. `train`."""
    seconds: Seconds
    """Wall time."""
    peak_memory_B: Bytes | None = None
    """Highest resident (CPU) or allocated (GPU) memory inside the phase; None if the system does not report it."""
    end_memory_B: Bytes | None = None
    """Memory at the end of the phase."""
    load_start: float | None = None
    """Load average of the machine over one minute at the start of the phase; None where the system has none."""
    load_end: float | None = None
    """Load average at the end of the phase."""
    energy_J: Joules | None = None
    """Energy by the counter `Energy.source`; None without a counter, and for phases of less than 2 s, which no counter
    resolves."""
    gpu: GpuPhase | None = None
    """State of the GPU; None on a CPU."""


class Failure(FrozenModel):
    """Cause of a failed attempt."""

    kind: str
    """Exception class, signal name, or the runner's own term."""
    message: str
    """Message of the exception or the runner."""
    traceback: str = ""
    phase: str = ""
    """Phase in which it failed."""
    requested_B: Bytes | None = None
    """Size of the allocation that ran out of memory."""
    last_peak_B: Bytes | None = None
    """Highest memory before it failed."""


class Environment(FrozenModel):
    """Machine and software that a Record was made with."""

    id: str
    """Hash of `software` and `machine`. Timings are comparable only if it is equal."""
    software: dict[str, str]
    """Versions by library."""
    machine: dict[str, str]
    """CPU, cores, memory, system and GPUs."""
    code_version: str
    """SHA-256 over the Python files of harness/ and reference/: exact also outside a checkout."""
    git_sha: str = ""
    """Commit of the checkout; empty outside one."""
    git_dirty: bool | None = None
    """Whether the checkout had uncommitted changes; None if unknown."""
    threads: int | None = None
    """Threads that torch computes with."""
    extra: dict[str, Json] = {}
    """Further facts from the worker: variables, determinism, build of torch."""


class AssetUse(FrozenModel):
    """A model, data set or task that a Cell used."""

    name: str
    """Name in the suite."""
    source: str
    """Address, or the rule that generates it."""
    sha256: str = ""
    """Hash of its files."""
    revision: str = ""
    """Commit of a hub repository."""
    licence: str = ""
    """Licence of its publisher."""


class Provider(FrozenModel):
    """Distribution that an implementation comes from."""

    distribution: str
    """Distribution that the implementation comes from."""
    version: str
    """Version of the distribution."""


class NoteKind(StrEnum):
    """Kinds of notes that programs read."""

    UNREACHED_EXPERTS = "unreached-experts"


class Note(FrozenModel):
    """A note with its kind."""

    kind: NoteKind
    """Kind of the note."""
    text: str
    """Text, as in `notes`."""


class Record(FrozenModel):
    """The immutable outcome of one attempt at a Cell."""

    schema_: int = Field(default=SCHEMA, alias="schema")
    run: str
    """Id of the run."""
    cell_id: str
    """Id of the Cell."""
    attempt: int
    """Number of the attempt at the Cell, from 1."""
    status: Status
    """Outcome of the attempt: ok, or how it ended; see `peft-harness explain STATUS`."""
    because: str = ""
    """Reason why the status is not `ok`, in one sentence."""
    cell: Cell
    """The Cell that was attempted."""
    provider: Provider | None = None
    """Distribution of the implementation; None if it was not loaded."""
    environment: Environment
    """Machine and software."""
    device: str = ""
    """Device: `cpu` or `cuda`."""
    assets: list[AssetUse] = []
    """Model, data and task with their hashes: a name does not identify the content."""
    layers: list[str] = []
    """Paths of the adapted layers (of all linear layers, for a Method without targets); empty if the attempt ended
    earlier."""
    started: str
    """Start of the attempt in UTC, ISO 8601."""
    duration_s: Seconds
    """Wall time of the attempt."""
    phases: list[Phase] = []
    """Phases in order."""
    checks: list[CheckResult] = []
    """Results of the checks."""
    measurements: Measurements | None = None
    """Measurements; None unless the status is `ok`."""
    failure: Failure | None = None
    """Failure of an attempt that raised, was killed, or was prevented from running."""
    notes: list[str] = []
    """Remarks for readers of the numbers, e.g. why a rerun would not be bitwise equal."""
    typed_notes: list[Note] = []
    """Notes for programs, each also in `notes`; empty in older Records."""
    concurrent_cells: int | None = None
    """Number of Cells, this one included, that may have run on the machine at the same time; None in older Records, see
    `harness.records.notes`."""

    @model_validator(mode="after")
    def _status_decides_content(self) -> Record:
        if (self.measurements is not None) != (self.status is Status.OK):
            raise ValueError(f"only an ok Record has measurements, and it must; status is {self.status}")
        if self.status is not Status.OK and not self.because:
            raise ValueError(f"a Record with status {self.status} needs `because`")
        if self.cell_id != self.cell.cell_id:
            raise ValueError(f"cell_id {self.cell_id} does not belong to this Cell ({self.cell.cell_id})")
        return self

    @property
    def id(self) -> str:
        """The name of this Record in other files: `cell_id.attempt`."""
        return f"{self.cell_id}.{self.attempt}"

    @property
    def training(self) -> TrainingMeasured | None:
        """Measurements of the training; None without a training."""
        return self.measurements.training if self.measurements else None

    @property
    def accuracy(self) -> Accuracy | None:
        """Accuracy on the test items; None if the Cell was not scored."""
        return self.measurements.accuracy if self.measurements else None
