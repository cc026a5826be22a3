"""Plan a bench: one worker process per Operation, dtype and compared implementation, or per training step. No torch.

Implementations come from the installed plug-ins; none is listed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from harness.bench import operations as timed_operations
from harness.bench.results import BenchRow
from harness.bench.sizes import BenchSize, sizes
from harness.bench.steps import STEPS, Backbone
from harness.conformance import parity_suite
from harness.errors import UsageError, did_you_mean
from harness.methods.registry import DTYPES, Registry, targets

OURS = "fused"
REFERENCE = "reference"
EVERY = "all"
"""`--step all` times every step."""
_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
"""Device -> default dtype."""

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class BenchRequest:
    """The benchmarks to run: without operations and steps, every timed Operation."""

    operations: Sequence[str] = ()
    vs: Sequence[str] = ()
    """Implementations to compare with; by default all others, and the reference if there is no other."""
    steps: Sequence[str] = ()
    shapes: str = "small"
    dtypes: Sequence[str] = ()
    pairs: int = 12
    """Pairs of samples per benchmark."""
    device: Device = "auto"
    ours: str = OURS
    backbone: Backbone = field(default_factory=Backbone)
    """The model of the training steps."""


@dataclass(frozen=True)
class BenchTask:
    """The work of one worker process."""

    name: str
    """Name of its rows."""
    kind: Literal["operation", "method"]
    target: str
    """The Operation or Method that is implemented."""
    names: tuple[str, ...]
    """The two implementations, ours first; one of them when memory is measured."""
    points: tuple[str, ...]
    """Entry points of the implementations."""
    dtype: str
    device: str
    sizes: tuple[BenchSize, ...] = ()
    """Sizes of an Operation."""
    step: str = ""
    """Name of a training step in `STEPS`."""
    base: str = ""
    """Quantisation of the frozen weights of a training step."""
    packers: tuple[str, ...] = ()
    """For each of `names`, the implementation that packs the base."""

    def document(self, request: BenchRequest, threads: int) -> dict[str, Any]:
        """Return the task for JSON, as `harness.bench.worker` reads it."""
        return {
            "kind": self.kind, "target": self.target, "names": self.names, "points": self.points, "dtype": self.dtype,
            "device": self.device, "sizes": [size.document() for size in self.sizes], "step": self.step, "base": self.base,
            "packers": self.packers, "backbone": request.backbone.document(), "pairs": request.pairs, "threads": threads,
        }  # fmt: skip

    def of_one(self, index: int) -> BenchTask:
        """Return the same step by one of the implementations, to measure its memory."""
        return replace(self, names=self.names[index : index + 1], packers=self.packers[index : index + 1])

    def row(self, outcome: Literal["not-run", "failed"], because: str, number: int = 0) -> BenchRow:
        """Return the row of a benchmark without samples. because: the reason. number: index of its size."""
        shape = f"{self.sizes[number].layer} {self.sizes[number].E}x{self.sizes[number].D}" if self.sizes else "-"
        return BenchRow(
            name=self.name, shape=shape, dtype=self.dtype, device=self.device, ours=self.names[0], other=self.names[-1],
            outcome=outcome, because=because,
        )  # fmt: skip


def plan(request: BenchRequest, registry: Registry, no_gpu: str) -> tuple[list[BenchTask], list[BenchRow]]:
    """Return the tasks, and rows for benchmarks that cannot run. Raises UsageError for unknown names.

    no_gpu: why no GPU can be used; empty if one can.
    """
    _check_names(request, registry)
    device = request.device if request.device != "auto" else "cpu" if no_gpu else "cuda"
    found = list(_everything(request, registry, device))
    tasks = [one for one in found if isinstance(one, BenchTask)]
    rows = [one for one in found if isinstance(one, BenchRow)]
    if device == "cuda" and no_gpu:
        return [], [*rows, *(task.row("not-run", no_gpu) for task in tasks)]
    if request.device == "auto" and no_gpu:
        rows += [t.row("not-run", no_gpu) for t in _everything(request, registry, "cuda") if isinstance(t, BenchTask)]
    return tasks, rows


def _everything(request: BenchRequest, registry: Registry, device: str) -> Iterator[BenchTask | BenchRow]:
    names = list(request.operations)
    if not names and not request.steps:
        names = [name for name in timed_operations.every() if registry.names("operation", name)]
    for name in dict.fromkeys(names):
        yield from _operation(request, registry, device, name)
    steps = STEPS if EVERY in request.steps else dict.fromkeys(request.steps)
    for name in steps:
        yield from _step(request, registry, device, name)


def _operation(request: BenchRequest, registry: Registry, device: str, name: str) -> Iterator[BenchTask | BenchRow]:
    if name not in timed_operations.every():
        yield _not_run(request, name, device, "*", "not timed: no module of harness/bench/operations declares it")
        return
    available = parity_suite.load_operation(name).dtypes
    default = _DTYPE[device]
    wanted = list(dict.fromkeys(request.dtypes)) or [default if default in available else available[0]]
    per_token = timed_operations.every()[name].per_token
    for other in _others(request, registry, "operation", name):
        if isinstance(other, BenchRow):
            yield other.model_copy(update={"device": device})
            continue
        both = (request.ours, other)
        for dtype in wanted:
            task = BenchTask(
                name, "operation", name, both, _points(registry, "operation", name, both), dtype, device,
                sizes=tuple(sizes(request.shapes, per_token)),
            )  # fmt: skip
            why = _unsupported(registry, task) or (
                "" if dtype in available else f"its parity suite has no case in {dtype}"
            )
            yield task.row("not-run", why) if why else task


def _step(request: BenchRequest, registry: Registry, device: str, name: str) -> Iterator[BenchTask | BenchRow]:
    step = STEPS[name]
    for other in _others(request, registry, "method", step.method, f"step:{name}"):
        if isinstance(other, BenchRow):
            yield other.model_copy(update={"device": device})
            continue
        both, packers = (request.ours, other), ("", "")
        points = _points(registry, "method", step.method, both)
        if step.base:
            offering = registry.names("base", step.base)
            packing = [one for one in offering if one not in (request.ours, REFERENCE)]
            if request.ours not in offering or not packing:
                yield _not_run(
                    request,
                    f"step:{name}",
                    device,
                    other,
                    f"packers of {step.base}: {', '.join(offering) or 'none'}; needs two",
                )
                continue
            packers = (request.ours, other if other in packing else packing[0])
            points += _points(registry, "base", step.base, packers)
        for dtype in dict.fromkeys(request.dtypes or [_DTYPE[device]]):
            task = BenchTask(
                f"step:{name}", "method", step.method, both, tuple(dict.fromkeys(points)), dtype, device, step=name,
                base=step.base, packers=packers,
            )  # fmt: skip
            why = _unsupported(registry, task)
            yield task.row("not-run", why) if why else task


def _others(
    request: BenchRequest, registry: Registry, kind: str, target: str, called: str = ""
) -> Iterator[str | BenchRow]:
    """Yield the implementations to compare with, or rows with the reason why one cannot be."""
    offering, called = registry.names(kind, target), called or target
    others = [name for name in offering if name != request.ours]
    if request.ours not in offering:
        yield _not_run(request, called, "", "*", f"{request.ours} does not offer {target}")
        return
    if request.vs:
        wanted = list(dict.fromkeys(request.vs))
    else:
        # A variant of a library (`bitsandbytes-paged`) is compared only on request (--vs).
        wanted = [n for n in others if n != REFERENCE and not any(n.startswith(f"{o}-") for o in offering)]
        wanted = wanted or [n for n in others if n == REFERENCE]
    if not wanted:
        yield _not_run(request, called, "", "-", f"only {request.ours} offers {target}")
    for name in wanted:
        yield name if name in others else _not_run(request, called, "", name, f"{name} does not offer {target}")


def _points(registry: Registry, kind: str, target: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(registry.find(kind, target, name).point for name in names))


def _unsupported(registry: Registry, task: BenchTask) -> str:
    for name in task.names:
        it = registry.find(task.kind, task.target, name)
        if task.dtype not in it.dtypes:
            return f"{name} does not offer {task.dtype}"
        if task.device not in it.devices:
            return f"{name} does not run on {task.device}"
    return ""


def _not_run(request: BenchRequest, name: str, device: str, other: str, because: str) -> BenchRow:
    return BenchRow(
        name=name,
        shape="-",
        dtype="-",
        device=device,
        ours=request.ours,
        other=other,
        outcome="not-run",
        because=because,
    )


def _check_names(request: BenchRequest, registry: Registry) -> None:
    """Raise one UsageError for all unknown names."""
    operations = sorted(name for name, kind in targets().items() if kind == "operation")
    implementations = sorted({i.name for i in registry.implementations} - {request.ours})
    unknown = [
        f"unknown {kind} {name!r}: {did_you_mean(name, known, 'there are')}"
        for kind, given, known in (
            ("operation", request.operations, operations),
            ("implementation", request.vs, implementations),
            ("step", request.steps, [*STEPS, EVERY]),
            ("dtype", request.dtypes, DTYPES),
        )
        for name in given
        if name not in known
    ]
    if unknown:
        raise UsageError("; ".join(unknown), hint="`peft-harness list implementations` shows what each one offers")
