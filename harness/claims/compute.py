"""Compute and judge many claims in worker processes. Imports no torch."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

from harness.claims.claim import Claim, MeasureRequest
from harness.claims.consistency import with_table_conventions
from harness.claims.judge import JudgedClaim, Missing, judge, plain
from harness.claims.measure import MeasureResult
from harness.process.supervisor import Subprocess, python_module
from harness.records.files import whole_lines

_PATIENCE_S = 1800.0
"""Largest time that a worker may take, in seconds. A worker that takes longer is killed."""


def judged(claims: Sequence[Claim], jobs: int | None = None, runs: Sequence[Path] = ()) -> list[JudgedClaim]:
    """Judge claims in `jobs` parallel processes [default: one per core, at most 8]. Return the judged claims in order.

    Claims about one model share a process, which builds the model once. runs: folders of runs, whose Records are
    preferred to published Records.
    """
    shares = _shares(claims, jobs or min(os.cpu_count() or 1, 8))
    found: dict[str, list[MeasureResult | Missing]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = []
        for number, share in enumerate(shares):
            requests, answers = Path(folder) / f"{number}.requests", Path(folder) / f"{number}.answers"
            lines = [json.dumps(plain(one)) for claim in share for one in _requests(claim)]
            requests.write_text("\n".join(lines), encoding="utf-8")
            arguments = [str(requests), str(answers), *map(str, runs)]
            threads = str(max(1, (os.cpu_count() or 1) // len(shares)))
            environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
            worker = stack.enter_context(python_module("harness.claims.worker", arguments, environment))
            workers.append((share, answers, worker))
        for share, answers, worker in workers:
            died = _wait(worker)
            read = [_read(line) for line in whole_lines(answers)]
            for claim in share:
                count = len(_requests(claim))
                found[claim.id] = read[:count] + [Missing(died, failed=True)] * max(0, count - len(read))
                del read[:count]
    return with_table_conventions([(claim, found[claim.id], judge(claim, found[claim.id])) for claim in claims])


def _wait(worker: Subprocess) -> str:
    """Wait until a worker ends. Return the reason to report for the measures that the worker did not compute."""
    if worker.wait(_PATIENCE_S) is None:
        return f"not computed within {_PATIENCE_S:.0f} s"
    worker.close()  # so that all its output is read
    output = worker.output.strip().splitlines()
    return f"its worker process ended: {output[-1] if output else 'without output'}"


def _requests(claim: Claim) -> list[MeasureRequest]:
    return [claim.request, *(one.request for one in claim.otherwise)]


def _shares(claims: Sequence[Claim], jobs: int) -> list[list[Claim]]:
    """Divide claims into at most `jobs` lists of similar length. All claims about one model are in the same list.

    A claim that runs a check is placed alone, because checks take longer than counts.
    """
    of_model: dict[str, list[Claim]] = {}
    for claim in claims:
        of_model.setdefault(claim.id if claim.request.find("check") else claim.request.find("model"), []).append(claim)
    shares: list[list[Claim]] = [[] for _ in range(max(1, min(jobs, len(of_model))))]
    for same in sorted(of_model.values(), key=len, reverse=True):
        min(shares, key=len).extend(same)
    return shares


def _read(line: str) -> MeasureResult | Missing:
    one = json.loads(line)
    if "missing" in one:
        return Missing(one["missing"], one["failed"])
    numbers = {name: Fraction(v) if isinstance(v, str) else v for name in ("value", "most") for v in [one[name]]}
    within = (Fraction(one["within"][0]), Fraction(one["within"][1])) if one["within"] else None
    return MeasureResult(numbers["value"], one["how"], numbers["most"], within)
