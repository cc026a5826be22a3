"""A plausible run folder like that of the suite quick, built from the classes of a Record without running anything."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from harness.analysis.statistics.intervals import wilson
from harness.conformance.tolerance_constants import EPSILON
from harness.records import store
from harness.records.manifest import Comparison, Footer, Manifest
from harness.records.record import (
    Accuracy,
    AssetUse,
    Base,
    Cell,
    CheckResult,
    Environment,
    Evaluation,
    Failure,
    Item,
    Latency,
    Measurements,
    Memory,
    Outcome,
    Parameters,
    Phase,
    Provider,
    Record,
    Status,
    Training,
    TrainingMeasured,
)

T = TypeVar("T")
STARTED = "2026-01-05T09:00:00Z"
MIB = 1024 * 1024
EVIL = "x'\"></script><img src=x onerror=alert(1)>"
"""A text that would run a script, if a page did not escape it."""

# by id in the suite: accuracy, adapter parameters, head parameters, peak in MiB, ms per step
_QUICK: dict[str, tuple[float, int, int, int, float]] = {
    "head": (0.65, 0, 770, 712, 41.0),
    "full": (0.82, 22_713_986, 770, 1085, 128.0),
    "lora-r1": (0.74, 46_080, 770, 803, 84.0),
    "reference": (0.81, 368_640, 770, 822, 91.0),
    "fused": (0.81, 368_640, 770, 806, 82.0),
    "hf-peft": (0.811, 368_640, 770, 818, 97.0),
    "float64": (0.81, 368_640, 770, 1502, 233.0),
    "nf4": (0.803, 368_640, 770, 781, 160.0),
    "zero-shot": (0.62, 0, 0, 905, 0.0),
    "smollm-lora": (0.845, 2_442_240, 0, 1610, 905.0),
}


def cells(seed: int = 0) -> dict[str, Cell]:
    """Return ten Cells like those of the suite quick, by short name."""
    small = {"model": "minilm-l6", "task": "movie-sentiment", "seed": seed, "evaluation": Evaluation(items=1000)}
    large = {"model": "smollm2-135m-instruct", "task": "movie-sentiment", "seed": seed}
    large["evaluation"] = Evaluation(items=200)
    budget = Training(steps=60, batch=16, warmup=6, max_tokens=40, lr=2e-3)
    r8 = {"method": "lora", "config": {"rank": 8, "alpha": 16}, "training": budget, **small}
    return {
        "head": Cell(method="frozen", implementation="reference", training=budget, **small),
        "full": Cell(
            method="full", implementation="reference", training=budget.model_copy(update={"lr": 2e-4}), **small
        ),
        "lora-r1": Cell(**{**r8, "config": {"rank": 1, "alpha": 2}}, implementation="reference"),
        "reference": Cell(**r8, implementation="reference"),
        "fused": Cell(**r8, implementation="fused"),
        "hf-peft": Cell(**r8, implementation="hf-peft"),
        "float64": Cell(**r8, implementation="reference", dtype="float64"),
        "nf4": Cell(**r8, implementation="reference", base=Base(quantization="nf4", implementation="bitsandbytes")),
        "zero-shot": Cell(
            method="frozen", implementation="reference", training=Training(steps=0, batch=8, max_tokens=64), **large
        ),
        "smollm-lora": Cell(
            method="lora",
            implementation="reference",
            config={"rank": 8, "alpha": 16},
            training=Training(steps=30, batch=8, warmup=3, max_tokens=64),
            **large,
        ),
    }


def comparisons(c: dict[str, Cell]) -> list[Comparison]:
    """Return the three questions of the suite quick."""
    r8 = [c[name].cell_id for name in ("reference", "fused", "hf-peft")]
    return [
        Comparison(kind="better", left=r8, right=[c["head"].cell_id], says="LoRA scores higher than the head alone"),
        Comparison(kind="better", left=r8, right=[c["lora-r1"].cell_id], says="rank 8 scores higher than rank 1"),
        Comparison(
            kind="same-losses",
            left=r8,
            right=[c["float64"].cell_id],
            says="the three implementations compute the same training run",
        ),
    ]


def _once_for_each_cell(make: Callable[..., T]) -> Callable[..., T]:
    """Return `make`, a function of a Cell and numbers, with its results kept. Each call gets a list of its own."""
    kept: dict[tuple[Any, ...], T] = {}

    @wraps(make)
    def found(cell: Cell, *numbers: float) -> T:
        key = (cell.model_dump_json(), *numbers)
        if key not in kept:
            kept[key] = make(cell, *numbers)
        return copy.copy(kept[key])

    return found


def environment(**changes: Any) -> Environment:
    fields: dict[str, Any] = {
        "id": "e0f1a2b3c4d5",
        "software": {"python": "3.12.3", "torch": "2.9.1+cpu", "transformers": "5.1.0", "peft": "0.19.0"},
        "machine": {"cpu": "Example 4-core", "system": "Linux x86_64", "memory": "16 GiB"},
        "code_version": "c" * 64,
        "git_sha": "0123abc",
        "git_dirty": False,
        "threads": 2,
    }
    return Environment(**{**fields, **changes})


def assets(sha256: str = "a" * 64, model: str = "minilm-l6") -> list[AssetUse]:
    return [AssetUse(name=model, source="package index", sha256=sha256, licence="Apache-2.0")]


def losses(cell: Cell) -> list[float]:
    """Return falling losses, one per step. Implementations of a recipe differ only by the rounding of their dtype."""
    what = f"{cell.model}{cell.method}{cell.config}{cell.base}{cell.seed}"
    exact, noise = random.Random(what), random.Random(f"{what}{cell.implementation}{cell.dtype}")
    pace = {"frozen": 0.25, "full": 1.2}.get(cell.method, 1.0)
    floor = 0.42 + (0.03 if cell.base.quantization != "none" else 0.0)
    found = []
    for t in range(cell.training.steps):
        share = 1 / (1 + pace * t / 9)
        value = floor + (0.70 - floor) * share + 0.05 * exact.gauss(0, 1) * (0.4 + share)
        found.append(value * (1 + EPSILON[cell.dtype] * (1 + t / 4) * noise.uniform(-1, 1)))
    return found


def items(cell: Cell, share: float) -> list[Item]:
    """Return scored items with exactly this accuracy. The same items are hard for all Cells."""
    n = cell.evaluation.items
    hard = random.Random(f"items{cell.task}")
    own = random.Random(f"{cell.method}{cell.config}{cell.base}{cell.seed}")
    score = [hard.random() + 0.12 * own.gauss(0, 1) for _ in range(n)]
    right = set(sorted(range(n), key=lambda i: score[i])[: round(share * n)])
    return [Item(id=f"review-{i}", correct=int(i in right)) for i in range(n)]


@_once_for_each_cell
def accuracy(cell: Cell, share: float) -> Accuracy:
    scored = items(cell, share)
    correct = sum(i.correct for i in scored)
    low, high = wilson(correct, len(scored))
    return Accuracy(
        metric="acc",
        scored_by="lm-eval 0.4.9",
        value=correct / len(scored),
        low=low,
        high=high,
        interval="Wilson 95 %",
        items=scored,
    )


@_once_for_each_cell
def _training(cell: Cell, ms: float) -> TrainingMeasured | None:
    if not cell.training.steps:
        return None
    steps, batch = cell.training.steps, cell.training.batch
    rng, data = random.Random(f"time{cell.cell_id}"), random.Random(f"data{cell.model}{cell.seed}")
    tokens = [sum(data.randint(8, cell.training.max_tokens) for _ in range(batch)) for _ in range(steps)]
    return TrainingMeasured(
        losses=losses(cell),
        step_seconds=[ms / 1000 * (2.5 if t < 3 else 1) * (1 + 0.05 * abs(rng.gauss(0, 1))) for t in range(steps)],
        tokens=tokens,
        padded_tokens=[batch * cell.training.max_tokens] * steps,
        gradient_norms=[1.0 + 0.1 * rng.random() for _ in range(steps)],
        timing_warmup=5,
    )


@_once_for_each_cell
def _latency(cell: Cell) -> list[Latency]:
    rng = random.Random(f"latency{cell.cell_id}")
    base = 6.0 if cell.model == "minilm-l6" else 45.0
    found = []
    for kind, tokens in (("forward", 40),) if base < 10 else (("prefill", 64), ("decode", 1)):
        for variant, factor in (("base", 1.0), ("unmerged", 1.35), ("merged", 1.01)):
            because = ""
            if cell.method != "lora" and variant != "base":
                because = "there is no adapter"
            if cell.base.quantization != "none" and variant == "merged":
                because = "cannot merge into a 4-bit weight"
            samples = [] if because else [base * factor / 1000 * (1 + 0.03 * rng.random()) for _ in range(20)]
            found.append(
                Latency(variant=variant, kind=kind, batch=1, tokens=tokens, seconds=samples, because=because)  # type: ignore[arg-type]
            )
    return found


@_once_for_each_cell
def checks(cell: Cell) -> list[CheckResult]:
    if cell.method in ("frozen", "full"):
        return []
    rng = random.Random(f"checks{cell.cell_id}")
    found = []
    for name in ("forward", "gradient", "step", "merge", "round-trip"):
        for state in ("init", "warm"):
            allowed = EPSILON[cell.dtype] * (40 + 20 * rng.random())
            found.append(
                CheckResult(
                    check=f"{cell.method}/{name}/{cell.dtype}/{state}",
                    outcome=Outcome.PASS,
                    error=allowed * rng.uniform(0.1, 0.7),
                    allowed=allowed,
                    tensor="layer.0.query.A",
                    policy="noise-floor k=2",
                )
            )
    skipped = CheckResult(
        check=f"{cell.method}/dropout/{cell.dtype}/warm", outcome=Outcome.SKIPPED, detail="no way to inject a mask"
    )
    return [*found, skipped]


def record(name: str, cell: Cell, run: str = "recorded", attempt: int = 1, **changes: Any) -> Record:
    """Return the ok Record of a Cell of `cells()`, with the fields in `changes` replaced."""
    share, adapter, head, peak, ms = _QUICK[name]
    training = _training(cell, ms)
    spent = sum(training.step_seconds) if training else 0.0
    large = cell.model != "minilm-l6"
    weights = (135_000_000 if large else 22_700_000) * (8 if cell.dtype == "float64" else 4)
    phases = [
        Phase(name="start-up", seconds=3.1, peak_memory_B=420 * MIB),
        Phase(name="load", seconds=2.4 if large else 0.9, peak_memory_B=(peak - 120) * MIB),
        Phase(name="parity", seconds=1.6 if cell.method == "lora" else 0.0, peak_memory_B=(peak - 90) * MIB),
        *([Phase(name="train", seconds=spent, peak_memory_B=peak * MIB)] if training else []),
        Phase(name="evaluate", seconds=22.0 if large else 7.5, peak_memory_B=(peak - 40) * MIB),
        Phase(name="latency", seconds=1.9, peak_memory_B=(peak - 60) * MIB),
    ]
    trained = adapter + head
    fields: dict[str, Any] = {
        "schema": 1,
        "run": run,
        "cell_id": cell.cell_id,
        "attempt": attempt,
        "status": Status.OK,
        "cell": cell,
        "provider": Provider(
            distribution="peft" if cell.implementation == "hf-peft" else "peft-harness", version="1.0"
        ),
        "environment": environment(),
        "assets": assets(model=cell.model),
        "started": STARTED,
        "duration_s": sum(p.seconds for p in phases) + 0.2,
        "phases": phases,
        "checks": checks(cell),
        "measurements": Measurements(
            parameters=Parameters(adapter=adapter, head=head, total=22_713_986 + trained),
            training=training,
            memory=Memory(
                source="VmHWM",
                baseline_B=410 * MIB,
                weights_B=weights,
                adapter_B=4 * trained,
                gradients_B=4 * trained if training else 0,
                optimizer_B=8 * trained if training else 0,
            ),
            latency=_latency(cell),
            accuracy=accuracy(cell, share),
        ),
    }
    return Record(**{**fields, **changes})


def failed(good: Record, status: Status = Status.ERROR, **changes: Any) -> Record:
    """Return a Record of the same Cell that did not end ok."""
    fields = {
        "schema": 1,
        **{key: getattr(good, key) for key in ("run", "cell_id", "attempt", "cell", "environment", "started")},
        "duration_s": 4.2,
        "status": status,
        "because": "the worker raised RuntimeError",
        "phases": good.phases[:2],
        "failure": Failure(
            kind="RuntimeError",
            message="mat1 and mat2 shapes cannot be multiplied",
            traceback='Traceback (most recent call last):\n  File "worker.py", line 1\nRuntimeError: ...\n',
            phase="train",
        ),
    }
    return Record(**{**fields, **changes})


def with_losses(good: Record, new: Sequence[float]) -> Record:
    """Return a copy of an ok Record with other losses."""
    assert good.measurements is not None
    assert good.measurements.training is not None
    training = good.measurements.training.model_copy(update={"losses": list(new)})
    return good.model_copy(update={"measurements": good.measurements.model_copy(update={"training": training})})


def with_accuracy(good: Record, share: float) -> Record:
    """Return a copy of an ok Record with another accuracy."""
    assert good.measurements is not None
    new = good.measurements.model_copy(update={"accuracy": accuracy(good.cell, share)})
    return good.model_copy(update={"measurements": new})


def write_run(
    folder: Path,
    *,
    run: str = "recorded",
    change: Callable[[str, Record], Record | None] = lambda _, record: record,
    footer: bool = True,
    only: Sequence[str] = (),
    extra: Sequence[Record] = (),
    asked: Callable[[dict[str, Cell]], list[Comparison]] = comparisons,
    **manifest: Any,
) -> store.Run:
    """Write a run folder, and return the run as read from it.

    change: takes the short name and the ok Record of a Cell; returns the Record to write, or None for no Record.
    footer: False leaves the run unfinished. only: short names of the expected Cells; empty: all. extra: Records of
    further attempts. asked: returns the comparisons of the suite. manifest: fields of run.json to replace.
    """
    every = cells()
    expected = {name: every[name] for name in only or every}
    fields: dict[str, Any] = {
        "schema": 1,
        "run": run,
        "suite": "quick",
        "title": "Methods and ranks on two small pretrained models",
        "about": "The main job in a few minutes on a CPU. One seed.",
        "suite_file": "suites/quick.yaml",
        "suite_sha256": "b" * 64,
        "comparisons": asked(every) if asked is not comparisons or not only else [],
        "cells": list(expected.values()),
        "environment": environment(),
        "argv": ["peft-harness", "run", "quick"],
        "started": STARTED,
        "harness_version": "0.1.0",
    }
    target = store.RunFolder.create(folder, Manifest(**{**fields, **manifest}))
    written = [r for name, cell in expected.items() if (r := change(name, record(name, cell, run))) is not None]
    for r in [*written, *extra]:
        target.write_record(r.model_copy(update={"run": run}))
    if footer:
        inside = sum(r.duration_s for r in written)
        done = {r.cell_id for r in written}
        target.close(
            store.read_run(target.path),
            Footer(
                schema=1,
                run=run,
                ended="2026-01-05T09:04:00Z",
                how="finished",
                counts={},
                missing=[c.cell_id for c in expected.values() if c.cell_id not in done],
                seconds_total=inside + 9.0,
                seconds_in_cells=inside,
                seconds_outside={"fetch": 5.2, "startup": 1.6, "scheduling": 0.6, "report": 0.4},
            ),
        )
    return store.read_run(folder)


def write_hostile_run(folder: Path) -> store.Run:
    """Write a run folder in which every text is `EVIL`, and return the run as read from it."""
    cell = cells()["reference"].model_copy(
        update={"model": EVIL, "implementation": EVIL, "task": EVIL, "config": {"rank": EVIL}}
    )
    first = record("reference", cell).model_copy(update={"notes": [EVIL]})
    other = record("fused", cell.model_copy(update={"seed": 1}))
    failure = Failure(kind=EVIL, message=EVIL, traceback=EVIL, phase=EVIL)
    bad = failed(other, because=EVIL, failure=failure, phases=[Phase(name=EVIL, seconds=1.0)])
    return write_run(
        folder, only=["head"], cells=[cell, other.cell], change=lambda *_: None, extra=[first, bad],
        title=EVIL, about=EVIL, argv=[EVIL], suite_file=EVIL, suite_text=EVIL,
        environment=environment(machine={EVIL: EVIL}),
    )  # fmt: skip
