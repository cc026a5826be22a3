"""The verb `doctor`: what this machine can run, and why not."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.assets import cache, fetch
from harness.errors import Exit
from harness.methods.registry import discover
from harness.records import environment, store
from harness.suites import loader

_GIB = 2**30
_ROOM_B = 2 * _GIB


@dataclass(frozen=True)
class Diagnosis:
    """One thing looked at. state: `ok`, `no` (something cannot run) or `note`."""

    subject: str
    state: str
    detail: str


def report(as_json: bool) -> Exit:
    """Print what was found; the exit code is INFRASTRUCTURE if the quick suite could not run here."""
    findings = [*_machine(), *_implementations(), *_assets(), *_disk()]
    if as_json:
        print(json.dumps({"schema": 1, "findings": [asdict(f) for f in findings]}, indent=1))
    else:
        width = max(len(f.subject) for f in findings)
        for finding in findings:
            print(f"{finding.state:<5} {finding.subject:<{width}}  {finding.detail}")
    return Exit.INFRASTRUCTURE if any(f.state == "no" for f in findings) else Exit.PASS


def _machine() -> list[Diagnosis]:
    here = environment.describe(environment.threads())
    gpus = environment.gpus()
    return [
        Diagnosis("python", "ok", f"{here.software['python']} at {sys.executable}"),
        Diagnosis(
            "processor", "ok", f"{here.machine['cpu']}, {here.threads} cores used, {here.machine['architecture']}"
        ),
        Diagnosis("memory", "ok", f"{int(here.machine['memory_B']) / _GIB:.1f} GiB"),
        *[Diagnosis("GPU", "ok", line) for line in gpus],
        *(
            []
            if gpus
            else [Diagnosis("GPU", "note", "no NVIDIA GPU: --device auto takes the CPU; GPU rows stay not-run")]
        ),
        Diagnosis("environment", "ok", f"id {here.id}, code {here.code_version}"),
        *[Diagnosis(name, "ok", version) for name, version in here.software.items() if name != "python"],
        _memory_peaks(),
    ]


def _memory_peaks() -> Diagnosis:
    exact = Path("/proc/self/clear_refs").exists()
    detail = "per phase from the kernel (VmHWM)" if exact else "sampled every 20 ms: short peaks are missed"
    return Diagnosis("memory peaks", "ok" if exact else "note", detail)


def _implementations() -> list[Diagnosis]:
    registry = discover()
    found = []
    for implementation in registry.implementations:
        missing = [m for m in implementation.requires if importlib.util.find_spec(m) is None]
        detail = (
            f"not installed: {', '.join(missing)}; its Cells are skipped" if missing else implementation.distribution
        )
        found.append(Diagnosis(str(implementation), "note" if missing else "ok", detail))
    return found + [Diagnosis(name, "no", why) for name, why in registry.broken.items()]


def _assets() -> list[Diagnosis]:
    found = []
    for source in loader.load("quick").sources.values():
        ready = fetch.is_ready(source)
        found.append(
            Diagnosis(source.name, "ok" if ready else "note", "ready" if ready else f"will be fetched: {source.source}")
        )
    if importlib.util.find_spec("pip") is None:
        found.append(
            Diagnosis("pip", "no", "not in this environment, so carriers cannot be fetched: python -m ensurepip")
        )
    return found


def _disk() -> list[Diagnosis]:
    found = []
    for name, place in (("cache", cache.root()), ("runs", store.RUNS.resolve())):
        there = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(there).free
        state = "ok" if free >= _ROOM_B else "no"
        found.append(Diagnosis(f"disk of the {name}", state, f"{free / _GIB:.1f} GiB free at {place}"))
    return found
