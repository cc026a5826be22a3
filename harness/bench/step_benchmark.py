"""A training step benchmarked: both implementations take a Cell's parity gate, then steps in turn."""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from harness.bench import timing
from harness.bench.adapted_llama import LR, SEED, WEIGHT_DECAY, AdaptedLlama, frozen_pass
from harness.bench.matrix_flops import flops
from harness.bench.results import BenchRow, Products, Samples
from harness.bench.steps import CYCLE, GALORE_GAP, PRODUCTS, Backbone, StepBenchmark
from harness.bench.verdict import standing
from harness.cell.measure.memory import PeakMeter
from harness.conformance import parity_suite
from harness.conformance.execution import suite_run
from harness.conformance.findings.outcomes import CheckOutcome
from harness.conformance.subject import DTYPES, configure
from harness.errors import Unsupported
from harness.methods.registry import Implementation, Registry
from reference.galore import project, projector

JUDGED_FEATURES, JUDGED_RANK = 128, 16
MEASURED_STEPS = 3


def row(
    name: str, step: StepBenchmark, both: tuple[Implementation, Implementation], packers: tuple[str, str], shape: Backbone,
    dtype: str, device: torch.device, pairs: int, registry: Registry, facts: dict[str, Any],
) -> BenchRow:  # fmt: skip
    """Return the benchmark of one step by two implementations."""
    if step.method == "galore":
        return _galore(name, step, both, shape, dtype, device, pairs, facts)
    trainees = [
        AdaptedLlama(it, step, shape, dtype, device, registry, packer)
        for it, packer in zip(both, packers, strict=True)
    ]  # fmt: skip
    case = f"{shape.layers} layers {shape.width}, {shape.batch}x{shape.tokens}"
    parity = [
        CheckOutcome(implementation=it.name, kind="method", target=step.method, dtype=dtype, case=case, result=result)
        for it, trainee in zip(both, trainees, strict=True)
        for result in trainee.parity()
    ]
    tried, outcome, because = standing(parity)
    samples = products = None
    losses: dict[str, list[float]] = {}
    if outcome == "measured":
        for trainee in trainees:
            trainee.settle()
        limit = frozen_pass(shape, DTYPES[dtype], device)
        samples = timing.pairs(timing.Clock(device), trainees[0].step, trainees[1].step, pairs, limit=limit, alone=True)
        losses = {it.name: list(trainee.losses) for it, trainee in zip(both, trainees, strict=True)}
        if (
            device.type == "cpu" and not step.base
        ):  # torch counts neither Triton's products nor those of a library on NF4
            ours, other = (flops(trainee.step) for trainee in trainees)
            products = Products(ours=ours, other=other, frozen=flops(limit))
    return BenchRow(
        name=f"step:{name}", shape=case, dtype=dtype, device=device.type, ours=both[0].name, other=both[1].name,
        outcome=outcome, because=because, parity=tried, samples=samples, products=products,
        losses=losses, facts=facts | {"packed by": list(packers)} if step.base else facts,
    )  # fmt: skip


def memory(
    step: StepBenchmark, implementation: Implementation, packer: str, shape: Backbone, dtype: str, device: torch.device,
    registry: Registry,
) -> dict[str, int]:  # fmt: skip
    """Return in bytes the peak of a few steps in this process, what it held before them, and what before there was a model.

    The last is what importing libraries takes, once their modules are all there.
    """
    import transformers.models.llama.modeling_llama  # noqa: F401

    meter = PeakMeter(device)
    meter.reset()
    bare = meter.now()
    if step.method == "galore":
        # Without a name for the weight, which the layer copies: it would stay beside that and count as the step's.
        made = _Galore(step, implementation, torch.zeros((shape.features,) * 2, dtype=DTYPES[dtype], device=device))
        take: Callable[[], object] = made.step
    else:
        trainee = AdaptedLlama(implementation, step, shape, dtype, device, registry, packer)
        trainee.settle()
        take = trainee.step
    meter.reset()
    rest = meter.now()
    for _ in range(MEASURED_STEPS):
        take()
    return {"peak_B": meter.peak(), "rest_B": rest, "bare_B": bare}


class _Galore:
    """One weight under a Method's own optimizer, given the same gradients by whoever steps it."""

    def __init__(self, step: StepBenchmark, implementation: Implementation, weight: Tensor) -> None:
        rows, columns = weight.shape
        layer = nn.Linear(columns, rows, bias=False, device=weight.device, dtype=weight.dtype)
        layer.weight.data.copy_(weight)
        model, self.config = nn.ModuleDict({"weighted": layer}), step.config
        try:
            adapted = self._attach(model, step.method, implementation)
        except Unsupported:
            if step.theirs is None:
                raise
            self.config = step.theirs
            adapted = self._attach(model, step.method, implementation)
        self.weight, self.optimizer = layer.weight, adapted.optimizer(LR, WEIGHT_DECAY)
        self.generator = torch.Generator().manual_seed(SEED)

    def _attach(self, model: nn.Module, method: str, implementation: Implementation) -> Any:
        knobs = configure(method, {**self.config, "targets": ["weighted"]})
        return implementation(model, knobs, torch.Generator().manual_seed(SEED))

    def draw(self) -> None:
        """Draw the next gradient, which no sample holds."""
        shape = self.weight.shape
        self.weight.grad = torch.randn(shape, generator=self.generator).to(self.weight.device, self.weight.dtype)

    def step(self) -> None:
        if self.weight.grad is None:
            self.draw()
        self.optimizer.step()


class _Products:
    """What no step of GaLore on a square weight can avoid, given the same gradients."""

    def __init__(self, like: _Galore) -> None:
        self.weight, self.like = like.weight.detach().clone(), like
        self.basis = torch.randn(len(self.weight), like.config["rank"]).to(self.weight)
        self.low = torch.empty_like(self.basis)

    def draw(self) -> None:
        self.like.draw()

    def step(self) -> None:
        assert self.like.weight.grad is not None  # noqa: S101  drawn
        torch.mm(self.like.weight.grad, self.basis, out=self.low)
        self.weight.addmm_(self.low, self.basis.T, alpha=LR)


def _galore(
    name: str, step: StepBenchmark, both: tuple[Implementation, Implementation], shape: Backbone, dtype: str,
    device: torch.device, pairs: int, facts: dict[str, Any],
) -> BenchRow:  # fmt: skip
    """Time whole cycles of one refresh and some ordinary steps; a sample is the mean over `GALORE_GAP` steps made of them.

    Parity: the whole suite of the Method on two layers of fewer features, on the device whose kernels are timed.
    """
    plan = parity_suite.load(step.method)
    small = parity_suite.CaseShape.model_validate({"tokens": 16, "in": JUDGED_FEATURES, "out": JUDGED_FEATURES})
    weight = torch.randn(shape.features, shape.features, generator=torch.Generator().manual_seed(SEED))
    alone = [_Galore(step, it, weight.to(device, DTYPES[dtype])) for it in both]
    parity = []
    for it, one in zip(both, alone, strict=True):
        of = parity_suite.MethodCase({**one.config, "rank": JUDGED_RANK}, "linear", small, dtype)  # type: ignore[arg-type]
        parity += [
            CheckOutcome(
                implementation=it.name, kind="method", target=step.method, dtype=dtype, case=str(of), result=result
            )
            for result in suite_run.one_case(it, plan, of, device)
        ]
    tried, outcome, because = standing(parity)
    samples = None
    if outcome == "measured":
        samples = _cycles(alone, pairs, device)
    return BenchRow(
        name=f"step:{name}", shape=f"{shape.features}x{shape.features}, rank {step.config['rank']}", dtype=dtype,
        device=device.type, ours=both[0].name, other=both[1].name, outcome=outcome, because=because,
        differs=_differs(both, alone),
        judged=f"{JUDGED_FEATURES}x{JUDGED_FEATURES}, rank {JUDGED_RANK}, the whole suite of galore", parity=tried,
        samples=samples, limit=PRODUCTS, facts=facts | {"a refresh every": GALORE_GAP, "timed in cycles of": CYCLE},
    )  # fmt: skip


def _differs(both: tuple[Implementation, Implementation], alone: list[_Galore]) -> str:
    """Say whose refresh is randomised and how much of the gradient that keeps; nothing where both configs are one."""
    niters = [one.config.get("niter", 0) for one in alone]
    if niters[0] == niters[1]:
        return ""
    alone[0].draw()
    G, rank = alone[0].weight.grad, alone[0].config["rank"]
    assert G is not None  # noqa: S101  drawn above
    kept = [float(project(G, projector(G, rank, niter=niter)).double().square().sum()) for niter in niters]
    said = [f"a randomised SVD (niter {niter})" if niter else "the exact SVD" for niter in niters]
    return (
        f"{both[0].name} refreshes by {said[0]}, {both[1].name} by {said[1]}; of these gradients, white noise, a first "
        f"refresh keeps {kept[0] / kept[1]:.1%} of the squares that the other keeps"
    )


def _cycles(both: list[_Galore], pairs: int, device: torch.device) -> Samples:
    clock, names, least = timing.Clock(device), ("ours", "other"), _Products(both[0])
    found: dict[str, list[float]] = {"ours": [], "other": []}
    parts: dict[str, list[list[float]]] = {"ours": [], "other": []}
    limit: list[float] = []
    first: list[Any] = []

    def cycle(one: _Galore | _Products) -> list[float]:
        times = []
        for _ in range(CYCLE):
            one.draw()
            times.append(clock.sample(one.step))
        return times

    warmup = {who: cycle(one) for who, one in zip(names, both, strict=True)}
    turned = random.random() < 0.5  # noqa: S311
    with timing.no_collector():
        for _ in range(pairs):
            order = names[::-1] if turned else names
            first.append(order[0])
            for who in order:
                times = cycle(both[names.index(who)])
                parts[who].append(times)
                found[who].append(_per_step(times))
            limit.append(median(cycle(least)))
            turned = not turned
    return Samples(ours=found["ours"], other=found["other"], limit=limit, first=first, warmup=warmup, parts=parts)


def _per_step(times: list[float]) -> float:
    """Return the mean step where refreshes are `GALORE_GAP` steps apart, from a cycle with one refresh anywhere in it."""
    ordinary = median(times)
    refresh = max(sum(times) - (len(times) - 1) * ordinary, ordinary)
    return ((GALORE_GAP - 1) * ordinary + refresh) / GALORE_GAP
