"""Plan the work of `bench` as tasks. Each task runs in a process of its own.

There is one task for each combination of a benchmark, a compared implementation and a dtype. A benchmark is an
Operation or a training step. The implementations come from the installed plug-ins. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from harness.bench import operations as timed_operations
from harness.bench.results import BenchRow, Cause
from harness.bench.sizes import BenchSize, sizes
from harness.bench.steps import STEPS, Backbone
from harness.conformance import parity_suite
from harness.errors import usage_error
from harness.methods.known_names import NameOption
from harness.methods.registry import DTYPES, Registry, targets

OURS = "fused"
REFERENCE = "reference"
EVERY = "all"
"""Value of `--step` that stands for all training steps."""
_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
"""Device -> default dtype."""

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class BenchRequest:
    """The benchmarks that the user requests. Without `operations` and `steps`, these are all timed Operations."""

    operations: Sequence[str] = ()
    vs: Sequence[str] = ()
    """Names of the implementations to compare with.

    If empty: all implementations except the reference and variants of a library such as `bitsandbytes-paged`. If no
    implementation is left: the reference.
    """
    steps: Sequence[str] = ()
    shapes: str = "small"
    dtypes: Sequence[str] = ()
    pairs: int = 12
    """Number of pairs of samples per benchmark. A pair is one sample of each implementation."""
    device: Device = "auto"
    ours: str = OURS
    backbone: Backbone = field(default_factory=Backbone)
    """Sizes of the model in the training steps."""
    patience: float = 900.0
    """Seconds after which a worker is killed if it sends no event.

    An event may take minutes, because the reference is slow on a CPU at the largest sizes.
    """


@dataclass(frozen=True)
class BenchTask:
    """The work of one worker process: one benchmark of two implementations in one dtype."""

    name: str
    """Name of the benchmark. All its result rows show this name."""
    kind: Literal["operation", "method"]
    target: str
    """The Operation or Method that both implementations implement."""
    names: tuple[str, ...]
    """Names of the two implementations, `BenchRequest.ours` first. A task that measures memory has only one name."""
    points: tuple[str, ...]
    """Names of the entry points (plug-ins) that provide the implementations."""
    dtype: str
    device: str
    sizes: tuple[BenchSize, ...] = ()
    """Sizes of the calls. Empty for a training step."""
    step: str = ""
    """Name of the training step in `STEPS`. Empty for an Operation."""
    base: str = ""
    """Quantisation of the frozen weights in a training step. Empty if they are not quantised."""
    packers: tuple[str, ...] = ()
    """Names of the implementations that pack the frozen weights, one for each of `names`."""

    def document(self, request: BenchRequest, threads: int) -> dict[str, Any]:
        """Return the task as a dict for JSON, which `harness.bench.worker` reads."""
        return {**asdict(self), "backbone": asdict(request.backbone), "pairs": request.pairs, "threads": threads}

    def of_one(self, index: int) -> BenchTask:
        """Return a copy of the task with only one implementation, for measuring its memory. index: 0 for the first."""
        return replace(self, names=self.names[index : index + 1], packers=self.packers[index : index + 1])

    def row(
        self, outcome: Literal["not-run", "failed"], because: str, number: int = 0, cause: Cause | None = None
    ) -> BenchRow:
        """Return the result row of a benchmark without samples.

        because: the reason why there are none. number: index of the benchmark's size in `sizes`.
        """
        shape = f"{self.sizes[number].layer} {self.sizes[number].E}x{self.sizes[number].D}" if self.sizes else "-"
        return BenchRow(
            name=self.name, shape=shape, dtype=self.dtype, device=self.device, ours=self.names[0], other=self.names[-1],
            outcome=outcome, because=because, cause=cause,
        )  # fmt: skip


def plan(request: BenchRequest, registry: Registry, no_gpu: str) -> tuple[list[BenchTask], list[BenchRow]]:
    """Return the tasks of a request, and a result row for each benchmark that cannot run.

    no_gpu: the reason why no GPU can be used, or an empty string if one can. Raises UsageError for unknown names.
    """
    _check_names(request, registry)
    device = request.device if request.device != "auto" else "cpu" if no_gpu else "cuda"
    planned = _Plan(request, registry, device)
    if device == "cuda" and no_gpu:
        return [], [*planned.rows, *(task.row("not-run", no_gpu, cause="no-gpu") for task in planned.tasks)]
    on_gpu = _Plan(request, registry, "cuda").tasks if request.device == "auto" and no_gpu else []
    return planned.tasks, [*planned.rows, *(task.row("not-run", no_gpu, cause="no-gpu") for task in on_gpu)]


class _Plan:
    """The tasks of a request on one device, and a result row for each benchmark that cannot run there."""

    def __init__(self, request: BenchRequest, registry: Registry, device: str) -> None:
        self.request, self.registry, self.device = request, registry, device
        self.tasks: list[BenchTask] = []
        self.rows: list[BenchRow] = []
        operations = list(request.operations)
        if not operations and not request.steps:
            operations = [name for name in timed_operations.every() if registry.names("operation", name)]
        for name in dict.fromkeys(operations):
            self._add_operation(name)
        for name in STEPS if EVERY in request.steps else dict.fromkeys(request.steps):
            self._add_step(f"step:{name}", name)

    def _add_operation(self, name: str) -> None:
        if name not in timed_operations.every():
            self._cannot_run(name, "*", "not timed: no module of harness/bench/operations declares it")
            return
        available = parity_suite.load_operation(name).dtypes
        default = _DTYPE[self.device] if _DTYPE[self.device] in available else available[0]
        layers = tuple(sizes(self.request.shapes, timed_operations.every()[name].per_token))
        for other in self._others(name, "operation", name):
            both = (self.request.ours, other)
            points = self._points("operation", name, both)
            for dtype in dict.fromkeys(self.request.dtypes or [default]):
                task = BenchTask(name, "operation", name, both, points, dtype, self.device, layers)
                self._add(task, "" if dtype in available else f"its parity suite has no case in {dtype}")

    def _add_step(self, name: str, key: str) -> None:
        step = STEPS[key]
        for other in self._others(name, "method", step.method):
            both, packers = (self.request.ours, other), ("", "")
            points = self._points("method", step.method, both)
            if step.base:
                offering = self.registry.names("base", step.base)
                packing = [one for one in offering if one not in (self.request.ours, REFERENCE)]
                if self.request.ours not in offering or not packing:
                    packers_of = f"packers of {step.base}: {', '.join(offering) or 'none'}"
                    self._cannot_run(name, other, f"{packers_of}; needs two")
                    continue
                packers = (self.request.ours, other if other in packing else packing[0])
                points += self._points("base", step.base, packers)
            points = tuple(dict.fromkeys(points))
            for dtype in dict.fromkeys(self.request.dtypes or [_DTYPE[self.device]]):
                task = BenchTask(
                    name, "method", step.method, both, points, dtype, self.device, step=key, base=step.base
                )
                self._add(replace(task, packers=packers))

    def _others(self, name: str, kind: str, target: str) -> list[str]:
        """Return the names of the implementations to compare with `request.ours`.

        For each requested implementation that cannot be compared, add a result row with the reason.
        """
        ours = self.request.ours
        offering = self.registry.names(kind, target)
        others = [other for other in offering if other != ours]
        if ours not in offering:
            self._cannot_run(name, "*", f"{ours} does not offer {target}")
            return []
        wanted = list(dict.fromkeys(self.request.vs))
        if not wanted:
            # A variant of a library (`bitsandbytes-paged`) is compared only on request (--vs).
            wanted = [n for n in others if n != REFERENCE and not any(n.startswith(f"{o}-") for o in offering)]
            wanted = wanted or [n for n in others if n == REFERENCE]
        if not wanted:
            self._cannot_run(name, "-", f"only {ours} offers {target}")
        for other in wanted:
            if other not in others:
                self._cannot_run(name, other, f"{other} does not offer {target}")
        return [other for other in wanted if other in others]

    def _points(self, kind: str, target: str, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.registry.find(kind, target, name).point for name in names))

    def _add(self, task: BenchTask, no_case: str = "") -> None:
        """Add a task. If the task cannot run, add a result row with the reason instead.

        no_case: the reason why there is no case to check the task on, or an empty string.
        """
        if why_not := self._unsupported(task) or no_case:
            self.rows.append(task.row("not-run", why_not))
        else:
            self.tasks.append(task)

    def _unsupported(self, task: BenchTask) -> str:
        for name in task.names:
            it = self.registry.find(task.kind, task.target, name)
            if task.dtype not in it.dtypes:
                return f"{name} does not offer {task.dtype}"
            if task.device not in it.devices:
                return f"{name} does not run on {task.device}"
        return ""

    def _cannot_run(self, name: str, other: str, because: str) -> None:
        row = BenchRow(
            name=name, shape="-", dtype="-", device=self.device, ours=self.request.ours, other=other, outcome="not-run",
            because=because,
        )  # fmt: skip
        self.rows.append(row)


def _check_names(request: BenchRequest, registry: Registry) -> None:
    """Raise one UsageError that lists all unknown names in a request."""
    operations = NameOption(
        "--op", "operation", sorted(name for name, kind in targets().items() if kind == "operation")
    )
    steps = NameOption("--step", "step", [*STEPS, EVERY])
    implementations = sorted({i.name for i in registry.implementations} - {request.ours})
    problems = [
        *operations.unknown(request.operations, [steps]),
        *NameOption("--vs", "implementation", implementations).unknown(request.vs),
        *steps.unknown(request.steps, [operations]),
        *NameOption("--dtype", "dtype", DTYPES).unknown(request.dtypes),
    ]
    if problems:
        raise usage_error(problems)
