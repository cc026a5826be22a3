"""The export as pytest-benchmark's JSON, for `pytest-benchmark compare` and whatever else reads it. No torch.

Each program that was timed is one benchmark; those to be compared share a group.
"""

from __future__ import annotations

import platform
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from harness.bench.results import Row
from harness.records import Environment

VERSION = "5.0.0"
"""The version of pytest-benchmark whose form this is."""
_TIMER = {"cpu": "perf_counter", "cuda": "torch.cuda.Event"}


def document(rows: Sequence[Row], environment: Environment) -> dict[str, Any]:
    """Return what is measured in `rows`, as pytest-benchmark would have saved it."""
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


def _benchmarks(row: Row) -> list[dict[str, Any]]:
    samples = row.samples
    if samples is None:
        return []
    group = f"{row.name} {row.shape} {row.dtype} {row.device}"
    found = []
    for who, name, times in (("ours", row.ours, samples.ours), ("other", row.other, samples.other)):
        params = {
            "shape": row.shape,
            "dtype": row.dtype,
            "device": row.device,
            "implementation": name,
            "beside": row.other,
        }
        title = f"{row.name}[{row.shape}-{row.dtype}-{row.device}-{name}{f'-vs-{row.other}' if who == 'ours' else ''}]"
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
            "stats": _stats(times, samples.calls.get(who, 1)),
        })  # fmt: skip
    return found


def _stats(times: Sequence[float], iterations: int) -> dict[str, Any]:
    """Return pytest-benchmark's numbers of these times, in seconds."""
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
