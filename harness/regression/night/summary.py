"""Summary of a nightly run for a terminal, and the commands to run next. Imports no torch."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING

from harness.console import align_columns
from harness.kernels import card_tables
from harness.regression.night import budget, part_run, parts
from harness.regression.night.results import PartResult
from harness.report.formatting import seconds as duration

if TYPE_CHECKING:
    from harness.regression.night.run import NightRun


def lines(night: NightRun) -> list[str]:
    """Return the table of the parts, the failures, the next steps, and the verdict with the path of the page."""
    rows = [
        [
            one.status,
            one.name,
            duration(one.seconds) if one.seconds is not None else "-",
            duration(one.estimate_s),
            one.summary or one.because,
        ]
        for one in night.results
    ]
    table = align_columns([["status", "part", "took", "estimate", "result"], *rows], indent="")
    failures = [f"{one.where}: {one.what}" for result in night.results for one in result.failures[:3]]
    steps = next_steps(night)
    return [
        *([f"nothing was run: {night.missing}"] if night.missing else table),
        *(["", "failures:", *(f"  {line}" for line in failures)] if failures else []),
        *(["", "next:", *(f"  {step}" for step in steps)] if steps else []),
        "",
        f"{night.verdict}: {night.page}",
    ]


def next_steps(night: NightRun) -> list[str]:
    """Return the commands to run next, each with its purpose."""
    if night.missing:
        return [
            "peft-harness doctor  # says which GPU and which libraries this Python finds",
            "peft-harness night --device cpu  # a rehearsal without a GPU",
        ]
    steps = [f"{one.reproduce}  # {one.where}" for result in night.results for one in result.failures[:1]]
    run = night.folder / "parts" / "matrix" / "run"
    ok = any(one.name == "matrix" and one.status == "ok" for one in night.results)
    if ok and night.lacks_baseline:
        words = ["peft-harness", "baseline", "promote", str(run), night.baseline, "--reason", "first night"]
        steps.append(f"{shlex.join(words)}  # makes the first baseline of this card; commit it")
    tables = (night.folder / "parts" / "crossovers").glob("*.json")
    steps += [
        f"{shlex.join(['cp', str(table), str(card_tables.PACKAGED)])}  # use the measured crossovers of this card"
        for table in tables
        if table.name not in ("crossovers.json", part_run.STDOUT)
    ]
    return steps + _left_out(night)


def _left_out(night: NightRun) -> list[str]:
    """Return the commands that run the parts which this nightly run has cut or not started.

    If a part judges the runs of other parts, it is repeated with them. If only the judging part was left out, its
    command judges the existing runs.
    """
    found = {one.name: one for one in night.results}
    left, alone = set(night.left_out), []
    for name in found:
        made = parts.sources(name, found)
        if any(one in left for one in made):
            left.add(name)
        elif made:
            left.discard(name)
        if name in night.left_out and any(found[one].seconds is not None for one in made):
            again = shlex.join(parts.typed(shlex.split(found[name].command)))
            alone.append(f"{again}  # judges the runs of this night")
    if not left:
        return alone
    device = night.manifest.device
    words = ["peft-harness", "night", "--device", device]
    words += ["--real", str(night.real)] if night.real is not None and parts.REAL in left else []
    words += [word for name in found if name in left for word in ("--only", name)]
    needed_s = budget.needed_s([_needed_s(found[name]) for name in left], device)
    minutes = math.ceil(max(needed_s, night.manifest.budget_s) / 60)  # the estimates are rough: no less than this time
    return [*alone, f"{shlex.join([*words, '--budget', f'{minutes}m'])}  # runs the parts that were left out"]


def _needed_s(one: PartResult) -> float:
    """Return the seconds to plan for a repeated part.

    They are its estimate or, if the part was cut, at least twice the time that it ran.
    """
    return max(one.estimate_s, 2 * (one.seconds or 0.0) if one.status == "cut" else 0.0)
