"""A program that tries checks on the pretended device (`pretend_gpu`), and prints the outcomes as JSON.

`python -m support.pretended_checks lora dora` tries `fused` for these targets in some cases of each parity suite: the
typical one, the first of each kind of layer, and the first with dropout. `--brief` tries only the first of these cases.
`--of` names another implementation. `--planted` tries wrong implementations, too. An outcome is a list: implementation,
target, case, check, status and detail.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch

from harness.conformance import parity_suite
from harness.conformance.case_selection import FEW
from harness.conformance.drawing import sample
from harness.conformance.execution import suite_run
from harness.conformance.findings.outcomes import CheckOutcome
from harness.conformance.parity_suite import AnyCase, MethodCase, ParitySuite
from harness.kernels.torch import lora_linear, nf4
from harness.methods.implementations.fused.methods import lora
from harness.methods.registry import Implementation, discover, implements
from support.pretend_gpu import pretended

_DTYPE = "float32"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--of", default="fused")
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--planted", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with pretended() as device:
        tried = [*_planted(device)] if options.planted else []
        for target in options.targets:
            tried += _tried(_found(target, options.of), device, brief=options.brief)
    print(json.dumps([_row(one) for one in tried]))


def _row(one: CheckOutcome) -> list[str]:
    of = one.result
    detail = of.detail or " ".join(filter(None, [of.tensor, of.worst]))
    return [one.implementation, one.target, one.case, of.check, one.status.value, detail]


def _found(target: str, name: str) -> Implementation:
    return discover(only=[name]).find(parity_suite.kind_of(target), target, name)


def _tried(implementation: Implementation, device: torch.device, *, brief: bool) -> Iterator[CheckOutcome]:
    plan = parity_suite.load_plan(implementation.target)
    cases = list(_cases(plan))
    for case in cases[:1] if brief else cases:
        yield from suite_run.run_case(implementation, plan, case, device)


def _cases(plan: ParitySuite) -> Iterator[AnyCase]:
    """Yield the typical case of a parity suite, the first of each kind of layer, and the first with dropout."""
    seen = set[str]()
    for case in sorted(sample.fixed(plan, FEW, [_DTYPE]), key=lambda case: (not case.typical, case.minor)):
        new = set[str]()
        if isinstance(case, MethodCase):
            dropout = {name for name, value in case.config.items() if name.endswith("dropout") and value}
            new = {case.kind.partition("-")[0], *dropout}
        if case.typical or new - seen:
            seen |= new
            yield case


@implements("nf4_dequantize", name="on-the-cpu", kind="operation")
def _on_the_cpu(**given: Any) -> torch.Tensor:
    return nf4.dequantize(**given) + torch.zeros(given["shape"])


@implements("lora_linear", name="zero-under-autocast", kind="operation")
def _zero_under_autocast(x: torch.Tensor, **given: Any) -> torch.Tensor:
    return lora_linear.lora_linear(x, **given) * (not torch.is_autocast_enabled(x.device.type))


def _draw(_: object, given: tuple[torch.Tensor, ...]) -> None:
    torch.rand_like(given[0])


@implements("lora", name="draws-on-the-device")
def _draws(model: Any, config: Any, generator: torch.Generator) -> Any:
    adapted = lora.attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.register_forward_pre_hook(_draw)
    return adapted


def _planted(device: torch.device) -> Iterator[CheckOutcome]:
    for wrong, check in ((_on_the_cpu, "outputs"), (_zero_under_autocast, "calls"), (_draws, "deterministic")):
        plan = parity_suite.load_plan(wrong.target).model_copy(update={"checks": [check]})
        yield from suite_run.run_case(wrong, plan, next(_cases(plan)), device)


if __name__ == "__main__":
    main()
