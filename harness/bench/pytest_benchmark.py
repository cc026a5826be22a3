"""Write and read JSON files in the format of pytest-benchmark. This module imports no torch.

Programs such as `pytest-benchmark compare` can read the written files. In these files, each timed implementation is one
benchmark, and implementations to be compared are in one group. `read` takes files of any version of pytest-benchmark,
if they contain the names of the benchmarks and their raw rounds.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.bench.results import BenchRow
from harness.errors import UsageError
from harness.records.record import Environment

VERSION = "5.0.0"
"""Version of pytest-benchmark whose file format `document` writes."""
_TIMER = {"cpu": "perf_counter", "cuda": "torch.cuda.Event"}


def document(rows: Sequence[BenchRow], environment: Environment) -> dict[str, Any]:
    """Return the measured rows as a dict for JSON, in the form in which pytest-benchmark saves its results."""
    return {
        "machine_info": {
            "node": platform.node(), "processor": platform.processor(), "machine": platform.machine(),
            "python_compiler": platform.python_compiler(), "python_implementation": platform.python_implementation(),
            "python_implementation_version": platform.python_version(), "python_version": platform.python_version(),
            "python_build": list(platform.python_build()), "release": platform.release(), "system": platform.system(),
            "cpu": {"brand_raw": environment.machine.get("cpu", "")}, **environment.software,
        },
        "commit_info": {
            "id": environment.git_sha or "unknown", "time": None, "author_time": None, "dirty": bool(environment.git_dirty),
            "project": "peft-harness", "branch": "(unknown)",
        },
        "benchmarks": [one for row in rows if row.outcome == "measured" for one in _benchmarks(row)],
        "datetime": datetime.now(UTC).isoformat(),
        "version": VERSION,
    }  # fmt: skip


def _benchmarks(row: BenchRow) -> list[dict[str, Any]]:
    samples = row.samples
    if samples is None:
        return []
    group = f"{row.name} {row.shape} {row.dtype} {row.device}"
    found = []
    for side, name, times in (("ours", row.ours, samples.ours), ("other", row.other, samples.other)):
        params = {
            "shape": row.shape, "dtype": row.dtype, "device": row.device, "implementation": name, "beside": row.other
        }  # fmt: skip
        opponent = f"-vs-{row.other}" if side == "ours" else ""
        title = f"{row.name}[{row.shape}-{row.dtype}-{row.device}-{name}{opponent}]"
        found.append({
            "group": group, "name": title, "fullname": f"peft-harness bench::{title}", "params": params,
            "param": "-".join(params.values()),
            "extra_info": {
                "parity": [one.result.check for one in row.parity], "bytes": row.bytes, "flops": row.flops,
                "share_of_roofline": row.share(times), "memory": row.memory.get(name),
            },
            "options": {
                "disable_gc": True, "timer": _TIMER[row.device], "min_rounds": len(times), "max_time": 0.0,
                "min_time": 0.0, "warmup": True,
            },
            "stats": _stats(times, samples.calls.get(side, 1)),
        })  # fmt: skip
    return found


def _stats(times: Sequence[float], iterations: int) -> dict[str, Any]:
    """Return the statistics of `times`, which are in seconds, under the names that pytest-benchmark uses."""
    ordered, mean = sorted(times), statistics.fmean(times)
    q1, middle, q3 = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    spread = statistics.stdev(times) if len(times) > 1 else 0.0
    reach = 1.5 * (q3 - q1)
    low, high = bisect_left(ordered, q1 - reach), bisect_right(ordered, q3 + reach)
    far, beyond = sum(abs(one - mean) > spread for one in times), low + len(ordered) - high
    return {
        "min": ordered[0], "max": ordered[-1], "mean": mean, "stddev": spread, "rounds": len(times), "median": middle,
        "iqr": q3 - q1, "q1": q1, "q3": q3, "iqr_outliers": beyond, "stddev_outliers": far,
        "outliers": f"{far};{beyond}", "ld15iqr": ordered[low], "hd15iqr": ordered[high - 1], "ops": 1 / mean,
        "total": sum(times), "data": list(times), "iterations": iterations,
    }  # fmt: skip


_MAKE = "`pytest --benchmark-json=FILE` writes one"


@dataclass(frozen=True)
class Saved:
    """Content of one file of pytest-benchmark: the times of one process run."""

    path: Path
    place: Mapping[str, str]
    """Facts about the machine. Compare times only if these facts are equal."""
    rounds: Mapping[str, Sequence[float]]
    """Full name of a benchmark -> seconds of each round."""


def read(paths: Sequence[Path]) -> list[Saved]:
    """Read files of pytest-benchmark, and return their contents. A folder stands for all `*.json` files below it.

    Raises UsageError if a file is missing, invalid or a copy of another file. A copy would count one process run twice.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        if not found:
            raise UsageError("contains no JSON file", where=str(path), hint=f"{_MAKE}, e.g. {path / '1.json'}")
        files += found
    saved = [_read(file) for file in dict.fromkeys(file.resolve() for file in files)]
    seen: dict[str, Path] = {}
    for one in saved:
        rounds = json.dumps(one.rounds, sort_keys=True)
        if rounds in seen:
            what = f"same process run as {seen[rounds]}"
            raise UsageError(what, where=str(one.path), hint="remove one of the two files")
        seen[rounds] = one.path
    return saved


def place(machine_info: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts of `machine_info` that must be equal if times are to be compared. Missing facts are left out.

    Host name and kernel are not among them, because a container gets a new host name each time it starts.
    """
    cpu = machine_info.get("cpu")
    cpu = cpu if isinstance(cpu, Mapping) else {}
    found = {
        "cpu": cpu.get("brand_raw") or cpu.get("brand"),  # `brand` before version 3.3
        "cores": cpu.get("count"),
        "architecture": machine_info.get("machine"),
        "system": machine_info.get("system"),
        "python": " ".join(str(machine_info.get(f"python_{key}", "")) for key in ("implementation", "version")).strip(),
        "torch": machine_info.get("torch"),
        "gpu": machine_info.get("gpu"),
    }
    return {key: str(value) for key, value in found.items() if value}


def _read(file: Path) -> Saved:
    try:
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(file), hint=_MAKE) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"is not JSON: {error}", where=str(file), hint=_MAKE) from error
    benchmarks = document.get("benchmarks") if isinstance(document, dict) else None
    if not isinstance(benchmarks, list) or not benchmarks:
        raise UsageError("is not a file of pytest-benchmark: no `benchmarks`", where=str(file), hint=_MAKE)
    machine = document.get("machine_info")
    rounds = dict(_rounds(one, f"{file}: benchmarks[{number}]") for number, one in enumerate(benchmarks))
    return Saved(file, place(machine if isinstance(machine, dict) else {}), rounds)


def _rounds(benchmark: Any, where: str) -> tuple[str, list[float]]:
    name = benchmark.get("fullname") if isinstance(benchmark, dict) else None
    if not isinstance(name, str) or not name:
        raise UsageError("has no `fullname`", where=where, hint=_MAKE)
    stats = benchmark.get("stats")
    data = stats.get("data") if isinstance(stats, dict) else None
    if not data:
        hint = "use --benchmark-json, or --benchmark-save together with --benchmark-save-data"
        raise UsageError(f"{name} has no raw rounds (`stats.data`)", where=where, hint=hint)
    if not isinstance(data, list) or not all(_seconds(one) for one in data):
        raise UsageError(f"`stats.data` of {name} is not a list of positive seconds", where=where, hint=_MAKE)
    return name, data


def _seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
