"""Measure the power of the checks: the smallest wrong scaling and the fewest extra roundings that each check notices.

`check --self-test --power` prints the result. It tells a user which mistakes a pass rules out.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from harness.conformance import checks, operations, parity_suite, self_test
from harness.conformance.case_selection import FEW
from harness.conformance.drawing import sample
from harness.conformance.execution import suite_run
from harness.conformance.faults.patched_copy import PatchedCopy
from harness.conformance.findings.outcomes import CheckStatus
from harness.conformance.operation import mapped
from harness.conformance.subject import DTYPES
from harness.console import print_json, print_lines, print_note
from harness.errors import Exit
from harness.methods.registry import Implementation
from harness.methods.spec import method_info, methods
from harness.process import forks
from harness.records.environment import physical_cores

CHECKS = ("outputs", "rounded_once", "backward", "forward", "gradient", "step", "trajectory", "model")
"""Checks that compare numbers with a tolerance."""
SCALINGS = ("scaling", "scale", "lr", "absmax2", "absmax", "b")
"""Names of arguments that scale the result of an Operation. If an Operation has several of them, the first is
changed."""
EXPONENTS = range(1, 41)
"""Values of k that are tried. Each gives a scaling that is wrong by a factor of 1 + 2^-k."""
ROUNDINGS = range(1, 9)
"""Values of `number` that are tried: how many extra times the reference's result is rounded. See `_rounded`."""
_LIMITS = forks.Limits(cpu_s=600, memory_b=8 << 30)


@dataclass(frozen=True)
class Power:
    """The smallest mistakes that one check notices in one dtype, in the cases that `check` tries by default."""

    target: str
    check: str
    dtype: str
    scaling: float | None
    """Smallest relative error of the scaling that the check notices. None if it notices none, or if there is no
    scaling."""
    roundings: int | None
    """Fewest extra roundings of the result that the check notices. None for float64, or if the check notices none of
    the numbers in ROUNDINGS."""

    def __str__(self) -> str:
        scaling = "-" if self.scaling is None else f"{self.scaling:.0e}"
        return f"{scaling} / {'-' if self.roundings is None else self.roundings}"


def check(jobs: int | None, only: Sequence[str], as_json: bool) -> Exit:
    """Measure the smallest mistakes that each check notices, print a table or JSON, and return the exit code.

    jobs: number of processes, by default one per physical core. only: names of Methods and Operations; empty for all.
    Raises UsageError for a name that has no parity suite.
    """
    self_test.require_targets(only, "--power")
    found = list(measure(only or parity_suite.names(), jobs or physical_cores()))
    if as_json:
        print_json({"schema": 1, "power": [vars(one) for one in found]})
    else:
        print_lines(_lines(found))
    return Exit.PASS


def measure(targets: Collection[str], jobs: int) -> Iterator[Power]:
    """Yield one Power for each combination of a target, a check of CHECKS in its parity suite, and a dtype of this
    suite.

    targets: names of Methods and Operations. Other names are ignored.
    """
    checks.every(), operations.every(), methods()  # imported once, before the forks
    torch.set_num_threads(1)  # a fork of a process with several threads may hang
    tasks = [
        (target, name, dtype)
        for target in targets
        if target in methods() or target in operations.every()  # a base gives codes, which have no tolerance
        for name in CHECKS
        if name in parity_suite.load_plan(target).checks
        for dtype in parity_suite.load_plan(target).dtypes
    ]

    def act(task: tuple[str, str, str]) -> tuple[float | None, int | None]:
        torch.set_num_threads(1)
        return _smallest_scaling(*task), _fewest_roundings(*task)

    for ended in forks.run(tasks, act, jobs, _LIMITS):
        if why := ended.died or ended.error:
            print_note(f"{' '.join(ended.task)}: {why}")
        else:
            yield Power(*ended.task, *ended.returned)


def _lines(found: Sequence[Power]) -> Iterator[str]:
    yield "smallest relative error of the scaling / fewest extra roundings of the result that a check notices; - : none"
    dtypes = [dtype for dtype in DTYPES if any(one.dtype == dtype for one in found)]
    rows: dict[tuple[str, str], dict[str, Power]] = {}
    for one in found:
        rows.setdefault((one.target, one.check), {})[one.dtype] = one
    first = max(map(len, (target for target, _ in rows)), default=0)
    second = max(map(len, (name for _, name in rows)), default=0)
    yield f"{'target':<{first}}  {'check':<{second}}  " + "  ".join(f"{dtype:>9}" for dtype in dtypes)
    for (target, name), cells in sorted(rows.items()):
        yield f"{target:<{first}}  {name:<{second}}  " + "  ".join(f"{cells.get(d, '')!s:>9}" for d in dtypes)


def _smallest_scaling(target: str, name: str, dtype: str) -> float | None:
    if _scaled(target, 0.0) is None:
        return None

    def noticed(exponent: int) -> bool:
        wrong = _scaled(target, 2.0**-exponent)
        return wrong is not None and _notices(wrong, name, dtype)

    below, above = EXPONENTS.start, EXPONENTS.stop
    if not noticed(below):
        return None
    while above - below > 1:  # noticed at `below`, not at `above`
        middle = (below + above) // 2
        below, above = (middle, above) if noticed(middle) else (below, middle)
    return float(2.0**-below)


def _fewest_roundings(target: str, name: str, dtype: str) -> int | None:
    if dtype == "float64":  # there is no wider dtype to round from
        return None
    return next((n for n in ROUNDINGS if _notices(_rounded(target, dtype, n), name, dtype)), None)


def _notices(wrong: Implementation, name: str, dtype: str) -> bool:
    plan = parity_suite.load_plan(wrong.target)
    plan = plan.model_copy(update={"checks": [name]})
    return any(
        outcome.status is CheckStatus.FAIL
        for case in sample.fixed(plan, FEW, [dtype])
        for outcome in suite_run.run_case(wrong, plan, case)
    )


def _scaled(target: str, error: float) -> Implementation | None:
    """Return the reference with a scaling that is wrong by a factor of 1 + error, or None if it has no scaling."""
    right = self_test.implementation(target, PatchedCopy(self_test.source_module(target)))
    if right.kind == "operation":
        known = inspect.signature(right.function).parameters
        name = next((name for name in SCALINGS if name in known), None)
        if name is None:
            return None
        return replace(right, function=lambda **given: right.function(**given | {name: given[name] * (1 + error)}))
    if "alpha" not in method_info(target).fields:
        return None

    def attach(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
        return right.function(model, replace(config, alpha=config.alpha * (1 + error)), generator)

    return replace(right, function=attach)


def _rounded(target: str, dtype: str, number: int) -> Implementation:
    """Return the reference, computed in float64. It rounds every result `number` extra times, and then to `dtype`."""
    right, own = self_test.implementation(target, PatchedCopy(self_test.source_module(target))), DTYPES[dtype]

    def rounded(y: Any) -> Any:
        return _round(y, own, number) if isinstance(y, Tensor) and y.dtype == torch.float64 else y

    if right.kind == "operation":

        def call(**given: Any) -> Any:
            wide = mapped(given, lambda one: _wide(one, own))
            returned = right.function(**wide)
            return rounded(returned) if isinstance(returned, Tensor) else tuple(map(rounded, returned))

        return replace(right, function=call)

    def attach(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
        adapted = right.function(model, config, generator)
        for layer in adapted.layers.values():
            layer.forward = partial(_forward, layer, copy.deepcopy(layer).double(), rounded)
        return adapted

    return replace(right, function=attach)


def _forward(layer: nn.Module, wide: nn.Module, rounded: Callable[[Any], Any], x: Tensor) -> Any:
    """Run `wide`, a float64 copy of `layer`, with the present tensors of `layer`. Return the rounded result."""
    tensors = {name: _wide(t, t.dtype) for name, t in [*layer.named_parameters(), *layer.named_buffers()]}
    wide.train(layer.training)
    return rounded(functional_call(wide, tensors, (_wide(x, x.dtype),)))


def _wide(one: Any, own: torch.dtype) -> Any:
    """Convert a tensor of dtype `own` to float64. Convert the dtype `own` itself to torch.float64. Return anything else
    unchanged.
    """
    if isinstance(one, Tensor):
        return one.double() if one.dtype == own and one.is_floating_point() else one
    return torch.float64 if one is own else one


def _round(y: Tensor, dtype: torch.dtype, number: int) -> Tensor:
    """Round y `number` times to the precision of `dtype`, and finally convert it to `dtype`.

    For each rounding, y is multiplied by another factor, rounded, and divided by the factor.
    """
    for index in range(number):
        factor = 1.1 + 0.07 * index
        y = (y * factor).to(dtype).double() / factor
    return y.to(dtype)
