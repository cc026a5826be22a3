"""Benchmark a training step: two implementations pass the parity gate of a Cell, then alternate steps."""

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
from harness.bench.verdict import judge_parity
from harness.cell.measure.memory import PeakMeter
from harness.conformance import parity_suite
from harness.conformance.execution import suite_run
from harness.conformance.findings.outcomes import CheckOutcome
from harness.conformance.subject import DTYPES, configure
from harness.errors import Unsupported
from harness.methods.registry import Implementation, Registry
from reference.galore import project, projector

JUDGED_FEATURES, JUDGED_RANK = 128, 16
"""Size of the layers on which GaLore is judged."""
MEASURED_STEPS = 3
"""Steps over which the memory peak is taken."""


def row(
    name: str, step: StepBenchmark, both: tuple[Implementation, Implementation], packers: tuple[str, str], shape: Backbone,
    dtype: str, device: torch.device, pairs: int, registry: Registry, facts: dict[str, Any],
) -> BenchRow:  # fmt: skip
    """Return the row of one step by two implementations."""
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
    checks, outcome, because = judge_parity(parity)
    samples = products = None
    losses: dict[str, list[float]] = {}
    if outcome == "measured":
        for trainee in trainees:
            trainee.start_training()
        limit = frozen_pass(shape, DTYPES[dtype], device)
        samples = timing.pairs(
            timing.Clock(device), trainees[0].step, trainees[1].step, pairs, limit=limit, single=True
        )
        losses = {it.name: list(trainee.losses) for it, trainee in zip(both, trainees, strict=True)}
        # torch counts neither products in Triton kernels nor those of a library on NF4.
        if device.type == "cpu" and not step.base:
            ours, other = (flops(trainee.step) for trainee in trainees)
            products = Products(ours=ours, other=other, frozen=flops(limit))
    return BenchRow(
        name=f"step:{name}", shape=case, dtype=dtype, device=device.type, ours=both[0].name, other=both[1].name,
        outcome=outcome, because=because, parity=checks, samples=samples, products=products,
        losses=losses, facts=facts | {"packed by": list(packers)} if step.base else facts,
    )  # fmt: skip


def memory(
    step: StepBenchmark, implementation: Implementation, packer: str, shape: Backbone, dtype: str, device: torch.device,
    registry: Registry,
) -> dict[str, int]:  # fmt: skip
    """Return the memory of this process in bytes: peak during a few steps, before them (rest), and before the model (bare).

    The last is the memory of imported libraries.
    """
    import transformers.models.llama.modeling_llama  # noqa: F401

    meter = PeakMeter(device)
    meter.reset()
    bare = meter.now()
    if step.method == "galore":
        # No variable for the weight, which the layer copies: it would stay alive and count as memory of the step.
        run = _Galore(step, implementation, torch.zeros((shape.features,) * 2, dtype=DTYPES[dtype], device=device))
        take: Callable[[], object] = run.step
    else:
        trainee = AdaptedLlama(implementation, step, shape, dtype, device, registry, packer)
        trainee.start_training()
        take = trainee.step
    meter.reset()
    rest = meter.now()
    for _ in range(MEASURED_STEPS):
        take()
    return {"peak_B": meter.peak(), "rest_B": rest, "bare_B": bare}


class _Galore:
    """One weight with GaLore's optimizer; its gradients are the same for every implementation."""

    def __init__(self, step: StepBenchmark, implementation: Implementation, weight: Tensor) -> None:
        rows, columns = weight.shape
        layer = nn.Linear(columns, rows, bias=False, device=weight.device, dtype=weight.dtype)
        layer.weight.data.copy_(weight)
        model, self.config = nn.ModuleDict({"weighted": layer}), step.config
        try:
            adapted = self._attach(model, step.method, implementation)
        except Unsupported:
            if step.fallback is None:
                raise
            self.config = step.fallback
            adapted = self._attach(model, step.method, implementation)
        self.weight, self.optimizer = layer.weight, adapted.optimizer(LR, WEIGHT_DECAY)
        self.generator = torch.Generator().manual_seed(SEED)

    def _attach(self, model: nn.Module, method: str, implementation: Implementation) -> Any:
        config = configure(method, {**self.config, "targets": ["weighted"]})
        return implementation(model, config, torch.Generator().manual_seed(SEED))

    def draw(self) -> None:
        """Draw the next gradient, outside of the timed step."""
        shape = self.weight.shape
        self.weight.grad = torch.randn(shape, generator=self.generator).to(self.weight.device, self.weight.dtype)

    def step(self) -> None:
        if self.weight.grad is None:
            self.draw()
        self.optimizer.step()


class _Products:
    """The two products that every step of GaLore on a square weight needs, with the same gradients."""

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
    """Time whole cycles of one refresh and some ordinary steps; a sample is the mean over `GALORE_GAP` steps like them.

    Parity: the whole suite of the Method on layers of fewer features, on the timed device.
    """
    plan = parity_suite.load(step.method)
    small = parity_suite.CaseShape.model_validate({"tokens": 16, "in": JUDGED_FEATURES, "out": JUDGED_FEATURES})
    weight = torch.randn(shape.features, shape.features, generator=torch.Generator().manual_seed(SEED))
    runs = [_Galore(step, it, weight.to(device, DTYPES[dtype])) for it in both]
    parity: list[CheckOutcome] = []
    for it, one in zip(both, runs, strict=True):
        of = parity_suite.MethodCase({**one.config, "rank": JUDGED_RANK}, "linear", small, dtype)  # type: ignore[arg-type]
        parity += suite_run.run_case(it, plan, of, device)
    checks, outcome, because = judge_parity(parity)
    samples = None
    if outcome == "measured":
        samples = _cycles(runs, pairs, device)
    return BenchRow(
        name=f"step:{name}", shape=f"{shape.features}x{shape.features}, rank {step.config['rank']}", dtype=dtype,
        device=device.type, ours=both[0].name, other=both[1].name, outcome=outcome, because=because,
        differs=_differs(both, runs),
        judged=f"{JUDGED_FEATURES}x{JUDGED_FEATURES}, rank {JUDGED_RANK}, the whole suite of galore", parity=checks,
        samples=samples, limit=PRODUCTS, facts=facts | {"a refresh every": GALORE_GAP, "timed in cycles of": CYCLE},
    )  # fmt: skip


def _differs(both: tuple[Implementation, Implementation], runs: list[_Galore]) -> str:
    """Describe how two refreshes differ and how much of the gradient each retains; empty if both configs are equal."""
    niters = [one.config.get("niter", 0) for one in runs]
    if niters[0] == niters[1]:
        return ""
    runs[0].draw()
    G, rank = runs[0].weight.grad, runs[0].config["rank"]
    assert G is not None  # noqa: S101  drawn above
    retained = [float(project(G, projector(G, rank, niter=niter)).double().square().sum()) for niter in niters]
    methods = [f"a randomised SVD (niter {niter})" if niter else "the exact SVD" for niter in niters]
    return (
        f"{both[0].name} refreshes by {methods[0]}, {both[1].name} by {methods[1]}; on these gradients (white noise) the "
        f"first refresh retains {retained[0] / retained[1]:.1%} of the squares that the other retains"
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
    """Return the mean step with one refresh per `GALORE_GAP` steps, from the times of a cycle with one refresh in it."""
    ordinary = median(times)
    refresh = max(sum(times) - (len(times) - 1) * ordinary, ordinary)
    return ((GALORE_GAP - 1) * ordinary + refresh) / GALORE_GAP
