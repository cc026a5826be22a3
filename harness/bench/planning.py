"""What `bench` is to do: one process per Operation, dtype and rival, or per training step. No torch.

Who offers what is asked of the installed plug-ins; nobody is listed here.
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
from harness.errors import UsageError, near
from harness.methods.registry import DTYPES, Registry, targets

OURS = "fused"
REFERENCE = "reference"
EVERY = "all"
_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class BenchRequest:
    """What to benchmark: every Operation that has sizes, if nothing is named.

    vs: the rivals of `ours`; without them whoever else offers it, and the reference where nobody does. pairs: of samples
    of each. backbone: the model of the training steps.
    """

    operations: Sequence[str] = ()
    vs: Sequence[str] = ()
    steps: Sequence[str] = ()
    shapes: str = "small"
    dtypes: Sequence[str] = ()
    pairs: int = 12
    device: Device = "auto"
    ours: str = OURS
    backbone: Backbone = field(default_factory=Backbone)


@dataclass(frozen=True)
class BenchTask:
    """One process. name: as rows are called; kind, target: what the two implementations `names` claim to be.

    points: their entry points. sizes: of an Operation. step, base, packers: of a training step.
    """

    name: str
    kind: Literal["operation", "method"]
    target: str
    names: tuple[str, ...]
    points: tuple[str, ...]
    dtype: str
    device: str
    sizes: tuple[BenchSize, ...] = ()
    step: str = ""
    base: str = ""
    packers: tuple[str, ...] = ()

    def words(self, asked: BenchRequest, threads: int) -> dict[str, Any]:
        """Return the task as `harness.bench.worker` reads it."""
        return {
            "kind": self.kind, "target": self.target, "names": self.names, "points": self.points, "dtype": self.dtype,
            "device": self.device, "sizes": [size.document() for size in self.sizes], "step": self.step, "base": self.base,
            "packers": self.packers, "backbone": asked.backbone.document(), "pairs": asked.pairs, "threads": threads,
        }  # fmt: skip

    def alone(self, index: int) -> BenchTask:
        """Return the same step by one of the two, for its memory."""
        return replace(self, names=self.names[index : index + 1], packers=self.packers[index : index + 1])

    def row(self, outcome: Literal["not-run", "failed"], because: str, number: int = 0) -> BenchRow:
        """Return the row of one of its benchmarks of which there is nothing to tell but why."""
        shape = f"{self.sizes[number].layer} {self.sizes[number].E}x{self.sizes[number].D}" if self.sizes else "-"
        return BenchRow(
            name=self.name, shape=shape, dtype=self.dtype, device=self.device, ours=self.names[0], other=self.names[-1],
            outcome=outcome, because=because,
        )  # fmt: skip


def plan(asked: BenchRequest, registry: Registry, no_gpu: str) -> tuple[list[BenchTask], list[BenchRow]]:
    """Return the tasks, and rows of what will not run and why. Raises UsageError for names that nobody knows.

    no_gpu: why nothing can run on a GPU; empty if something can.
    """
    _known(asked, registry)
    device = asked.device if asked.device != "auto" else "cpu" if no_gpu else "cuda"
    found = list(_everything(asked, registry, device))
    tasks = [one for one in found if isinstance(one, BenchTask)]
    rows = [one for one in found if isinstance(one, BenchRow)]
    if device == "cuda" and no_gpu:
        return [], [*rows, *(task.row("not-run", no_gpu) for task in tasks)]
    if asked.device == "auto" and no_gpu:
        rows += [t.row("not-run", no_gpu) for t in _everything(asked, registry, "cuda") if isinstance(t, BenchTask)]
    return tasks, rows


def _everything(asked: BenchRequest, registry: Registry, device: str) -> Iterator[BenchTask | BenchRow]:
    names = list(asked.operations)
    if not names and not asked.steps:
        names = [name for name in timed_operations.every() if registry.names("operation", name)]
    for name in dict.fromkeys(names):
        yield from _operation(asked, registry, device, name)
    steps = STEPS if EVERY in asked.steps else dict.fromkeys(asked.steps)
    for name in steps:
        yield from _step(asked, registry, device, name)


def _operation(asked: BenchRequest, registry: Registry, device: str, name: str) -> Iterator[BenchTask | BenchRow]:
    if name not in timed_operations.every():
        yield _not_run(
            asked, name, device, "*", "it has no sizes in harness/bench/operations.py: it is asked, not timed"
        )
        return
    there = parity_suite.load_operation(name).dtypes
    usual = _DTYPE[device]
    wanted = list(dict.fromkeys(asked.dtypes)) or [usual if usual in there else there[0]]
    per_token = timed_operations.every()[name].per_token
    for rival in _rivals(asked, registry, "operation", name):
        if isinstance(rival, BenchRow):
            yield rival.model_copy(update={"device": device})
            continue
        both = (asked.ours, rival)
        for dtype in wanted:
            task = BenchTask(
                name, "operation", name, both, _points(registry, "operation", name, both), dtype, device,
                sizes=tuple(sizes(asked.shapes, per_token)),
            )  # fmt: skip
            why = _unfit(registry, task) or ("" if dtype in there else f"its parity suite has no case in {dtype}")
            yield task.row("not-run", why) if why else task


def _step(asked: BenchRequest, registry: Registry, device: str, name: str) -> Iterator[BenchTask | BenchRow]:
    step = STEPS[name]
    for rival in _rivals(asked, registry, "method", step.method, f"step:{name}"):
        if isinstance(rival, BenchRow):
            yield rival.model_copy(update={"device": device})
            continue
        both, packers = (asked.ours, rival), ("", "")
        points = _points(registry, "method", step.method, both)
        if step.base:
            offering = registry.names("base", step.base)
            others = [one for one in offering if one not in (asked.ours, REFERENCE)]
            if asked.ours not in offering or not others:
                yield _not_run(
                    asked, f"step:{name}", device, rival, f"{step.base} is packed by {', '.join(offering) or 'nobody'}"
                )
                continue
            packers = (asked.ours, rival if rival in others else others[0])
            points += _points(registry, "base", step.base, packers)
        for dtype in dict.fromkeys(asked.dtypes or [_DTYPE[device]]):
            task = BenchTask(
                f"step:{name}", "method", step.method, both, tuple(dict.fromkeys(points)), dtype, device, step=name,
                base=step.base, packers=packers,
            )  # fmt: skip
            why = _unfit(registry, task)
            yield task.row("not-run", why) if why else task


def _rivals(
    asked: BenchRequest, registry: Registry, kind: str, target: str, called: str = ""
) -> Iterator[str | BenchRow]:
    """Yield who is to be compared with, or rows that say why somebody is not."""
    offering, called = registry.names(kind, target), called or target
    others = [name for name in offering if name != asked.ours]
    if asked.ours not in offering:
        yield _not_run(asked, called, "", "*", f"{asked.ours} does not offer {target}")
        return
    if asked.vs:
        wanted = list(dict.fromkeys(asked.vs))
    else:
        # A variant of a library (`bitsandbytes-paged`) is another of its front doors: to be had by --vs.
        wanted = [n for n in others if n != REFERENCE and not any(n.startswith(f"{o}-") for o in offering)]
        wanted = wanted or [n for n in others if n == REFERENCE]
    if not wanted:
        yield _not_run(asked, called, "", "-", f"nobody but {asked.ours} offers {target}")
    for name in wanted:
        yield name if name in others else _not_run(asked, called, "", name, f"{name} does not offer {target}")


def _points(registry: Registry, kind: str, target: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(registry.find(kind, target, name).point for name in names))


def _unfit(registry: Registry, task: BenchTask) -> str:
    for name in task.names:
        it = registry.find(task.kind, task.target, name)
        if task.dtype not in it.dtypes:
            return f"{name} does not offer {task.dtype}"
        if task.device not in it.devices:
            return f"{name} does not run on {task.device}"
    return ""


def _not_run(asked: BenchRequest, name: str, device: str, other: str, because: str) -> BenchRow:
    return BenchRow(
        name=name, shape="-", dtype="-", device=device, ours=asked.ours, other=other, outcome="not-run", because=because
    )


def _known(asked: BenchRequest, registry: Registry) -> None:
    """Raise one UsageError that names everything that nobody knows."""
    operations = sorted(name for name, kind in targets().items() if kind == "operation")
    people = sorted({i.name for i in registry.implementations} - {asked.ours})
    odd = [
        f"unknown {what} {name!r}: {near(name, there, 'there are')}"
        for what, given, there in (
            ("operation", asked.operations, operations),
            ("implementation", asked.vs, people),
            ("step", asked.steps, [*STEPS, EVERY]),
            ("dtype", asked.dtypes, DTYPES),
        )
        for name in given
        if name not in there
    ]
    if odd:
        raise UsageError("; ".join(odd), hint="`peft-harness list implementations` shows who offers what")
