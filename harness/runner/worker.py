"""Run one Cell and write its Record: `python -m harness.runner.worker EVENTS LIFELINE < JOB.json`.

JOB.json is a `Job`. EVENTS and LIFELINE are numbers of file descriptors. The worker writes events to EVENTS, as JSON
lines, for the runner's progress display. It ends when the other end of LIFELINE closes. It writes the Record to the
run's folder.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cell import gate_key
from harness.cell.job import Emit, Job
from harness.cell.outcomes import CellOutcomeError
from harness.cell.training import bypassed_layers
from harness.errors import HarnessError, Unsupported
from harness.methods.registry import Registry
from harness.process.lifeline import die_with_parent
from harness.process.out_of_memory import shortage
from harness.process.signals import TERMINATION_SIGNALS
from harness.records import environment, store
from harness.records.record import Failure, Json, Phase, Provider, Record, Status
from harness.records.training import LOOP_MODULES
from harness.runner import worker_imports

if TYPE_CHECKING:
    from harness.cell.cell_run import CellRun

_TRACEBACK_LINES = 40


def main(argv: list[str]) -> int:
    """Run the worker and return 0. A result of 0 means only that a Record was written, not that the Cell succeeded."""
    events, lifeline = int(argv[1]), int(argv[2])
    # The runner handles these signals, and kills the whole group. A batch system signals all processes of a job, and a
    # worker that ended first would leave a `lost` Record.
    for number in (signal.SIGINT, *TERMINATION_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(lifeline, events)
    job = Job.model_validate_json(sys.stdin.buffer.read())

    def emit(event: str, /, **facts: Json) -> None:
        os.write(events, json.dumps({"event": event, **facts}).encode() + b"\n")

    record = attempt(job, emit)
    store.RunFolder(Path(job.folder)).write_record(record)
    emit("record", status=record.status.value)
    return 0


def attempt(job: Job, emit: Emit) -> Record:
    """Run one Cell and return its Record, even if an error ends the Cell."""
    started = store.now()
    # A wall clock, which may be set back, times only the start of the process. A monotonic clock times the rest.
    before, begun = max(0.0, time.time() - job.launched), time.monotonic()

    def age() -> float:
        return before + time.monotonic() - begun

    emit("phase", name="start-up")
    registry = worker_imports.registry(job.cell)
    threads = job.threads or environment.threads()
    here = environment.describe(threads)
    facts: dict[str, object] = {"gpu": job.gpu} if job.gpu else {}
    run: CellRun | None = None
    outcome: dict[str, Any] = {"status": Status.OK}
    try:
        implementation = registry.find("method", job.cell.method, job.cell.implementation)
        outcome["provider"] = Provider(distribution=implementation.distribution, version=implementation.version)
        if missing := _import_all(job, registry):
            outcome |= {"status": Status.SKIPPED, "because": missing}
        else:
            run, versions = _prepare(job, registry, emit, threads)
            run.gate_key = gate_key.of_process(job, outcome["provider"], here)
            facts = {**versions, **facts}
            peak = run.meter.peak() if run.meter.source == "VmHWM" else None
            start_up = Phase(name="start-up", seconds=age(), peak_memory_B=peak, end_memory_B=run.baseline_B)
            run.clock.done.append(start_up)
            from harness.cell.lifecycle import measure
            from harness.memory_model.cell_prediction import predict

            outcome["measurements"] = measure(run, predict)
    except Exception as error:  # noqa: BLE001  # the one place where a crash becomes data
        outcome["status"], outcome["because"] = _classify(error, job, run)
        if outcome["status"] is not Status.SKIPPED:
            outcome["failure"] = _failure(error, run)
    if run:
        outcome |= {"phases": run.clock.done, "checks": run.checks, "notes": run.notes}
        outcome |= {"typed_notes": run.typed_notes, "layers": run.layers, "gate": run.gate}
        if job.imported:
            outcome["imported"] = job.imported.facts.model_copy(update={"loss": run.loss_agreement})
    described = here.model_copy(update={"extra": {**facts, "variables": environment.thread_variables()}})
    return job.record(environment=described, started=started, duration_s=age(), **outcome)


def _import_all(job: Job, registry: Registry) -> str:
    """Import the modules that the Cell needs, so that no later phase includes the time of imports.

    Return an error message if a module cannot be imported, and "" otherwise.
    """
    for module in worker_imports.modules(job, registry):
        if why := _why_not_imported(module, job.cell.implementation, job.cell.implementation):
            return why
    if (loop := job.cell.training.loop) != "harness":
        return _why_not_imported(LOOP_MODULES[loop], f"`loop: {loop}`", loop)
    return ""


def _why_not_imported(module: str, what: str, name: str) -> str:
    """Import a module. If that fails, return a message that says how to install it; otherwise return "".

    what: the part of the Cell that needs the module, for the message. name: the implementation or loop that needs it.
    The message names an environment that has this implementation or loop.
    """
    try:
        import_module(module)
    except ImportError as error:
        from harness.assets.environments.table import home_of  # imported here, so that no measured Cell pays for it

        home = home_of(name)
        way = f"`peft-harness env create {home}`, and `environment: {home}` in the suite" if home else "pip install it"
        return f"{what} needs {module}, which cannot be imported ({error}); {way}"
    return ""


def _prepare(job: Job, registry: Registry, emit: Emit, threads: int) -> tuple[CellRun, dict[str, object]]:
    """Import torch and the measuring code, and set the seed and the number of threads.

    Return the state of the Cell, and facts about torch for the Record's environment.
    """
    import torch
    import transformers

    from harness.cell import lifecycle  # noqa: F401  # imported here, so that no phase pays for it
    from harness.cell.cell_run import CellRun
    from harness.cell.measure import energy, gpu
    from harness.cell.measure.memory import PeakMeter
    from harness.cell.measure.phases import PhaseClock
    from harness.memory_model import cell_prediction  # noqa: F401  # imported here for the same reason

    worker_imports.compile_name_patterns()  # before baseline_B is measured, as in a fork
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(job.cell.seed)
    torch.set_deterministic_debug_mode("warn")  # unlike use_deterministic_algorithms it does not load the compiler
    # Objects that imports made exist as long as the process. If the collector ignores them, a collection between phases
    # takes milliseconds instead of a third of a second, and a collection inside a timed step does not change its time.
    gc.collect()
    gc.freeze()
    device = torch.device(job.device)
    meter = PeakMeter(device)
    cuda = device.type == "cuda"
    driver, because = gpu.find(f"GPU-{torch.cuda.get_device_properties(device).uuid}") if cuda else (None, "")
    watch = gpu.GpuWatch(device, driver) if cuda else None

    def announce(name: str) -> None:
        # The event includes the peak so far, for the Record of a killed worker.
        peaks = [phase.peak_memory_B for phase in clock.done]
        emit("phase", name=name, peak_B=max((p for p in peaks if p is not None), default=None))

    clock = PhaseClock(meter, announce, energy.meter(driver, because, cuda=cuda), watch)
    run = CellRun(job, registry, clock, meter, emit, baseline_B=meter.now())
    if cuda:
        run.notes.append(
            "on a GPU some kernels sum in an order that varies from run to run; deterministic algorithms were requested "
            "with warn_only, so a rerun may differ in the last bits"
        )
    built = _build(torch.__config__.show())
    return run, {"torch_build": built, "torch_commit": torch.version.git_version, "cuda": torch.version.cuda or ""}


def _build(shown: str) -> list[str]:
    """Return the lines of `shown`, the text of `torch.__config__.show()`, without the build settings."""
    lines = [line.strip().removeprefix("- ") for line in shown.splitlines() if line.startswith("  - ")]
    return [line for line in lines if not line.startswith("Build settings")]


def _classify(error: Exception, job: Job, run: CellRun | None) -> tuple[Status, str]:
    """Return the status of a Cell that ended with `error`, and a reason, usually one line long."""
    text = _plain(str(error))
    first = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, Unsupported):
        return Status.SKIPPED, f"{job.cell.implementation} or its base does not offer this: {error}"
    if isinstance(error, HarnessError):
        return Status.ERROR, str(error)
    if isinstance(error, CellOutcomeError):
        return error.status, first
    if short := shortage(error):
        return Status.OOM, f"the {short.where}'s memory ran out: {first}"
    bypassed = bypassed_layers.explain(error, run.adapted) if run else ""
    return Status.ERROR, bypassed or f"{type(error).__name__}: {first}"


def _failure(error: BaseException, run: CellRun | None) -> Failure:
    text = _plain(str(error))
    short = shortage(error)
    peaks = [p.peak_memory_B for p in run.clock.done if p.peak_memory_B is not None] if run else []
    lines = _plain("".join(traceback.format_exception(error))).splitlines()
    return Failure(
        kind=type(error).__name__,
        message=text[:4000],
        traceback="\n".join(lines[-_TRACEBACK_LINES:]),
        phase=run.clock.current if run else "start-up",
        requested_B=short.requested_B if short else None,
        last_peak_B=max(peaks, default=None),
    )


def _plain(text: str) -> str:
    """Return `text` in a form that UTF-8 can encode. A message may contain a file name that is not valid text."""
    return text.encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    code = main(sys.argv)
    # The Record is on disk. An orderly shutdown of the libraries would take a second per Cell, and some libraries hang.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
