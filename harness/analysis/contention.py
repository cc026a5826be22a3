"""Detection of training steps that waited for a CPU in use by other processes."""

from __future__ import annotations

from harness.analysis.measurements import TRAIN
from harness.errors import plural
from harness.records.record import Record

ONE_CORE = 0.9
"""Least CPU time, in seconds, that an undisturbed step uses per second of wall time. At every moment of such a step, at
least one thread has work."""
ALL_THREADS = 0.8
"""Least CPU time that an undisturbed step uses per second of wall time and thread, in seconds. Steps with less are busy
only if the load average is above the limit LOAD_ABOVE, because a Cell may leave threads idle by itself."""
LOAD_ABOVE = 0.5
"""If the load average exceeds the number of cores by more than this, other processes compete for the cores."""

OTHERS = 0.1
"""Most CPU time that other processes may use while a server is timed, in seconds per second and core."""

RULE = (
    "busy: the steps waited for a CPU, so their times are not those of the Method. Either the process got less than"
    f" {ONE_CORE:g} s of CPU time per second of its steps; or it got less than {ALL_THREADS:g} s per second and thread,"
    f" while the load average at the end of training was more than {LOAD_ABOVE:g} above the number of cores (or of threads,"
    " if there are more threads than cores)"
)
SERVER_RULE = (
    f"A server was busy if other processes used more than {OTHERS:g} s of CPU time per second and core while it was"
    " timed"
)


def busy(record: Record) -> str:
    """Return evidence, as text, that the steps of a Cell waited for a CPU.

    Without evidence, and on a GPU, return an empty string.
    """
    training = record.training
    threads, wall = record.environment.threads, sum(training.step_seconds) if training else 0.0
    # The process may sleep while a GPU computes.
    if training is None or training.cpu_seconds is None or not threads or wall <= 0 or record.device not in ("", "cpu"):
        return ""
    used = training.cpu_seconds / wall
    load = next((p.load_end for p in record.phases if p.name == TRAIN), None)
    crowded = load is not None and load > max(threads, _cores(record)) + LOAD_ABOVE
    if used >= ONE_CORE and not (crowded and used < ALL_THREADS * threads):
        return ""
    load_text = "" if load is None else f"; load average {load:.1f} at the end of training"
    return f"{used:.2f} s of CPU time per second for {plural(threads, 'thread')}{load_text}"


def server_busy(record: Record) -> str:
    """Return evidence, as text, that other processes used the CPU while a server was timed. Empty without evidence."""
    served = record.measurements.served if record.measurements else None
    if served is None or not served.wall_s or served.other_cpu_s is None or not _cores(record):
        return ""
    used = served.other_cpu_s / served.wall_s
    return (
        f"other processes used {used:.2f} of {plural(_cores(record), 'core')}" if used > OTHERS * _cores(record) else ""
    )


def _cores(record: Record) -> int:
    cores = record.environment.machine.get("cores", "")
    return int(cores) if cores.isdecimal() else 0
