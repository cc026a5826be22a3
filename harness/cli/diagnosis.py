"""Findings of `doctor`: the parts that this machine can run, and the reasons why others cannot run."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.assets import fetch
from harness.assets.environments.table import home_of
from harness.cache_folder import root as cache_root
from harness.cli import options
from harness.console import align_columns
from harness.errors import Exit, plural
from harness.methods.registry import discover
from harness.records import environment, store
from harness.suites import loader
from harness.suites.tasks import Task

_GIB = 2**30
_MIN_FREE_B = 2 * _GIB
_WIDTH = 100
_STATES = ("no", "note", "ok")
"""States of a finding, the most serious first."""


@dataclass(frozen=True)
class Diagnosis:
    """One finding of `doctor` about this machine."""

    group: str
    """Heading of the finding in the summary."""
    subject: str
    state: Literal["ok", "note", "no"]
    """`no`: something cannot run. `note`: worth knowing, but everything can run. `ok`: all is well."""
    detail: str
    summary: str = ""
    """Text that several findings of one group and state may have. The summary shows these findings in one line: their
    number and the text."""
    shown: str = ""
    """Name of the finding in a line that several findings share. If it is empty, the line counts the finding without a
    name."""


def report(as_json: bool, verbose: bool = False) -> Exit:
    """Print the findings and return an exit code.

    The code is INFRASTRUCTURE if something that the suite `quick` needs cannot run here, otherwise PASS.
    """
    findings = [*_machine(), *_implementations(), *_assets(), *_disk()]
    rows = [{"subject": f.subject, "state": f.state, "detail": f.detail} for f in findings]
    lines = _every_finding if verbose else summary
    options.print_document({"schema": 1, "findings": rows}, as_json, lambda _: lines(findings))
    return Exit.INFRASTRUCTURE if any(f.state == "no" for f in findings) else Exit.PASS


def _every_finding(findings: Sequence[Diagnosis]) -> list[str]:
    return align_columns([(f.state, f.subject, f.detail) for f in findings])


def summary(findings: Sequence[Diagnosis]) -> list[str]:
    """Return the findings as wrapped lines, most serious first, then the number of problems.

    Findings with the same state, group and `Diagnosis.summary` share a sentence.
    """
    lines: dict[tuple[int, str, str], list[Diagnosis]] = {}
    for f in findings:
        lines.setdefault((_STATES.index(f.state), f.group, f.summary or f.subject), []).append(f)
    width = max(len(f.group) for f in findings)
    text: list[str] = []
    for (state, group, _), members in sorted(lines.items(), key=lambda item: item[0][0]):
        head = f"{_STATES[state]:<5} {group:<{width}}  "
        indent = " " * len(head)
        text += textwrap.wrap(
            _sentence(members), _WIDTH, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False
        )
    problems = sum(f.state == "no" for f in findings)
    return [*text, "", f"{problems or 'no'} problem{'s' * (problems != 1)}; --verbose lists every finding"]


def _sentence(members: Sequence[Diagnosis]) -> str:
    first = members[0]
    if not first.summary:
        return f"{first.subject}: {first.detail}"
    names = ", ".join(f.shown for f in members if f.shown)
    return f"{len(members)} {first.summary}" + (f": {names}" if names else "")


def _machine() -> list[Diagnosis]:
    here = environment.describe(environment.threads())
    gpus = environment.gpus()
    used = plural(here.threads or 1, "core")
    processor = f"{here.machine['cpu']}, {used} used, {here.machine['architecture']}"
    no_gpu = "no NVIDIA GPU: --device auto takes the CPU; what needs a GPU is not run"
    exact_peaks = Path("/proc/self/clear_refs").exists()
    peaks = "per phase from the kernel (VmHWM)" if exact_peaks else "sampled every 20 ms: short peaks are missed"
    return [
        Diagnosis("machine", "python", "ok", f"{here.software['python']} at {sys.executable}"),
        Diagnosis("machine", "processor", "ok", processor),
        Diagnosis("machine", "memory", "ok", f"{int(here.machine['memory_B']) / _GIB:.1f} GiB"),
        *[Diagnosis("machine", "GPU", "ok", line, line) for line in gpus],
        *([] if gpus else [Diagnosis("machine", "GPU", "note", no_gpu)]),
        Diagnosis("machine", "environment", "ok", f"id {here.id}, code {here.code_version}"),
        *[
            Diagnosis("libraries", name, "ok", version, "installed", f"{name} {version}")
            for name, version in here.software.items()
            if name != "python"
        ],
        Diagnosis("machine", "memory peaks", "ok" if exact_peaks else "note", peaks),
    ]


def _implementations() -> list[Diagnosis]:
    registry = discover()
    found = []
    for one in registry.implementations:
        if missing := [m for m in one.requires if importlib.util.find_spec(m) is None]:
            home = home_of(one.name)
            way = f"; `peft-harness env create {home}` makes an environment that has it" if home else ""
            why = f"not installed: {', '.join(missing)}; its Cells are skipped{way}"
            summary = f"cannot run without {', '.join(missing)}"
            found.append(Diagnosis("implementations", str(one), "note", why, summary, f"{one.target} by {one.name}"))
        else:
            found.append(Diagnosis("implementations", str(one), "ok", one.distribution, "can run"))
    return found + [Diagnosis("plug-ins", name, "no", why) for name, why in registry.broken.items()]


def _assets() -> list[Diagnosis]:
    found, quick = [], loader.load("quick")
    used = {name for cell in quick.plan.cells for name in (cell.model, *_data_of(quick.tasks[cell.task]))}
    for source in (quick.sources[name] for name in sorted(used)):
        if fetch.is_local(source):
            found.append(Diagnosis("models and data", source.name, "ok", "ready", "ready", source.name))
        else:
            detail, summary = f"will be fetched: {source.source}", "will be fetched on first use"
            found.append(Diagnosis("models and data", source.name, "note", detail, summary, source.name))
    if importlib.util.find_spec("pip") is None:
        detail = "not in this environment, so models and data in Python packages cannot be fetched: python -m ensurepip"
        found.append(Diagnosis("models and data", "pip", "no", detail))
    return found


def _data_of(task: Task) -> list[str]:
    return [source.name for source in (task.data, task.train) if source]


def _disk() -> list[Diagnosis]:
    found = []
    for name, place in (("cache", cache_root()), ("runs", store.RUNS.resolve())):
        there = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(there).free
        detail = f"{free / _GIB:.1f} GiB free at {place}"
        found.append(Diagnosis("disk", f"disk of the {name}", "ok" if free >= _MIN_FREE_B else "no", detail))
    return found
