"""The verb `check`: every implementation of a Method against its reference, case by case, as a matrix."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from harness.conformance import checks, suite
from harness.conformance.subject import DTYPES, Subject, configure, linear_layers, load, warm
from harness.errors import Exit, ImplementationError, UsageError
from harness.methods import methods
from harness.records import CheckResult, Outcome
from harness.registry import Implementation, discover

_SEED = 20
_PATH = "block.layer"


@dataclass(frozen=True)
class Tried:
    """One check of one case. case: config and shape in words."""

    implementation: str
    case: str
    result: CheckResult


def check(implementations: Sequence[str], method: str | None, as_json: bool) -> Exit:
    """Check the named implementations (all, if none is named) of one Method (all, if None); print; return the exit code."""
    registry = discover()
    known = methods()
    if method is not None and method not in known:
        raise UsageError(f"unknown method {method!r}", where="--method", mend=f"methods: {', '.join(known)}")
    wanted = [
        i
        for i in registry.implementations
        if i.kind == "method" and method in (None, i.target) and (not implementations or i.name in implementations)
    ]
    names = {i.name for i in registry.implementations}
    for name in implementations:
        if name not in names and name not in registry.broken:
            raise ImplementationError(f"no implementation {name!r}", mend=f"there are: {', '.join(sorted(names))}")
    skipped: dict[str, str] = {
        name: why for name, why in registry.broken.items() if not implementations or name in implementations
    }
    tried: list[Tried] = []
    for implementation in wanted:
        if missing := _missing(implementation):
            skipped[f"{implementation.name} {implementation.target}"] = missing
            continue
        print(f"checking {implementation.target} by {implementation.name} ...", file=sys.stderr)
        tried += run(implementation)
    _print(tried, skipped, as_json)
    if not tried:
        return Exit.NOTHING_COMPARED
    broken = bool(registry.broken.keys() & skipped.keys())
    return Exit.FAIL if broken or any(t.result.outcome is Outcome.FAIL for t in tried) else Exit.PASS


def run(implementation: Implementation) -> list[Tried]:
    """Run an implementation through its Method's parity suite."""
    plan = suite.load(implementation.target)
    tried = []
    for config, shape, dtype in plan.cases():
        if dtype not in implementation.dtypes:
            continue
        words = " ".join([*(f"{k}={v}" for k, v in config.items()), f"{shape.tokens}x{shape.inputs}x{shape.outputs}"])
        subject = attach(implementation, plan.method, config, shape, dtype)
        own_start = {name: t.detach().clone() for name, t in subject.added().items()}
        for state in plan.states:
            case = checks.Case(state, tokens=shape.tokens, seed=_SEED)
            if state == "warm":
                warm(subject.added(), case.generator(salt=1))
            for name in plan.checks:
                if name == "initial" and state != "init":
                    continue
                result = getattr(checks, f"check_{name}")(subject, case)
                tried.append(Tried(implementation.name, words, result))
        load(subject.adapted, own_start)
    return tried


def attach(
    implementation: Implementation, method: str, config: dict[str, Any], shape: suite.Shape, dtype: str
) -> Subject:
    """Attach an implementation to a model of one linear layer of this shape, with random weights."""
    generator = torch.Generator().manual_seed(_SEED)
    layer = nn.Linear(shape.inputs, shape.outputs, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn * shape.inputs**-0.5)
    model = nn.Sequential(OrderedDict(block=nn.Sequential(OrderedDict(layer=layer.to(DTYPES[dtype])))))
    settled = configure(method, config | ({"targets": ["layer"]} if "targets" in methods()[method].fields else {}))
    bases = linear_layers(model, settled)
    own = list(model.parameters())
    adapted = implementation(model, settled, torch.Generator().manual_seed(_SEED))
    return Subject(method, settled, dtype, model, adapted, bases, own)


def _missing(implementation: Implementation) -> str:
    for module in implementation.requires:
        try:
            import_module(module)
        except ImportError as error:
            return f"needs {module}, which cannot be imported: {error}"
    return ""


def _print(tried: Sequence[Tried], skipped: dict[str, str], as_json: bool) -> None:
    if as_json:
        documents = [
            {"implementation": t.implementation, "case": t.case} | t.result.model_dump(mode="json") for t in tried
        ]
        print(json.dumps({"schema": 1, "checks": documents, "skipped": skipped}, indent=1))
        return
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for heading in ("method", "check", "implementation"):
        table.add_column(heading)
    for dtype in DTYPES:
        table.add_column(dtype, justify="right")
    rows: dict[tuple[str, str, str], dict[str, list[Tried]]] = {}
    for one in tried:
        method, name, dtype, _ = one.result.check.split("/")
        rows.setdefault((method, name, one.implementation), {}).setdefault(dtype, []).append(one)
    for key, by_dtype in rows.items():
        table.add_row(*map(Text, key), *(_cell(by_dtype.get(dtype, [])) for dtype in DTYPES))
    console.print(table)
    for one in tried:
        r = one.result
        if r.outcome is Outcome.FAIL:
            size = (
                f"error {r.error:.3g}, allowed {r.allowed:.3g}; "
                if r.error is not None and r.allowed is not None
                else ""
            )
            console.print(
                Text(
                    f"FAIL {one.implementation} {r.check} ({one.case}): {size}{r.tensor} {r.worst} {r.detail}".rstrip()
                ),
                soft_wrap=True,
            )
    for name, why in skipped.items():
        console.print(Text(f"not checked: {name}: {why}"), soft_wrap=True)
    failed = sum(t.result.outcome is Outcome.FAIL for t in tried)
    passed = sum(t.result.outcome is Outcome.PASS for t in tried)
    console.print(f"{passed} passed, {failed} failed, {len(tried) - passed - failed} skipped")


def _cell(tried: Sequence[Tried]) -> Text:
    """Return the worst use of the allowance, as a share, or the count of exact cases."""
    if not tried:
        return Text("-", style="dim")
    failed = [t for t in tried if t.result.outcome is Outcome.FAIL]
    if failed:
        return Text(f"FAIL {len(failed)}/{len(tried)}", style="bold red")
    if all(t.result.outcome is Outcome.SKIPPED for t in tried):
        return Text("skipped", style="dim")
    used = [t.result.error / t.result.allowed for t in tried if t.result.error is not None and t.result.allowed]
    return Text(f"ok {max(used):.2f}" if used else "ok", style="green")
