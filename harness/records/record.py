"""The Record of one attempt at a Cell: what was requested, and what was found.

This module imports no torch and computes nothing. Units are base units (seconds, bytes, 1), and every number is finite.
New versions may add fields. If a version removes a field or changes its meaning, it increases `SCHEMA`, so that an old
reader refuses a file that it would misread.
"""

from __future__ import annotations

import hashlib
import json
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
from harness.records.gate import Gate as Gate
from harness.records.imported import Imported as Imported
from harness.records.measured import Accuracy as Accuracy
from harness.records.measured import Item as Item
from harness.records.measured import Latency as Latency
from harness.records.measured import Measurements as Measurements
from harness.records.measured import Parameters as Parameters
from harness.records.measured import TrainingMeasured as TrainingMeasured
from harness.records.memory import Memory as Memory
from harness.records.memory import Predicted as Predicted
from harness.records.training import Loop as Loop
from harness.records.training import Training as Training

SCHEMA = 1
ADAPTER_CONFIG = "adapter_config"
"""Key in the config of a Cell with `method: peft`. The value is the complete config of a PEFT adapter of any type."""
ADAPTER_SHA256 = "adapter_sha256"
"""Key in the config of a Cell that evaluates an imported adapter. The value is the SHA-256 of the adapter's tensors."""

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Optimizer = Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"]
Quantization = Literal["none", "nf4", "nf4-dq"]
WorkerStart = Literal["", "process", "fork"]


class Status(StrEnum):
    """Outcome of one attempt at a Cell."""

    OK = "ok"
    NONCONFORMING = "nonconforming"
    UNTRAINED = "untrained"
    OOM = "oom"
    TIMEOUT = "timeout"
    ERROR = "error"
    SKIPPED = "skipped"
    LOST = "lost"

    @property
    def departs(self) -> bool:
        """True if the implementation is at fault: it differs from the reference, or leaves a tensor untrained."""
        return self in (Status.NONCONFORMING, Status.UNTRAINED)


class Base(FrozenModel):
    """The frozen weights under an adapter."""

    quantization: Quantization = "none"
    """Quantisation of the frozen weights. `nf4-dq` is NF4 with double quantisation: the scaling constants of the blocks
    are also quantised, to 8 bits."""
    implementation: str = ""
    """Implementation that quantises, e.g. `bitsandbytes`. Empty if nothing is quantised."""

    def __str__(self) -> str:
        return self.quantization if not self.implementation else f"{self.quantization} ({self.implementation})"


DECODED = 8
"""Number of tokens that are decoded after each prompt when latencies are measured. If more are needed, decoding starts
again after the prompt. Prompts are shortened so that the model has this many positions after them."""


class Evaluation(ExtendedModel):
    """Settings for the scoring and for the latencies of a Cell."""

    items: int
    """Number of scored test items. All Cells score the same items: the first of the task's test split after the skipped
    ones."""
    batch: int = 32
    """Number of test items in a forward pass."""
    skip: int = 0
    """Number of test items to skip before the first scored one. Only a search for a learning rate skips items: those
    that later score the ranked Cells."""
    latency: bool = True
    """True if latencies are measured. If several Cells differ only in the seed, it is enough to measure one of them."""
    prompt_batch: int = 1
    """Number of prompts in a batch, when latencies are measured."""
    prompt_tokens: int = 32
    """Number of tokens in each prompt, when latencies are measured. A model with too few positions gets shorter
    prompts."""
    passes: int | None = None
    """Smallest number of timed passes for each variant of the model. When decoding, smallest number of timed tokens.
    If None, the harness chooses a small number."""

    later_fields: ClassVar = ("skip", "latency", "prompt_batch", "prompt_tokens", "passes")

    def untimed(self) -> Evaluation:
        """Return these settings without latencies: `latency` is False, and prompts and passes have their defaults."""
        return Evaluation(items=self.items, batch=self.batch, skip=self.skip, latency=False)


class Cell(ExtendedModel):
    """One experiment of a suite: a combination of model, task, Method, config and other settings.

    `cell_id` is a hash of exactly these fields. It depends neither on the machine nor on the name of the suite.
    """

    model: str
    """Name of the base model."""
    task: str
    """Name of the task for training and scoring."""
    method: str
    """Method, e.g. `lora`; see `peft-harness list methods`."""
    implementation: str
    """Implementation of the Method, e.g. `hf-peft`."""
    config: dict[str, Json] = {}
    """Config of the Method."""
    base: Base = Base()
    """Quantisation of the frozen weights under the adapter."""
    optimizer: Optimizer = "adamw"
    """Optimizer of all trained tensors."""
    dtype: Dtype = "float32"
    """Dtype of weights and computation."""
    seed: int = 0
    """Seed of all random numbers."""
    training: Training
    """Training budget and recipe."""
    evaluation: Evaluation
    """Settings for scoring and for latencies."""
    environment: str = ""
    """Environment of the Cell's process: a requirement, e.g. `peft==0.19.1`, or a name; see `peft-harness env list`. Empty
    for the Python that runs the harness."""
    serve: str = ""
    """Kind of model server that serves the trained adapter, e.g. `vllm`. Empty for none."""

    later_fields: ClassVar = ("environment", "serve")

    @cached_property
    def cell_id(self) -> str:
        """The first 16 hex digits of the SHA-256 over the Cell's canonical JSON.

        Some fields were added later. The JSON leaves such a field out if it has its default value, so that the ids of
        older Cells stay the same.
        """
        parts: dict[str, ExtendedModel] = {"training": self.training, "evaluation": self.evaluation}
        absent: dict[str, Any] = {name: {*part.later_fields} - part.later().keys() for name, part in parts.items()}
        absent |= {name: True for name in self.later_fields if name not in self.later()}
        values = self.model_dump(mode="json", exclude=absent)
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def recipe(self) -> Cell:
        """This Cell with seed 0 and `latency` True. Cells that differ only in these two settings have equal recipes."""
        if self.seed == 0 and self.evaluation.latency:
            return self
        timed = self.evaluation.model_copy(update={"latency": True})
        return self.model_copy(update={"seed": 0, "evaluation": timed})

    @cached_property
    def recipe_id(self) -> str:
        """The cell_id of the recipe. It is equal for Cells that differ only in seed and `latency`."""
        return self.recipe.cell_id

    @property
    def label(self) -> str:
        """A short name for tables and progress lines. It is unique in most suites; `cell_id` is always unique."""
        rank = f" r={self.config['rank']}" if "rank" in self.config else ""
        method = "zero-shot" if self.method == "frozen" and self.training.steps == 0 else self.method
        if isinstance(any_method := self.config.get(ADAPTER_CONFIG), dict):  # `method: peft` names only the library
            method = f"{method} {str(any_method.get('peft_type', '')).lower()}"
        if sha256 := self.config.get(ADAPTER_SHA256):
            method = f"imported {str(sha256)[:6]} {method}"
        base = "" if self.base.quantization == "none" else f" on {self.base}"
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        optimizer = "" if self.optimizer == "adamw" else f" {self.optimizer}"
        settings = self.training.later() if self.training.steps else {}
        later = "".join(f" {name}" if value is True else f" {name}={_short(value)}" for name, value in settings.items())
        # Cells skip test items only in a search for a learning rate.
        tried = f" tried with lr={self.training.lr:g}" if self.evaluation.skip else ""
        by = f"{self.implementation}{f' with {self.environment}' if self.environment else ''}"
        served = f" served by {self.serve}" if self.serve else ""
        return f"{self.model} {method}{rank} [{by}]{base}{dtype}{optimizer}{later}{served}{tried}"


def _short(value: Scalar) -> str:
    return value if isinstance(value, str) else f"{value:g}"


class Phase(FrozenModel):
    """One phase of an attempt at a Cell."""

    name: str
    """Name of the phase, e.g. `train`."""
    seconds: Seconds
    """Wall time of the phase."""
    peak_memory_B: Bytes | None = None
    """Highest memory during the phase: resident memory on a CPU, allocated memory on a GPU. None if the system does not
    report it."""
    end_memory_B: Bytes | None = None
    """Memory at the end of the phase."""
    load_start: float | None = None
    """One-minute load average of the machine at the start of the phase. None if the system has no load average."""
    load_end: float | None = None
    """One-minute load average of the machine at the end of the phase."""
    cpu_seconds: Seconds | None = None
    """CPU seconds of all threads of the process during the phase. None in older Records."""
    energy_J: Joules | None = None
    """Energy of the phase by the counter that `Energy.source` names. None without a counter. Also None if the phase
    took less than 2 s, because no counter resolves so short a time."""
    gpu: GpuPhase | None = None
    """State of the GPU during the phase. None on a CPU."""


class Failure(FrozenModel):
    """Cause of a failed attempt."""

    kind: str
    """Class of the exception, name of the signal, or a word of the runner, e.g. `never started`."""
    message: str
    """Message of the exception. If the worker left no Record, the end of the worker's log."""
    traceback: str = ""
    phase: str = ""
    """Name of the phase in which the attempt failed."""
    requested_B: Bytes | None = None
    """Size of the allocation for which the memory did not suffice. None if unknown."""
    last_peak_B: Bytes | None = None
    """Highest memory in the phases that were completed before the failure. None if unknown."""


class Environment(FrozenModel):
    """Machine and software with which a Record was made."""

    id: str
    """Hash of `software` and `machine`. Times of two Records are comparable only if their hashes are equal."""
    software: dict[str, str]
    """Version of each library, by name of the library."""
    machine: dict[str, str]
    """Facts about the machine: CPU, cores, memory, system and GPUs."""
    code_version: str
    """Start of the SHA-256 over the Python files of harness/ and reference/. It identifies the code even outside a git
    checkout."""
    git_sha: str = ""
    """Git commit of the checkout. Empty outside a checkout."""
    git_dirty: bool | None = None
    """True if the checkout had uncommitted changes; None if unknown."""
    threads: int | None = None
    """Number of threads that torch computes with."""
    extra: dict[str, Json] = {}
    """Further facts from the worker: environment variables, settings for determinism, and the build of torch."""


class AssetUse(FrozenModel):
    """A model, data set or task that a Cell used."""

    name: str
    """Name of the asset in the suite."""
    source: str
    """Address of the asset, or the rule that generates it."""
    sha256: str = ""
    """SHA-256 of the asset's files."""
    revision: str = ""
    """Commit of the hub repository that holds the asset. Empty for other assets."""
    licence: str = ""
    """Licence under which the asset was published."""


class Provider(FrozenModel):
    """Installed Python package that contains an implementation."""

    distribution: str
    """Name of the Python package that contains the implementation."""
    version: str
    """Version of the package."""


class NoteKind(StrEnum):
    """Kinds of notes that programs read."""

    UNREACHED_EXPERTS = "unreached-experts"


class Note(FrozenModel):
    """A note with its kind."""

    kind: NoteKind
    """Kind of the note."""
    text: str
    """Text of the note. `Record.notes` has the same text."""


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
    """Python package that contains the implementation. None if the implementation was not loaded."""
    environment: Environment
    """Machine and software of the attempt."""
    device: str = ""
    """Device: `cpu` or `cuda`."""
    assets: list[AssetUse] = []
    """Model, data and task of the Cell, each with a hash, because a name does not identify the content."""
    layers: list[str] = []
    """Paths of the adapted layers. For a Method without targets, paths of all linear layers. Empty if the attempt ended
    before its layers were known."""
    started: str
    """Start of the attempt in UTC, ISO 8601."""
    duration_s: Seconds
    """Wall time of the attempt."""
    phases: list[Phase] = []
    """Phases of the attempt, in order."""
    checks: list[CheckResult] = []
    """Results of the checks. Reused ones are only in the file of the Record that ran them; see `gate`."""
    gate: Gate | None = None
    """Parity gate that the attempt uses: the checks of the Cell's own layers. None in older Records, for a Cell that
    never shares its gate, and if the gate did not end."""
    measurements: Measurements | None = None
    """Everything that was measured. None if the status is not `ok`."""
    failure: Failure | None = None
    """Cause of the failure, if the attempt raised an exception, was killed, or was prevented from running. Otherwise
    None."""
    notes: list[str] = []
    """Remarks for readers of the numbers, e.g. why a rerun would not be bitwise equal."""
    typed_notes: list[Note] = []
    """Notes that programs read. Each of them is also in `notes`. Empty in older Records."""
    concurrent_cells: int | None = None
    """Number of Cells, this one included, that may have run on the machine at the same time. None in older Records;
    `harness.records.notes.concurrent_cells` finds the number in their notes."""
    start: WorkerStart = ""
    """Way in which the Cell's process started: `process` for a new interpreter, or `fork` for a fork of a process that had
    imported the libraries and the model's classes. After a fork, the phases `start-up` and `load` and the duration exclude
    these imports. Empty in older Records, and if no process was started."""
    imported: Imported | None = None
    """Origin of the adapter, if another program trained it and this Cell only evaluates it. None for all other Cells."""

    @model_validator(mode="after")
    def _status_decides_content(self) -> Record:
        if (self.measurements is not None) != (self.status is Status.OK):
            raise ValueError(f"a Record has measurements if its status is ok, and only then; status is {self.status}")
        if self.status is not Status.OK and not self.because:
            raise ValueError(f"a Record with status {self.status} needs `because`")
        if self.cell_id != self.cell.cell_id:
            raise ValueError(f"cell_id {self.cell_id} does not belong to this Cell ({self.cell.cell_id})")
        return self

    @property
    def id(self) -> str:
        """The name of this Record in other files: `cell_id.attempt`."""
        return f"{self.cell_id}.{self.attempt}"

    @cached_property
    def unpassed(self) -> list[CheckResult]:
        """Results of the checks that failed or were skipped."""
        return [check for check in self.checks if check.outcome is not Outcome.PASS]

    @property
    def training(self) -> TrainingMeasured | None:
        """Measurements of the training. None if there are none."""
        return self.measurements.training if self.measurements else None

    @property
    def accuracy(self) -> Accuracy | None:
        """Accuracy on the test items; None if the Cell was not scored."""
        return self.measurements.accuracy if self.measurements else None
