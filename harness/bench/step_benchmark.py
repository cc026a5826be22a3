"""Benchmark the training steps of two implementations.

Both must first pass the parity gate: checks that compare a model with the reference. Then the steps of the two
alternate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from harness.bench import random_numbers, timing
from harness.bench.adapted_llama import LR, SEED, WEIGHT_DECAY, AdaptedLlama, StepSetting, frozen_pass
from harness.bench.matrix_flops import flops
from harness.bench.results import TIMED_CALL, BenchRow, Products, Samples
from harness.bench.step_losses import TRAINED, LossCheck
from harness.bench.steps import CYCLE, GALORE_GAP, PRODUCTS
from harness.bench.verdict import judge_parity
from harness.cell.measure.memory import PeakMeter
from harness.conformance import parity_suite
from harness.conformance.comparison.check_results import from_problems, judged
from harness.conformance.comparison.tolerance_policies import carried_noise
from harness.conformance.execution import suite_run
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus, DeviceLostError
from harness.conformance.subject import DTYPES, configure
from harness.conformance.tolerance_constants import TRAJECTORY_FACTOR
from harness.errors import Unsupported
from harness.methods.registry import Implementation
from harness.records.check import CheckResult
from reference.galore import attach, project, projector

JUDGED_FEATURES, JUDGED_RANK = 128, 16
"""Size of the layers on which GaLore's parity is checked: number of inputs and of outputs, and rank."""
JUDGED_CHECKS = ("parameters", "base", "gradient", "step", "trajectory", "refresh", "model", "deterministic")
"""Checks of GaLore's suite on the timed step. The others judge what is not timed, such as closures and 8-bit moments."""
MOVED = 0.5
"""Least share of the elements of a weight that a timed step of GaLore changes.

The weight starts at zero, so that a step changes almost all of them, in 16 bits about 85 % after hundreds of steps.
"""
DESCENT = 0.1
"""Least cosine of the angle between the signs of a timed step and the negative gradient, as a multiple of sqrt(rank /
features).

On the random gradients of a benchmark, GaLore's steps have at least 0.29, in float16 at least 0.16. A step in a random
direction has a cosine of about 1 / features. Signs are compared, since few elements dominate GaLore's step in float16.
"""
LATER_STEPS = 3
"""Number of GaLore's steps that are checked after timing. The first one computes the projector."""
MEASURED_STEPS = 3
"""Number of steps during which the memory peak is measured."""


def row(
    setting: StepSetting, both: Sequence[Implementation], packers: Sequence[str], pairs: int, facts: dict[str, Any],
    announce: timing.Announce = lambda _: None,
) -> BenchRow:  # fmt: skip
    """Check two implementations, time their training steps, and return the result.

    packers: for each implementation, the name of the implementation that packs its quantised base, or empty. pairs:
    number of pairs of samples. facts: copied into the row. announce: called before the first and after the last sample,
    except for GaLore.
    """
    if setting.step.method == "galore":
        return _galore(setting, both, pairs, facts)
    step, shape = setting.step, setting.shape
    trainees = [AdaptedLlama(it, setting, packer) for it, packer in zip(both, packers, strict=True)]
    case = f"{shape.layers} layers {shape.width}, {shape.batch}x{shape.tokens}"

    def checked(it: Implementation, trainee: AdaptedLlama) -> Iterator[CheckOutcome]:
        for result in trainee.parity():
            yield CheckOutcome(
                implementation=it.name, kind="method", target=step.method, dtype=setting.dtype, case=case, result=result
            )

    parity = _while_device_works(map(checked, both, trainees), setting.device)
    checks, outcome, because = judge_parity(parity)
    samples = products = None
    losses: dict[str, list[float]] = {}
    if outcome == "measured":
        loss_checks = [LossCheck(trainees[0])]
        loss_checks.append(LossCheck(trainees[1], loss_checks[0]))
        for trainee in trainees:
            trainee.start_training()
        limit = frozen_pass(shape, DTYPES[setting.dtype], setting.device)
        clock = timing.Clock(setting.device)
        samples = timing.pairs(
            clock, trainees[0].step, trainees[1].step, pairs, limit=limit, single=True, announce=announce
        )
        losses = {it.name: list(trainee.losses) for it, trainee in zip(both, trainees, strict=True)}
        # torch counts neither products in Triton kernels nor those of a library on NF4.
        if setting.device.type == "cpu" and not step.base:
            ours, other = (flops(trainee.step) for trainee in trainees)
            products = Products(ours=ours, other=other, frozen=flops(limit))
        after = [
            CheckOutcome(
                implementation=it.name, kind="method", target=step.method, dtype=setting.dtype, case=case,
                result=check.result(losses[it.name]),
            )
            for it, check in zip(both, loss_checks, strict=True)
        ]  # fmt: skip
        checks, outcome, because = judge_parity([*parity, *after])
        samples = samples if outcome == "measured" else None
    return BenchRow(
        name=f"step:{setting.name}", shape=case, dtype=setting.dtype, device=setting.device.type, ours=both[0].name,
        other=both[1].name, outcome=outcome, because=because, parity=checks, samples=samples, products=products,
        losses=losses, facts=facts | {"packed by": list(packers)} if step.base else facts,
    )  # fmt: skip


def _while_device_works(sides: Iterable[Iterable[CheckOutcome]], device: torch.device) -> list[CheckOutcome]:
    """Return the outcomes of both implementations, or of the first alone if its failed check loses the GPU.

    sides: for each implementation, the outcomes of its checks. Raises DeviceLostError if the GPU is lost although no
    check has failed.
    """
    found: list[CheckOutcome] = []
    for outcomes in sides:
        found += outcomes
        try:
            suite_run.require_device(device)
        except DeviceLostError:
            if not any(one.status is CheckStatus.FAIL for one in found):
                raise
            break
    return found


def memory(setting: StepSetting, implementation: Implementation, packer: str = "") -> dict[str, int]:
    """Take a few training steps. Return the memory of this process in bytes, by name.

    `peak_B` is the peak during the steps. `rest_B` is the memory just before the steps. `bare_B` is the memory that the
    imported libraries use before the model is built.
    """
    import transformers.models.llama.modeling_llama  # noqa: F401

    meter = PeakMeter(setting.device)
    meter.reset()
    bare = meter.now()
    run: _Galore | AdaptedLlama
    if setting.step.method == "galore":
        # The layer copies the weight; a variable would keep the original alive, as memory of the step.
        size = (setting.shape.features,) * 2
        run = _Galore(setting, implementation, torch.zeros(size, dtype=DTYPES[setting.dtype], device=setting.device))
    else:
        run = AdaptedLlama(implementation, setting, packer)
        run.start_training()
    meter.reset()
    rest = meter.now()
    for _ in range(MEASURED_STEPS):
        run.step()
    return {"peak_B": meter.peak(), "rest_B": rest, "bare_B": bare}


class _Galore:
    """One weight that GaLore's optimizer trains. The gradients are random, but equal for all implementations."""

    def __init__(
        self,
        setting: StepSetting,
        implementation: Callable[..., Any],
        weight: Tensor,
        config: dict[str, Any] | None = None,
    ) -> None:
        """Attach the implementation. config: replaces the step's config."""
        step = setting.step
        rows, columns = weight.shape
        layer = nn.Linear(columns, rows, bias=False, device=weight.device, dtype=weight.dtype)
        layer.weight.data.copy_(weight)
        model, self.config = nn.ModuleDict({"weighted": layer}), config or step.config
        try:
            adapted = self._attach(model, step.method, implementation)
        except Unsupported:
            if step.fallback is None:
                raise
            self.config = step.fallback
            adapted = self._attach(model, step.method, implementation)
        self.weight, self.optimizer = layer.weight, adapted.optimizer(LR, WEIGHT_DECAY)
        self.generator = random_numbers.generator(weight.device, SEED)
        self.lost = 0
        """Number of timed steps that moved too little of the weight, or not against the gradient."""

    def _attach(self, model: nn.Module, method: str, implementation: Callable[..., Any]) -> Any:
        config = configure(method, {**self.config, "targets": ["weighted"]})
        return implementation(model, config, torch.Generator().manual_seed(SEED))

    def draw(self) -> None:
        """Draw the next gradient. This is not part of the time of a step."""
        like = self.weight
        like.grad = random_numbers.normal(like.shape, self.generator, like.device, like.dtype)

    def step(self) -> None:
        if self.weight.grad is None:
            self.draw()
        self.optimizer.step()

    def judge(self, before: Tensor) -> None:
        """Count the last step as lost if it moved too little of the weight, or not against the gradient.

        before: the weight before the step.
        """
        change, gradient = (self.weight.detach() - before).float(), self.weight.grad
        assert gradient is not None  # noqa: S101  drawn
        signs = change.sign()
        descent = -(signs * gradient).sum() / (signs.norm() * gradient.float().norm())
        enough = DESCENT * (min(self.config["rank"], *change.shape) / max(change.shape)) ** 0.5
        # A step that moves nothing has the cosine NaN.
        self.lost += not (change.count_nonzero() >= MOVED * change.numel() and descent >= enough)


class _Products:
    """A program that computes only the two matrix products that every GaLore step on a square weight needs.

    Its time is a lower bound for the time of GaLore's step. like: provides the gradients.
    """

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


def _galore(setting: StepSetting, both: Sequence[Implementation], pairs: int, facts: dict[str, Any]) -> BenchRow:
    """Check two implementations of GaLore, time their steps, and return the result.

    The steps are timed in cycles. A cycle is one step that refreshes the projector, and some ordinary steps. Each cycle
    gives one sample: the mean time of a step, weighted as if one of `GALORE_GAP` steps refreshed the projector. Before
    timing, both implementations must pass `JUDGED_CHECKS` on the timed device, with smaller layers.
    """
    plan, features = parity_suite.load(setting.step.method), setting.shape.features
    plan = plan.model_copy(update={"checks": [name for name in plan.checks if name in JUDGED_CHECKS]})
    small = parity_suite.CaseShape.model_validate({"tokens": 16, "in": JUDGED_FEATURES, "out": JUDGED_FEATURES})
    zero = torch.zeros(features, features, dtype=DTYPES[setting.dtype], device=setting.device)
    runs = [_Galore(setting, it, zero) for it in both]  # zero, so that rounding the weight does not hide the updates

    def checked(it: Implementation, run: _Galore) -> Iterator[CheckOutcome]:
        config = {**run.config, "rank": JUDGED_RANK}
        case = parity_suite.MethodCase(config, "linear", small, setting.dtype)  # type: ignore[arg-type]
        return suite_run.run_case(it, plan, case, setting.device)

    parity = _while_device_works(map(checked, both, runs), setting.device)
    checks, outcome, because = judge_parity(parity)
    differs, samples, shape = "", None, f"{features}x{features}, rank {setting.step.config['rank']}"
    if outcome == "measured":
        differs, samples = _differs(both, runs), _cycles(runs, pairs, setting.device)
        after = [
            CheckOutcome(
                implementation=it.name, kind="method", target=setting.step.method, dtype=setting.dtype, case=shape,
                result=_later_steps(setting, it, run),
            )
            for it, run in zip(both, runs, strict=True)
        ]  # fmt: skip
        checks, outcome, because = judge_parity([*parity, *after])
    return BenchRow(
        name=f"step:{setting.name}", shape=shape,
        dtype=setting.dtype, device=setting.device.type, ours=both[0].name, other=both[1].name, outcome=outcome,
        because=because, differs=differs,
        judged=f"{JUDGED_FEATURES}x{JUDGED_FEATURES}, rank {JUDGED_RANK}, the checks of galore's step", parity=checks,
        samples=samples if outcome == "measured" else None, limit=PRODUCTS,
        facts=facts | {"a refresh every": GALORE_GAP, "timed in cycles of": CYCLE},
    )  # fmt: skip


def _later_steps(setting: StepSetting, it: Implementation, timed: _Galore) -> CheckResult:
    """Check that each timed step was like one of GaLore, and check the first steps of a new weight against the reference.

    The new weight has the timed size and new gradients. It starts at zero, so that rounding it does not hide the updates.
    """
    if timed.lost:
        lost = f"{timed.lost} timed steps did not change most of the weight, or not against the gradient"
        return from_problems(setting, TRAINED, TIMED_CALL, [lost])
    dtype, size = DTYPES[setting.dtype], (setting.shape.features,) * 2
    generator = random_numbers.generator(setting.device, SEED + 1)
    gradients = [random_numbers.normal(size, generator, setting.device, dtype) for _ in range(LATER_STEPS)]

    def trained(by: Callable[..., Any], dtype: torch.dtype) -> dict[str, Tensor]:
        run = _Galore(setting, by, torch.zeros(size, dtype=dtype, device=setting.device), timed.config)
        for gradient in gradients:
            run.weight.grad = gradient.to(dtype)
            run.step()
        return {"weight": run.weight.detach()}

    truth, rounded = (trained(attach, one) for one in (torch.float64, dtype))
    found = carried_noise(trained(it, dtype), truth, rounded, setting.dtype, TRAJECTORY_FACTOR)
    return judged(setting, TRAINED, TIMED_CALL, found, f"a new weight after {LATER_STEPS} steps")


def _differs(both: Sequence[Implementation], runs: Sequence[_Galore]) -> str:
    """Return a sentence that says how the SVDs of two implementations differ, or an empty string if they are equal.

    The sentence also compares how much of a random gradient the two projections keep.
    """
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
        f"projection of the first keeps {retained[0] / retained[1]:.1%} of the squared norm that the other keeps"
    )


def _cycles(both: Sequence[_Galore], pairs: int, device: torch.device) -> Samples:
    clock, runs, products = timing.Clock(device), dict(zip(timing.SIDES, both, strict=True)), _Products(both[0])
    parts: dict[str, list[list[float]]] = {side: [] for side in runs}
    launches: dict[str, list[float]] = {side: [] for side in runs}
    limit: list[float] = []
    first: list[timing.Side] = []
    before = runs["ours"].weight.detach().clone()

    def cycle(run: _Galore | _Products) -> list[float]:
        times = []
        clock.launch_s.clear()
        for _ in range(CYCLE):
            before.copy_(run.weight.detach())
            run.draw()
            times.append(clock.sample(run.step))
            if isinstance(run, _Galore):
                run.judge(before)
        return times

    warmup: dict[str, list[float]] = {side: cycle(run) for side, run in runs.items()}
    for order in timing.alternate(pairs):
        first.append(order[0])
        for side in order:
            parts[side].append(cycle(runs[side]))
            launches[side] += clock.launch_s
        limit.append(median(cycle(products)))
    ours, other = ([_per_step(times) for times in parts[side]] for side in timing.SIDES)
    launch = {side: median(times) for side, times in launches.items() if times}
    return Samples(ours=ours, other=other, limit=limit, first=first, warmup=warmup, parts=parts, launch=launch)


def _per_step(times: list[float]) -> float:
    """Return the mean seconds of a step, weighted as if one of `GALORE_GAP` steps were a refresh.

    times: the seconds of each step of one cycle.
    """
    ordinary = median(times)
    refresh = max(sum(times) - (len(times) - 1) * ordinary, ordinary)
    return ((GALORE_GAP - 1) * ordinary + refresh) / GALORE_GAP
