"""Detect times that other processes disturbed: times of training steps, latencies, and times of a model server."""

from __future__ import annotations

from collections.abc import Iterable

from harness.analysis.grouping import group
from harness.analysis.measurements import EVALUATE, LATENCY_PHASE, TRAIN
from harness.analysis.statistics.intervals import median_interval
from harness.errors import plural
from harness.records.record import Latency, Record

ONE_CORE = 0.9
"""Least CPU time that an undisturbed step uses, in seconds per second of wall time. At every moment of such a step, at
least one thread has work."""
ALL_THREADS = 0.8
"""Least CPU time that an undisturbed step uses, in seconds per second of wall time and per thread. A step that uses
less counts as disturbed only if the load average is high too (`LOAD_ABOVE`), because a Cell may leave threads idle by
itself."""
LOAD_ABOVE = 0.5
"""The load average is high if it exceeds the number of cores (or of threads, if there are more) by more than this. Then
other processes compete for the cores."""

SPREAD = 1.5
"""Largest accepted ratio of the upper to the lower end of the 95 % interval of a median latency. With a wider interval,
the latency counts as unsteady. In the published runs with one Cell at a time, 1 of 161 intervals is wider. This count
leaves out the run `2026-11-28-serve-cpu`, which other programs disturbed: there, 9 of 10 are wider. In the published
run with two Cells at a time, 38 of 195 are wider."""
OTHERS = 0.1
"""Largest CPU time that other processes may use while a server is timed, in seconds per second and per core."""

RULE = (
    "busy: other programs used the CPU while the Cell trained, so its times may be too high; its accuracy is not affected."
    f" The process got less than {ONE_CORE:g} s of CPU time per second of its steps; or it got less than {ALL_THREADS:g} s"
    f" per second and thread, while the load average at the end of training was more than {LOAD_ABOVE:g} above the number of"
    " cores (or of threads, if there are more threads than cores). A Cell without training is judged in the same way by the"
    " CPU time of its latency phase or, without latencies, of its evaluation"
)
BUSY_PASSES = "busy: other programs used the CPU while the Cell trained or, without training, during its passes"
UNSTEADY_RULE = (
    "unsteady: something slowed some of these passes and not others, so their times may be too high. The base, the unmerged"
    " and the merged model are timed in turn; all of them are unsteady if the 95 % interval of one median ends above"
    f" {SPREAD:g} times its start"
)
SERVER_RULE = (
    f"A server was busy if other processes used more than {OTHERS:g} s of CPU time per second and core while it was"
    " timed"
)


def busy(record: Record) -> str:
    """Return evidence, as text, that the training steps of a Cell, or the passes of an untrained Cell, waited for a CPU.

    Without evidence, and on a GPU, return an empty string.
    """
    threads, (phase, cpu, wall) = record.environment.threads, _timed(record)
    # The process may sleep while a GPU computes.
    if cpu is None or not threads or wall <= 0 or record.device not in ("", "cpu"):
        return ""
    used = cpu / wall
    load = next((p.load_end for p in record.phases if p.name == phase), None)
    crowded = load is not None and load > max(threads, _cores(record)) + LOAD_ABOVE
    if used >= ONE_CORE and not (crowded and used < ALL_THREADS * threads):
        return ""
    end = "training" if phase == TRAIN else f"its phase {phase}"
    load_text = "" if load is None else f"; load average {load:.1f} at the end of {end}"
    return f"{used:.2f} s of CPU time per second for {plural(threads, 'thread')}{load_text}"


def _timed(record: Record) -> tuple[str, float | None, float]:
    """Return the phase by which a Cell is judged, and the CPU and wall seconds of its steps, or of the whole phase.

    The phase is the training; without it, that of the latencies; without them, the evaluation. The CPU seconds are None
    if they are not known.
    """
    if training := record.training:
        return TRAIN, training.cpu_seconds, sum(training.step_seconds)
    phases = {phase.name: phase for phase in record.phases}
    found = phases.get(LATENCY_PHASE) or phases.get(EVALUATE)
    return (found.name, found.cpu_seconds, found.seconds) if found else ("", None, 0.0)


def disturbed(record: Record, latencies: Iterable[Latency]) -> tuple[str, str]:
    """Return the flag of disturbed latencies, `unsteady` or `busy`, and the evidence as text.

    latencies: the latencies of the base, the unmerged and the merged model, which were timed in turn. Return two empty
    strings without evidence, or if nothing was timed. A median with too few passes for an interval is no evidence.
    """
    medians = [(one.variant, median_interval(one.seconds)) for one in latencies if one.seconds]
    if not medians:
        return "", ""
    wide = [
        f"{variant} {1000 * m.low:.3g} to {1000 * m.high:.3g} ms"
        for variant, m in medians
        if m.low is not None and m.high is not None and m.high > SPREAD * m.low
    ]
    if wide:
        return "unsteady", f"95 % interval of the median: {', '.join(wide)}"
    evidence = busy(record)
    return ("busy", evidence) if evidence else ("", "")


def unsteady(record: Record) -> str:
    """Return evidence, as text, that a median latency has too wide an interval.

    Without evidence, return an empty string.
    """
    latencies = record.measurements.latency if record.measurements else []
    passes = group(((x.kind, x.batch, x.tokens, x.adapters is None), x) for x in latencies)
    found = [(kind, *disturbed(record, timed)) for (kind, *_), timed in passes.items()]
    return "; ".join(f"{kind}: {why}" for kind, flag, why in found if flag == "unsteady")


def server_busy(record: Record) -> str:
    """Return evidence, as text, that other processes used the CPU while a server was timed.

    Without evidence, return an empty string.
    """
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
