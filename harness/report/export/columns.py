"""Columns of the export tables: the dtype, unit and meaning of each column.

The meanings come from the metrics and from the docstrings of Record fields; this module describes the other columns.
Units are base units: `s`, `B` (bytes), `J`, `W`, `Hz`, `°C`, or `1` (a number, a share, a count). The unit is empty for
a column that does not hold a quantity. A missing value is NA, never 0 and never an empty text.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pydantic import BaseModel

from harness.analysis import metrics
from harness.analysis.metrics import Metric
from harness.records.base_model import meaning
from harness.records.check import CheckResult
from harness.records.cost import Checkpoint, Energy, GpuPhase, GpuState
from harness.records.gate import Gate
from harness.records.memory import Memory, Predicted
from harness.records.record import (
    Accuracy,
    Base,
    Cell,
    Environment,
    Evaluation,
    Failure,
    Item,
    Provider,
    Record,
    TrainingMeasured,
)
from harness.records.training import Training
from harness.report.formatting import sentence

TABLES = ("cells", "samples", "items", "checks")

TEXT, INTEGER, FLOAT, BOOLEAN, TIME = "string", "Int64", "Float64", "boolean", "datetime64[us, UTC]"
_DTYPES = {bool: BOOLEAN, int: INTEGER, float: FLOAT}
_UNITS = {"B": "B", "J": "J", "W": "W", "Hz": "Hz", "C": "°C", "s": "s"}
"""Units of fields, by the last part of the field's name, e.g. `peak_memory_B`."""
GPU_EDGES = ("start", "end")
GPU_PHASE = ("reserved_B", "driver_B", "alloc_retries", "ooms")
GPU_STATE = tuple(GpuState.model_fields)
FAILURE = ("kind", "message", "phase", "requested_B", "last_peak_B")
SOFTWARE = ("python", "torch", "transformers")
ENVIRONMENT = ("id", "threads", "code_version", "git_sha", "git_dirty")


@dataclass(frozen=True)
class Column:
    """A column of an export table."""

    name: str
    """Name of the column. A name that ends in `.*` stands for several columns, e.g. `config.*` for one column per key
    of a Method's config."""
    dtype: str
    """Name of the column's dtype in pandas."""
    unit: str
    meaning: str


def _field(name: str, model: type[BaseModel], field: str) -> Column:
    """Return the column of a field: dtype from its annotation, unit from its name, meaning from its docstring."""
    annotation = model.model_fields[field].annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        (annotation, *_) = [a for a in typing.get_args(annotation) if a is not types.NoneType]
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    dtype = _DTYPES.get(annotation, TEXT)  # type: ignore[arg-type]
    unit = _UNITS.get(field.rpartition("_")[2], "1") if dtype in (INTEGER, FLOAT) else ""
    return Column(name, dtype, unit, meaning(model, field))


def _fields(prefix: str, model: type[BaseModel], fields: Iterable[str]) -> tuple[Column, ...]:
    return tuple(_field(f"{prefix}{field}", model, field) for field in fields)


def _metric(metric: Metric) -> Column:
    whole = metric.unit == "B" or metric.kind == "counted"
    unit = "1" if metric.unit == "share" else metric.unit
    return Column(metric.column, INTEGER if whole else FLOAT, unit, sentence(metric.meaning))


_KEY = (
    Column("run", TEXT, "", "Id of the run"),
    Column("cell_id", TEXT, "", "Id of the Cell: the same in every run with the same Cell"),
    Column(
        "attempt",
        INTEGER,
        "1",
        "Number of the attempt at the Cell, from 1; with run and cell_id the key of all tables",
    ),
)


def _cells() -> tuple[Column, ...]:
    """Return the columns of the table `cells`. Metrics that this code does not name come before `no_speed`."""
    exported = {metric.column: _metric(metric) for metric in metrics.METRICS if metric.column}

    def measured(*names: str) -> tuple[Column, ...]:
        return tuple(exported.pop(name) for name in names)

    def part(prefix: str, model: type[BaseModel], fields: Iterable[str]) -> tuple[Column, ...]:
        """Return the columns of one part of the measurements. If a field is a metric, use the column of the metric."""
        return tuple(measured(n)[0] if (n := f"{prefix}{f}") in exported else _field(n, model, f) for f in fields)

    gpu = _fields("gpu.", GpuPhase, GPU_PHASE)
    for edge in GPU_EDGES:
        states = _fields(f"gpu.{edge}.", GpuState, GPU_STATE)
        gpu += tuple(replace(column, meaning=f"{column.meaning}, at the {edge} of training") for column in states)
    before = (
        *_KEY,
        Column("latest", BOOLEAN, "", "Whether this is the newest attempt at its Cell in the run; older ones do not count"),
        *_fields("", Record, ("status", "because")),
        Column("label", TEXT, "", "Name for plots, shared by Cells that differ only in the seed"),
        *_fields("", Cell, ("model", "task", "method", "implementation", "environment", "serve")),
        _field("provider", Provider, "distribution"),
        _field("provider_version", Provider, "version"),
        _field("base", Base, "quantization"),
        _field("base_implementation", Base, "implementation"),
        *_fields("", Cell, ("optimizer", "dtype", "seed")),
        _field("device", Record, "device"),
        Column("rank", INTEGER, "1", "config.rank, or r of an adapter_config, if it is a whole number"),
        Column("config.*", "", "1", "A key of the method's config; lists and mappings as JSON; NA: no such key, or unset"),
        *_fields("training.", Training, (
            "steps", "batch", "lr", "head_lr", "warmup", "weight_decay", "max_tokens", "accumulate", "checkpointing",
            "compile", "layerwise", "loop", "lr_ratio",
        )),
        *_fields("evaluation.", Evaluation, (
            "items", "batch", "latency", "prompt_batch", "prompt_tokens", "passes", "skip",
        )),
        *measured("parameters.adapter", "parameters.head", "parameters.trainable", "parameters.total", "accuracy"),
        *_fields("accuracy_", Accuracy, ("low", "high")),
        Column("accuracy_n", INTEGER, "1", "Number of scored test items"),
        *_fields("accuracy_", Accuracy, ("metric", "interval")),
        *_fields("", Accuracy, ("scored_by", "cut_items")),
        *_fields("", TrainingMeasured, ("text_rules", "cut_examples")),
        *measured("training_peak_B", "training_peak_above_imports_B", "training_energy_J"),
        *_fields("energy.", Energy, Energy.model_fields),
        *part("checkpoint.", Checkpoint, Checkpoint.model_fields),
        *part("memory.", Memory, (field for field in Memory.model_fields if field not in ("predicted", "not_predicted"))),
        *_fields("memory.predicted.", Predicted, Predicted.model_fields),
        _field("memory.not_predicted", Memory, "not_predicted"),
        *measured("step_s"),
        Column("step_low_s", FLOAT, "s", "Lower end of the 95 % interval of step_s, over the steps of this process"),
        Column("step_high_s", FLOAT, "s", "Upper end of the same interval"),
        Column("step_n", INTEGER, "1", "Number of steady steps behind step_s"),
        *measured("tokens_per_s"),
    )  # fmt: skip
    duration = measured("duration_s")
    after = (
        Column("no_speed", TEXT, "", "Reason why no speed may be shown: a check failed, or there is no reference"),
        Column("busy", TEXT, "", "Evidence that the steps (without training: the passes) waited for a CPU"),
        Column("unsteady", TEXT, "", "Evidence that something slowed some passes of the latencies and not others"),
        replace(
            _field("gate_record", Gate, "record"), meaning="Record whose parity gate this attempt rests on; NA: its own"
        ),
        replace(_field("notes", Record, "notes"), meaning=f"{meaning(Record, 'notes')}; a list, as JSON"),
        Column("started", TIME, "", "Start of the attempt"),
        *duration,
        Column("phase_s.*", FLOAT, "s", "Wall time of a phase of the attempt"),
        Column("phase_peak_B.*", INTEGER, "B", "Highest memory inside the phase"),
        Column("phase_energy_J.*", FLOAT, "J", "Energy of a phase; NA for the same reasons as training_energy_J"),
        *gpu,
        *_fields("failure.", Failure, FAILURE),
        *_fields("environment.", Environment, ENVIRONMENT[:1]),
        *(Column(f"environment.{name}", TEXT, "", f"Version of {name}") for name in SOFTWARE),
        Column("environment.os", TEXT, "", "Operating system and its release"),
        Column("environment.cpu", TEXT, "", "Model name of the CPU"),
        Column("environment.cores", INTEGER, "1", "Physical cores that the process could use"),
        Column("environment.memory_B", INTEGER, "B", "Memory of the machine"),
        Column("environment.gpu", TEXT, "", "The first GPU: uuid, name, driver, memory"),
        *_fields("environment.", Environment, ENVIRONMENT[1:]),
    )
    return (*before, *exported.values(), *after)


_SAMPLES = (
    *_KEY,
    Column("kind", TEXT, "", "One of step_seconds, losses, gradient_norms, tokens, padded_tokens (one per optimizer step); "
           "latency_forward, latency_prefill (per call), latency_decode (per generated token); "
           "for a server: served_first_token, served_token (per request), served_round, served_swap"),
    Column("variant", TEXT, "", "Variant of a latency: base, unmerged, merged, multi-adapter; of a server's time: its load"),
    Column("latency_batch", INTEGER, "1", "Number of prompts in a batch; for servers, of concurrent requests"),
    Column("latency_tokens", INTEGER, "1", "Number of tokens of a prompt; for decode and servers, of generated tokens"),
    Column("latency_adapters", INTEGER, "1", "Number of adapters in the batch; 1 if timed to compare with several"),
    Column("index", INTEGER, "1", "Number of the sample within its kind and variant, in the order of measurement, from 0"),
    Column("value", FLOAT, "", "The sample, in the unit of the column `unit`"),
    Column("unit", TEXT, "", "s or 1: losses are in nats, tokens are counts"),
    Column("warmup", BOOLEAN, "", "Whether it is a warm-up step, which step_s and tokens_per_s leave out"),
    Column("no_speed", TEXT, "", "Reason why this time may not be shown: a check failed, or there is no reference"),
)  # fmt: skip

_CHECKS = (
    *_KEY,
    *_fields("", CheckResult, CheckResult.model_fields),
    Column("shared", BOOLEAN, "", "Whether this attempt reuses the result from another Record (gate_record in cells); "
           "that Record has it as a row of its own"),
)  # fmt: skip

_ITEMS = (
    *_KEY,
    _field("task", Cell, "task"),
    Column("index", INTEGER, "1", "Position among the scored items, from 0"),
    _field("item", Item, "id"),
    _field("correct", Item, "correct"),
)


def declared(table: str) -> tuple[Column, ...]:
    """Return the declared columns of a table. A name that ends in `.*` stands for several columns."""
    if table == "cells":
        return _cells()
    return {"samples": _SAMPLES, "items": _ITEMS, "checks": _CHECKS}[table]


def columns(table: str, found: list[str]) -> list[Column]:
    """Return the columns of a table, in order. Replace each `.*` by the matching names in `found`.

    found: names in the rows of the table. Raises KeyError for an undeclared name: it would have neither unit nor
    meaning.
    """
    known = {column.name: column for column in declared(table)}
    many: dict[str, list[Column]] = {name: [] for name in known if name.endswith(".*")}
    for name in found:
        if name not in known:
            pattern = name.partition(".")[0] + ".*"
            many[pattern].append(replace(known[pattern], name=name))
    return [one for name, column in known.items() for one in many.get(name, [column])]
