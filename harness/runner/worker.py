"""One Cell in, one Record out: `python -m harness.runner.worker EVENTS LIFELINE < WORK.json`.

WORK.json is a Work; EVENTS and LIFELINE are file descriptors: JSON lines for the runner's progress display go out on the
first, the second is watched so that the worker dies with its runner. The Record goes straight into the run folder.
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
from typing import Any

from harness.cell.job import Job
from harness.cell.training import bypassed_layers
from harness.errors import HarnessError, Unsupported
from harness.methods.registry import Implementation, discover
from harness.process.lifeline import die_with_parent
from harness.process.out_of_memory import shortage
from harness.process.termination import TERMINATION_SIGNALS
from harness.records import environment, store
from harness.records.record import Failure, Phase, Provider, Record, Status

_LOUD_LINES = 40


def main(argv: list[str]) -> int:
    """Run the worker; the exit code only says whether a Record was written."""
    events, watched = int(argv[1]), int(argv[2])
    # An end that was asked for is the runner's to handle; it kills the whole group. A batch system tells every process of
    # a job, and a worker that went first would leave a `lost` Record behind.
    for asked in (signal.SIGINT, *TERMINATION_SIGNALS):
        signal.signal(asked, signal.SIG_IGN)
    die_with_parent(watched, events)
    work = Job.model_validate_json(sys.stdin.buffer.read())

    def emit(event: str, **facts: Any) -> None:
        os.write(events, json.dumps({"event": event, **facts}).encode() + b"\n")

    record = attempt(work, emit)
    store.RunFolder(Path(work.folder)).write_record(record)
    emit("record", status=record.status.value)
    return 0


def attempt(work: Job, emit: Any) -> Record:
    """Live one Cell and return its Record, whatever happens."""
    started = store.now()
    # Only the start of the process is told by a wall clock, which may be set back; all else by one that never is.
    before, begun = max(0.0, time.time() - work.launched), time.monotonic()

    def age() -> float:
        return before + time.monotonic() - begun

    emit("phase", name="start-up")
    registry = discover()
    status, because, failure, life, measurements = Status.OK, "", None, None, None
    phases: list[Phase] = []
    provider = None
    threads = work.threads or environment.threads()
    versions: dict[str, object] = {}
    try:
        implementation = registry.find("method", work.cell.method, work.cell.implementation)
        provider = Provider(distribution=implementation.distribution, version=implementation.version)
        missing = _import_all(implementation, work, registry)
        if missing:
            status, because = Status.SKIPPED, missing
        else:
            life, versions = _prepare(work, registry, emit, threads)
            phases = life.clock.done
            peak = life.meter.peak() if life.meter.source == "VmHWM" else None
            phases.append(Phase(name="start-up", seconds=age(), peak_memory_B=peak, end_memory_B=life.baseline))
            measurements = life.run()
    except Unsupported as error:
        status, because = Status.SKIPPED, f"{work.cell.implementation} or its base does not offer this: {error}"
    except HarnessError as error:
        status, because = Status.ERROR, str(error)
        failure = _failure(error, life)
    except Exception as error:  # noqa: BLE001 - the one place where a crash becomes data
        status, because = _classify(error, life)
        failure = _failure(error, life)
    return Record(
        run=work.run,
        cell_id=work.cell.cell_id,
        attempt=work.attempt,
        status=status,
        because=because,
        cell=work.cell,
        provider=provider,
        environment=environment.describe(threads, {**versions, **_where(work), "variables": environment.thread_variables()}),
        device=work.device,
        assets=work.assets,
        started=started,
        duration_s=age(),
        phases=phases,
        checks=life.checks if life else [],
        measurements=measurements if status is Status.OK else None,
        failure=failure,
        notes=[*work.notes, *(life.notes if life else [])],
        layers=life.layers if life else [],
    )  # fmt: skip


def _import_all(implementation: Implementation, work: Job, registry: Any) -> str:
    """Import what the Cell needs during start-up, so that no later phase pays for it; say what is missing."""
    needed = list(implementation.requires)
    if work.cell.base.quantization != "none":
        needed += registry.find("base", work.cell.base.quantization, work.cell.base.implementation).requires
    needed += ["transformers.modeling_utils"]  # not `transformers`, which puts its own imports off to the first model
    needed += ["lm_eval.evaluator"] if work.model.source.kind == "causal" and work.data else []
    for module in needed:
        try:
            import_module(module)
        except ImportError as error:
            return f"{work.cell.implementation} needs {module}, which cannot be imported ({error}); pip install it"
    return ""


def _prepare(work: Job, registry: Any, emit: Any, threads: int) -> tuple[Any, dict[str, object]]:
    import torch
    import transformers

    from harness.cell.lifecycle import CellRun
    from harness.cell.measure import energy, gpu
    from harness.cell.measure.memory import PeakMeter
    from harness.cell.measure.phases import PhaseClock
    from harness.memory_model.cell_prediction import predict

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(work.cell.seed)
    torch.set_deterministic_debug_mode("warn")  # unlike use_deterministic_algorithms it does not load the compiler
    # What the imports made lives as long as the process: out of the collector's sight, a collection at each phase edge
    # takes milliseconds instead of a third of a second, and one inside a timed step is not seen in it.
    gc.collect()
    gc.freeze()
    device = torch.device(work.device)
    meter = PeakMeter(device)
    cuda = device.type == "cuda"
    driver, because = gpu.find(device) if cuda else (None, "")
    watch = gpu.GpuWatch(device, driver) if cuda else None

    def announce(name: str) -> None:
        peaks = [
            phase.peak_memory_B for phase in clock.done
        ]  # for whoever has to tell the end of a worker that is killed
        emit("phase", name=name, peak_B=max((p for p in peaks if p is not None), default=None))

    clock = PhaseClock(meter, announce, energy.meter(driver, because, cuda=cuda), watch)
    life = CellRun(work, registry, clock, meter, emit, predict, baseline=meter.now())
    life.notes += _reproducibility(device)
    built = _build(torch.__config__.show())
    return life, {"torch_build": built, "torch_commit": torch.version.git_version, "cuda": torch.version.cuda or ""}


def _where(work: Job) -> dict[str, object]:
    """Return which of the machine's GPUs it is."""
    return {"gpu": work.gpu} if work.gpu else {}


def _build(shown: str) -> list[str]:
    """Return what torch says of its compiler, its libraries and the CPU's instructions in use; not all its flags."""
    lines = [line.strip().removeprefix("- ") for line in shown.splitlines() if line.startswith("  - ")]
    return [line for line in lines if not line.startswith("Build settings")]


def _reproducibility(device: Any) -> list[str]:
    if device.type == "cuda":
        return [
            "on a GPU some kernels sum in an order that varies from run to run; deterministic algorithms were asked for "
            "with warn_only, so a rerun may differ in the last bits"
        ]
    return []


def _classify(error: Exception, life: Any) -> tuple[Status, str]:
    kind, text = type(error).__name__, _plain(str(error))
    first = text.splitlines()[0] if text else kind
    if kind in ("NonconformingError", "Diverged", "Untrained"):
        return Status.NONCONFORMING, first
    if short := shortage(error):
        return Status.OOM, f"the {short.whose}'s memory ran out: {first}"
    around = bypassed_layers.told(error, life.adapted) if life else ""
    return Status.ERROR, around or f"{kind}: {first}"


def _failure(error: BaseException, life: Any) -> Failure:
    text = _plain(str(error))
    short = shortage(error)
    peaks = [p.peak_memory_B for p in life.clock.done if p.peak_memory_B is not None] if life else []
    lines = _plain("".join(traceback.format_exception(error))).splitlines()
    return Failure(
        kind=type(error).__name__,
        message=text[:4000],
        traceback="\n".join(lines[-_LOUD_LINES:]),
        phase=life.clock.current if life else "start-up",
        requested_B=short.requested_B if short else None,
        last_peak_B=peaks[-1] if peaks else None,
    )


def _plain(text: str) -> str:
    """Return `text` as UTF-8 can hold it: a message may name a file whose name is no text."""
    return text.encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    code = main(sys.argv)
    # The Record is on disk. Taking libraries apart in order would cost a second a Cell, and some hang in it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
