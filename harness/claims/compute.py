"""Let child processes take the measures of many claims. No torch."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

from harness.claims.claim import Asking, Claim
from harness.claims.judge import JudgedClaim, Missing, judge, plain
from harness.claims.measure import MeasureResult
from harness.process.supervisor import Subprocess, python_module

_PATIENCE_S = 1800.0


def judged(claims: Sequence[Claim], jobs: int | None = None, runs: Sequence[Path] = ()) -> list[JudgedClaim]:
    """Judge claims, as many at a time as there are cores.

    Claims of one model go to one process, which builds it once. runs: folders of runs whose Records come first.
    """
    shares = _shares(claims, jobs or min(os.cpu_count() or 1, 8))
    found: dict[str, list[MeasureResult | Missing]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        children = []
        for number, share in enumerate(shares):
            asked, answers = Path(folder) / f"{number}.asked", Path(folder) / f"{number}.answers"
            lines = [json.dumps(plain(asking)) for claim in share for asking in _askings(claim)]
            asked.write_text("\n".join(lines), encoding="utf-8")
            arguments = [str(asked), str(answers), *map(str, runs)]
            threads = str(max(1, (os.cpu_count() or 1) // len(shares)))
            environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
            child = stack.enter_context(python_module("harness.claims.worker", arguments, environment))
            children.append((share, answers, child))
        for share, answers, child in children:
            died = _wait(child)
            read = (
                [_read(line) for line in answers.read_text(encoding="utf-8").splitlines()] if answers.exists() else []
            )
            for claim in share:
                count = len(_askings(claim))
                found[claim.id] = read[:count] + [Missing(died, failed=True)] * max(0, count - len(read))
                del read[:count]
    return [judge(claim, found[claim.id]) for claim in claims]


def _wait(child: Subprocess) -> str:
    """Wait for a child to end, and return what is to be said of measures that it did not come to."""
    if child.wait(_PATIENCE_S) is None:
        return f"it was not computed within {_PATIENCE_S:.0f} s"
    said = child.output.strip().splitlines()
    return f"the process that computed it ended: {said[-1] if said else 'it said nothing'}"


def _askings(claim: Claim) -> list[Asking]:
    return [claim.asking, *(one.asking for one in claim.otherwise)]


def _shares(claims: Sequence[Claim], jobs: int) -> list[list[Claim]]:
    """Divide claims so that those of one model stay together and the shares are of like length."""
    of_model: dict[str, list[Claim]] = {}
    for claim in claims:
        of_model.setdefault(_model(plain(claim.asking)), []).append(claim)
    shares: list[list[Claim]] = [[] for _ in range(max(1, min(jobs, len(of_model))))]
    for several in sorted(of_model.values(), key=len, reverse=True):
        min(shares, key=len).extend(several)
    return shares


def _model(asked: Any) -> str:
    """Return the model that a claim is about, or what else it measures."""
    if isinstance(asked, dict):
        if isinstance(asked.get("model"), str):
            return str(asked["model"])
        return next((name for value in asked.values() if (name := _model(value))), "")
    return ""


def _read(line: str) -> MeasureResult | Missing:
    one = json.loads(line)
    if "missing" in one:
        return Missing(one["missing"], one["failed"])
    numbers = {name: Fraction(v) if isinstance(v, str) else v for name in ("value", "most") for v in [one[name]]}
    within = (Fraction(one["within"][0]), Fraction(one["within"][1])) if one["within"] else None
    return MeasureResult(numbers["value"], one["how"], numbers["most"], within)
