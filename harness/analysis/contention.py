"""Did a Cell's training steps wait for a CPU that others were using? Then its times say more of the others than of it."""

from __future__ import annotations

from harness.analysis.measurements import TRAIN
from harness.errors import plural
from harness.records.record import Record

ONE_CORE = 0.9
"""At any moment of a step at least one thread has work, so an undisturbed process gets about one core or more."""
ALL_THREADS = 0.8
LOAD_ABOVE = 0.5
"""Others' work in the load average: beyond what a process with one runnable thread per core adds to it."""

RULE = (
    f"busy: the steps waited for a CPU. Said where the process got less than {ONE_CORE:g} s of CPU time per second of its"
    f" steps; or less than {ALL_THREADS:g} of what its threads could use, while the load average at the end of training was"
    f" more than {LOAD_ABOVE:g} above the cores (or above the threads, if they are more). Such times are not the Method's"
)


def busy(record: Record) -> str:
    """Say in numbers that the steps of a Cell on a CPU waited; empty if they did not, or the Record cannot tell."""
    training = record.measurements.training if record.measurements else None
    threads, wall = record.environment.threads, sum(training.step_seconds) if training else 0.0
    # On a GPU the process itself may well sleep.
    if training is None or training.cpu_seconds is None or not threads or wall <= 0 or record.device not in ("", "cpu"):
        return ""
    used = training.cpu_seconds / wall
    load = next((p.load_end for p in record.phases if p.name == TRAIN), None)
    crowded = load is not None and load > max(threads, _cores(record)) + LOAD_ABOVE
    if used >= ONE_CORE and not (crowded and used < ALL_THREADS * threads):
        return ""
    beside = "" if load is None else f"; load average {load:.1f} at the end of training"
    return f"{used:.2f} s of CPU time per second for {plural(threads, 'thread')}{beside}"


def _cores(record: Record) -> int:
    cores = record.environment.machine.get("cores", "")
    return int(cores) if cores.isdecimal() else 0
