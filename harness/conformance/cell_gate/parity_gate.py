"""Parity gate of a Cell (one measured training run).

Measurements begin only after the Cell's own layers have passed the checks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from harness.conformance import checks, parity_suite
from harness.conformance.case import Case
from harness.conformance.cell_gate import memory_headroom
from harness.conformance.checks import AnyCheck, CellStage
from harness.conformance.checks.unreferenced import nudged
from harness.conformance.comparison.check_results import judged, prefix_tensor, skipped
from harness.conformance.comparison.inputs import inputs
from harness.conformance.comparison.layer_comparison import observe_with_reference
from harness.conformance.comparison.tolerance_policies import noise_floor, worst_of
from harness.conformance.subject import DTYPES, Subject, attach_reference, configure, load, load_start, warm
from harness.errors import Unsupported
from harness.methods.peft_config import UNREFERENCED
from harness.records.record import CheckResult, Outcome

_NO_ADAPTER = "frozen"
"""Name of the Method that adds no layers to the base and trains nothing."""


def gate(
    subject: Subject,
    seed: int,
    run_model: Callable[[], Tensor],
    base_output: Tensor | None,
    *,
    start: Mapping[str, Tensor] | None = None,
    forward: Callable[[nn.Module], Tensor] | None = None,
    base: str = "",
) -> list[CheckResult]:
    """Check a freshly attached subject at its start and with random adapter tensors, and return the results.

    Afterwards the subject is at its start again. The Method's parity suite and the declarations of the checks decide
    which checks apply. The gate stops early if a packed base is wrong, or if the layers or their tensors differ from
    the reference's.

    run_model: runs the whole model on fixed inputs. base_output: output of the model before attaching. start: the
    initial tensors; by default the subject's own. forward: runs a given model on the same inputs, so that gradients can
    be computed. base: the quantisation of the base, such as `nf4 by bitsandbytes`.
    """
    case = Case("init", seed=seed, run_model=run_model, base_output=base_output, forward=forward)
    if subject.method in UNREFERENCED:
        return _without_reference(subject, case)
    plan = parity_suite.load(subject.method)
    case = replace(case, factors=plan.factors())
    names = [*plan.checks, *(["codes"] if subject.packed else [])]

    def run(stage: CellStage, in_state: Case) -> list[CheckResult]:
        return [check(subject, in_state) for check in checks.of_cell(stage, names)]

    results = [_packed_base(subject, case, base)] if subject.packed else []
    if not any(result.outcome is Outcome.FAIL for result in results):
        results += run(CellStage.ATTACHED, case)
    if any(result.outcome is Outcome.FAIL for result in results):
        return results
    if start is not None:
        load_start(subject.adapted, start)
    began = {name: t.detach().clone() for name, t in subject.added().items()}
    results += run(CellStage.START, case)
    warm(subject.added(), case.generator(salt=1))
    results += run(CellStage.WARM, replace(case, state="warm" if began else "init"))
    load(subject.adapted, began)
    return results


def _without_reference(subject: Subject, case: Case) -> list[CheckResult]:
    """Run the checks that need no reference, and return the results. The subject stays at its start."""
    names = checks.without_reference()
    warmed, in_state = nudged(subject, case.generator(salt=1)), replace(case, state="warm")
    at_the_start = [*checks.of_cell(CellStage.ATTACHED, names), *checks.of_cell(CellStage.START, names)]
    results = [check(subject, case) for check in at_the_start]
    return results + [check(warmed, in_state) for check in checks.of_cell(CellStage.WARM, names)]


@dataclass(frozen=True)
class _Base:
    """Stand-in for the subject when a packed base is checked without an adapter. `method`: e.g. `base nf4`."""

    method: str
    dtype: str


def _packed_base(subject: Subject, case: Case, base: str) -> CheckResult:
    """Compare every packed layer, without its adapter, with a dense layer that has the decoded weight.

    Return the worst judgement as a result of the check `forward`. If a packed layer multiplied wrongly, every Method
    with this layer as its base would be wrong.
    """
    config = configure(_NO_ADAPTER, {})
    none = attach_reference(_NO_ADAPTER, nn.Module(), config, None, case.generator())
    alone = replace(subject, method=_NO_ADAPTER, config=config, adapted=none)
    found = []
    for index, path in enumerate(subject.packed):
        layer = subject.original_base(path)
        x, dy = inputs(layer, case.tokens, DTYPES[subject.dtype], case.generator(index))
        runs = observe_with_reference(alone, path, layer, x, dy, training=True)
        found.append(prefix_tensor(path, noise_floor(*runs, subject.dtype)))
    verdict = worst_of(found, found[0].policy)
    why = (
        ""
        if verdict.passed
        else "a packed layer without an adapter does not multiply by the weight that its codes encode"
    )
    return judged(_Base(f"base {base}".strip(), subject.dtype), case, "forward", verdict, why)


def after_training(
    subject: Subject, seed: int, forward: Callable[[nn.Module], Tensor] | None = None
) -> list[CheckResult]:
    """Run the checks that must wait until training has ended, and return their results.

    They must wait because some libraries change the base weight when they merge. If memory is too small to merge, no
    check runs, and the only result says that the check of merging was skipped. forward: runs a given model so that
    gradients can be computed. It is needed only for adapters without a reference.
    """
    if why := memory_headroom.merge_shortage(subject):
        name = "merge_itself" if subject.method in UNREFERENCED else "merge"
        return [skipped(subject, Case("trained", seed=seed), name, why)]
    if subject.method in UNREFERENCED:
        case = Case("trained", seed=seed, forward=forward)
        return [check(subject, case) for check in checks.of_cell(CellStage.TRAINED, checks.without_reference())]
    plan = parity_suite.load(subject.method)
    case = Case("trained", seed=seed, factors=plan.factors())
    with torch.random.fork_rng():
        return [_run_or_skip(check, subject, case) for check in checks.of_cell(CellStage.TRAINED, plan.checks)]


def _run_or_skip(check: AnyCheck, subject: Subject, case: Case) -> CheckResult:
    try:
        return check(subject, case)
    except Unsupported as error:
        return skipped(subject, case, check.name, f"unsupported: {error}")
