"""Metrics: one declaration for each number of a Record that the harness shows, exports, tracks or judges.

`METRICS` feeds the comparison table (in the terminal and on the HTML page), the export table `cells`, the history of
nightly runs, and the regression gate. To add a metric, add one entry here. Latencies have no entry, because a Record
has several, each with many samples; see `tracked_metrics.times`. Only the latency in a chart has an entry. For the
measurements of servers, see `report.served`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel

from harness.analysis import failed_checks, measurements
from harness.analysis.comparison.baseline_rows import COUNTED_PEAK_B, RowKind, Unit
from harness.records.base_model import meaning
from harness.records.cost import Checkpoint
from harness.records.memory import ALLOCATED, Memory
from harness.records.record import Parameters, Record

MetricKind = Literal["timed", "counted", "peak", "score"]
Number = int | float


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of a Record, with the name that it has in each table and file.

    If a name is empty, that table or file leaves the number out.
    """

    name: str
    """Key of the metric in the JSON data that a reader can download from the HTML page."""
    unit: Unit
    """Base unit of the value."""
    meaning: str
    """Explanation in one sentence, without a full stop. It is the tooltip in the table and the description of the
    export column."""
    read: Callable[[Record], Number | None]
    """Function that returns the value, or None if the value was not measured."""
    why_missing: Callable[[Record], str] = lambda _: "not measured"
    """Function that returns the reason why the value is missing."""
    kind: MetricKind | None = None
    """Rule that compares two values. `timed`: by statistics. `counted`: exactly, or within `slack_B`. `peak`: within
    `slack_B` or `slack_share`. `score`: item by item. None: the number is only shown."""
    better: Literal["lower", "higher"] | None = None
    """Direction in which the value improves. If None, any difference is a regression."""
    slack_B: int = 0
    """Largest difference in bytes that the history of nightly runs does not report as a change. It is also the largest
    growth that the regression gate allows for a counted metric."""
    slack_share: float = 0.0
    """Largest difference that the history does not report as a change, as a share of the old value. Of `slack_B` and
    `slack_share`, the one that allows more counts."""
    applies: Callable[[Record], bool] = lambda _: True
    """Function that returns whether the history and the regression gate use the value of a Record."""
    always_there: bool = True
    """True if every nightly run should have the metric. The history reports each run that lacks it."""
    heading: str = ""
    """Heading of the column in the comparison table on the HTML page, with the unit."""
    terminal_heading: str = ""
    """Heading of the column in the comparison table in the terminal."""
    axis: str = ""
    """Name of the axis in the charts of accuracy against a cost."""
    column: str = ""
    """Name of the column in the export table `cells`."""
    history: str = ""
    """Name of the metric in the history of nightly runs."""
    quantity: str = ""
    """Name of the metric in the regression gate that compares a run with a baseline."""
    row_kind: RowKind = RowKind.MEMORY
    """Kind of the row that the regression gate makes from the metric."""

    def value(self, record: Record) -> Number | None:
        """Return the value to show. Return None if the value is missing, or if it is a time that may not be shown.

        `failed_checks.no_speed` decides whether times may be shown.
        """
        return None if self.kind == "timed" and failed_checks.no_speed(record) else self.read(record)

    def got_worse(self, old: float, new: float) -> bool:
        """Return whether a change from `old` to `new` is a regression."""
        return old != new if self.better is None else new > old if self.better == "lower" else new < old


def _measured(part: str, field: str) -> Callable[[Record], Number | None]:
    """Return a function that reads `Measurements.<part>.<field>` from a Record."""

    def read(record: Record) -> Number | None:
        value: Number | None = getattr(getattr(record.measurements, part, None), field, None)
        return value

    return read


_PARTS: dict[str, tuple[type[BaseModel], RowKind]] = {
    "parameters": (Parameters, RowKind.PARAMETERS),
    "memory": (Memory, RowKind.MEMORY),
    "checkpoint": (Checkpoint, RowKind.CHECKPOINT),
}


def _counted(part: str, field: str, **more: Any) -> Metric:
    """Return the metric of the field `Measurements.<part>.<field>`, which counts scalars or bytes.

    more: further fields of the `Metric`.
    """
    model, row_kind = _PARTS[part]
    name = f"{part}.{field}"
    size: dict[str, Any] = {"unit": "B", "better": "lower"} if field.endswith("_B") else {"unit": "1"}
    read, about = _measured(part, field), meaning(model, field)
    return Metric(name=name, meaning=about, read=read, kind="counted", column=name, row_kind=row_kind, **size, **more)


def _peak(record: Record) -> int | None:
    return measurements.training_peak(record) if record.measurements else None


def _peak_above_imports(record: Record) -> int | None:
    peak = _peak(record)
    return None if peak is None else measurements.above_imports(record, peak)


def _tokens_per_s(record: Record) -> float | None:
    training = measurements.timed_training(record)
    return measurements.throughput(training) if training else None


def _latency(record: Record) -> float | None:
    """Return the latency of one request, in seconds, with the unmerged adapter.

    If there is no adapter, return the latency of the base model. If a forward pass and the decoding of a token were
    both timed, return the time of decoding.
    """
    alone = [
        x for x in (record.measurements.latency if record.measurements else ()) if x.adapters is None and x.seconds
    ]
    alone = [x for x in alone if x.batch == 1 and x.kind in ("forward", "decode")]
    found = {x.variant: x.seconds for x in alone}
    seconds = found.get("unmerged") or found.get("base")
    return median(seconds) if seconds else None


def _served_first_token(record: Record) -> float | None:
    times = measurements.served_times(record, "one adapter", alone=True)
    return median(times.first_token_s) if times else None


def _served_token(record: Record) -> float | None:
    times = measurements.served_times(record, "one adapter", alone=True)
    return median(times.token_s) if times else None


def _served_rate(record: Record) -> float | None:
    times = measurements.served_times(record, "several adapters", alone=False)
    rate = measurements.served_rate(times) if times else None
    return rate.value if rate else None


def _served_swap(record: Record) -> float | None:
    served = record.measurements.served if record.measurements else None
    return median(served.swap_s) if served and served.swap_s else None


def _no_peak(record: Record) -> str:
    trained = record.training is not None
    return "the training phase has no memory peak" if trained else measurements.why_untrained(record, "peak memory")


def _no_speed(record: Record) -> str:
    trained = measurements.timed_training(record) is not None
    if not trained:
        return measurements.why_untrained(record, "time of each step")
    return failed_checks.no_speed(record) or "the clock did not move"


TRAINABLE = Metric(
    name="trainable", unit="1", meaning="parameters that the optimizer updates", kind="counted",
    read=_measured("parameters", "trainable"), heading="Trainable", terminal_heading="trainable",
    axis="trainable parameters", column="parameters.trainable", history="parameters",
)  # fmt: skip
ACCURACY = Metric(
    name="accuracy", unit="share", kind="score", better="higher", read=_measured("accuracy", "value"),
    meaning="share of correct test items of one training run; the Record names the kind of its interval",
    why_missing=lambda _: "not scored", heading="Accuracy, %", terminal_heading="accuracy", column="accuracy",
    history="accuracy",
)  # fmt: skip
COUNTED_PEAK = _counted(
    "memory", "counted_peak_B", history="counted_peak_B", quantity="tensors at one time in a step",
    slack_B=COUNTED_PEAK_B, always_there=False,
    # On a GPU, this peak equals the training peak. On a CPU, no peak is counted if memory cannot hold a copy of the tensors
    # that a step changes.
    applies=lambda record: record.measurements is not None and record.measurements.memory.source != ALLOCATED,
)  # fmt: skip
TRAINING_PEAK = Metric(
    name="training_peak_B", unit="B", kind="peak", better="lower", read=_peak, why_missing=_no_peak,
    meaning="highest memory in the training phase: resident on a CPU, imports included; allocated on a GPU",
    # The resident peaks of nine Cells on a CPU changed by at most 6.2 MiB between trainings at two learning rates.
    slack_B=16 * 2**20, slack_share=0.01,
    column="training_peak_B", history="training_peak_B", quantity="training peak",
)  # fmt: skip
PEAK_ABOVE_IMPORTS = Metric(
    name="training_peak_above_imports_B", unit="B", read=_peak_above_imports, why_missing=_no_peak,
    meaning="training peak minus the memory of the process before the model was loaded",
    heading="Peak, MiB", terminal_heading="peak MiB",
    axis="training memory", column="training_peak_above_imports_B",
)  # fmt: skip
STEP = Metric(
    name="step_s", unit="s", kind="timed", better="lower", read=measurements.step_seconds, why_missing=_no_speed,
    meaning="median time of a steady step in this process; missing where a check failed or was impossible",
    row_kind=RowKind.TIME,
    heading="Step, ms", terminal_heading="step ms", axis="step time", column="step_s", history="step_s", quantity="step",
)  # fmt: skip
TOKENS_PER_S = Metric(
    name="tokens_per_s", unit="1/s", kind="timed", better="higher", read=_tokens_per_s, why_missing=_no_speed,
    meaning="tokens without padding per second of the steady steps; missing where step_s is missing",
    heading="Tokens/s", terminal_heading="tok/s", column="tokens_per_s",
)  # fmt: skip
LATENCY = Metric(
    name="latency_s", unit="s", kind="timed", better="lower", read=_latency, axis="latency",
    meaning="median time of one request with an adapter that is not merged: of a forward pass or, for a model that generates"
    " text, of decoding one token; without an adapter, the time of the base model",
)  # fmt: skip
SERVED = (
    Metric(
        name="served_first_token_s", unit="s", kind="timed", better="lower", read=_served_first_token,
        meaning="median time to the first token from a server, for one request to the trained adapter",
        column="served_first_token_s",
    ),
    Metric(
        name="served_token_s", unit="s", kind="timed", better="lower", read=_served_token,
        meaning="median time per further token from a server, for one request to the trained adapter",
        column="served_token_s",
    ),
    Metric(
        name="served_tokens_per_s", unit="1/s", kind="timed", better="higher", read=_served_rate,
        meaning="median of generated tokens per second from a server, for several requests, each to another adapter",
        column="served_tokens_per_s",
    ),
    Metric(
        name="served_swap_s", unit="s", kind="timed", better="lower", read=_served_swap,
        meaning="median time to replace an adapter in a server and to get the first token of the new one",
        column="served_swap_s",
    ),
)  # fmt: skip
METRICS: tuple[Metric, ...] = (
    _counted("parameters", "adapter", quantity="adapter parameters"),
    _counted("parameters", "head", quantity="head parameters"),
    TRAINABLE,
    _counted("parameters", "total", quantity="all parameters"),
    ACCURACY,
    _counted("memory", "weights_B", history="weights_B", quantity="weights"),
    _counted("memory", "adapter_B", history="adapter_B", quantity="adapter"),
    _counted("memory", "gradients_B", history="gradients_B", quantity="gradients"),
    _counted("memory", "optimizer_B", history="optimizer_B", quantity="optimizer"),
    _counted("memory", "optimizer_host_B", quantity="optimizer on the host"),
    _counted("checkpoint", "adapter_file_B", history="adapter_file_B", quantity="adapter file", axis="adapter file"),
    _counted("checkpoint", "head_B", quantity="head in it"),
    _counted("checkpoint", "model_B", history="model_B", quantity="whole model"),
    COUNTED_PEAK,
    TRAINING_PEAK,
    PEAK_ABOVE_IMPORTS,
    TOKENS_PER_S,
    STEP,
    Metric(
        name="training_energy_J", unit="J", better="lower", read=measurements.training_energy,
        meaning="energy of the training phase; missing without a counter, for a phase shorter than 2 s, and if several Cells"
        " ran at once and the counter (rapl) covers them all",
        column="training_energy_J",
    ),
    Metric(
        name="duration_s", unit="s", better="lower", read=lambda record: record.duration_s, heading="Cell, s",
        meaning="wall time of the whole attempt in its own process, start-up included", column="duration_s",
    ),
    LATENCY,
    *SERVED,
)  # fmt: skip


def in_history(name: str) -> Metric | None:
    """Return the metric whose `history` is `name`. If there is none, return None."""
    return next((metric for metric in METRICS if metric.history == name), None)


def costs() -> list[Metric]:
    """Return the cost metrics for the charts of accuracy against a cost, the training memory first."""
    return sorted((metric for metric in METRICS if metric.axis), key=lambda metric: metric is not PEAK_ABOVE_IMPORTS)


def shown() -> Iterator[Metric]:
    """Yield the metrics of the comparison table, in its order."""
    return (metric for metric in METRICS if metric.heading)
