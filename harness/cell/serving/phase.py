"""Serve the adapter of a Cell: start a server, judge its answers, and time it under several loads.

A load is a mix of models that requests go to, e.g. several adapters. It is timed only if its answers are right.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from harness.cell.cell_run import CellRun
from harness.cell.serving import adapter_folders, base_folder, judge_answers, server_process, timing
from harness.cell.serving.server_process import RunningServer, ServerPython
from harness.conformance.case import Case
from harness.conformance.cell_gate.multi_adapter import Adapters, draw_adapters
from harness.conformance.comparison.check_results import identifier, skipped
from harness.conformance.served import prompts
from harness.conformance.served.client import Dialect, first_dialect
from harness.conformance.served.session import Session
from harness.conformance.subject import Subject
from harness.errors import HarnessError, ServerError, Unsupported
from harness.methods import servers
from harness.methods.servers.kind import Launch, ServerKind
from harness.process.out_of_memory import shortage
from harness.records.record import CheckResult, Outcome
from harness.records.served import Served, ServedTimes
from harness.records.store import RunFolder

ADAPTERS = 4
"""Number of adapters on the server: the trained one, and others of the same shapes with random values."""
CONCURRENT = 8
"""Largest number of requests at the same time while answers are judged."""
ALIVE = "served-alive"
"""Name of the check that a server starts and answers requests."""


def draw(run: CellRun, subject: Subject) -> Adapters:
    """Return the adapters to serve: the trained one, then random ones. Empty if the Cell is not served."""
    cell = run.cell
    return draw_adapters(subject, ADAPTERS, cell.seed) if cell.serve and cell.evaluation.latency else []


def serve(run: CellRun, subject: Subject, adapters: Adapters) -> Served | None:
    """Serve adapters in the server that the Cell names, and return the times. Without adapters, return None.

    adapters: as `draw` returns them. If the server is missing, fails or answers wrongly, a check fails or is skipped,
    and the result has a reason instead of times.
    """
    cell = run.cell
    if not adapters:
        return None
    with run.clock.phase("serve"):
        kind, own = servers.find(cell.serve), run.job.server_python
        python = server_process.find_python(kind, own)
        if isinstance(python, str):
            return _untimed(run, subject, Served(server=kind.name, because=python), failed=False)
        log = RunFolder(Path(run.job.folder)).log_path(cell.cell_id, run.job.attempt)
        start = log.stat().st_size if log.exists() else 0
        folder = Path(tempfile.mkdtemp(prefix="serve-", dir=run.job.folder))
        served = Served(server=kind.name, software=python.software)
        try:
            if run.device.type == "cuda":  # the server needs the memory of the GPU
                subject.model.to("cpu")
                torch.cuda.empty_cache()
            base = base_folder.find(run.job, folder / "base")
            saved = _save(subject, adapters, base, folder)
            return _served(run, subject, kind, python, base, saved, served)
        except Unsupported as error:
            return _untimed(run, subject, served.model_copy(update={"because": str(error)}), failed=False)
        except HarnessError as error:
            said = server_process.reason(log, start)
            because = error.what + (f"; its log says: {said}" if said else "")
            return _untimed(run, subject, served.model_copy(update={"because": because}), failed=True)
        except (MemoryError, RuntimeError) as error:
            if not shortage(error):
                raise
            because = f"out of memory: {error}".partition("\n")[0]
            return _untimed(run, subject, served.model_copy(update={"because": because}), failed=False)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _untimed(run: CellRun, subject: Subject, served: Served, *, failed: bool) -> Served:
    """Add the check ALIVE to the Cell's results, with the reason why nothing was timed, and return `served`.

    failed: True if the check fails, False if it is skipped.
    """
    case = Case("trained", seed=run.cell.seed)
    result = skipped(subject, case, ALIVE, served.because)
    run.checks.append(result.model_copy(update={"outcome": Outcome.FAIL}) if failed else result)
    return served


def _save(subject: Subject, adapters: Adapters, base: Path, folder: Path) -> dict[str, Path]:
    """Save each adapter to its own folder. Return name of the adapter on the server -> folder.

    The trained adapter is the first entry.
    """
    saved: dict[str, Path] = {}
    for number, tensors in enumerate(adapters):
        name = f"random-{number}" if number else "trained"
        saved[name] = folder / name
        adapter_folders.save(subject, tensors, base, saved[name])
    return saved


def _served(
    run: CellRun, subject: Subject, kind: ServerKind, python: ServerPython, base: Path, adapters: dict[str, Path],
    served: Served,
) -> Served:  # fmt: skip
    """Start the server, judge its answers and time it. Return a copy of `served` with the results.

    Raises HarnessError if the server does not answer.
    """
    case = Case("trained", seed=run.cell.seed)
    prompt_tokens = _prompt_tokens(subject.model, run.cell.evaluation.prompt_tokens)
    launch = Launch(
        base=base, name=f"base-{run.cell.cell_id}-{run.job.attempt}", adapters=adapters, rank=subject.config.rank,
        dtype=run.cell.dtype, device=run.device.type, port=server_process.free_port(),
        tokens=max(prompt_tokens + timing.TOKENS, max(prompts.LENGTHS) + prompts.TOKENS), requests=CONCURRENT,
    )  # fmt: skip
    with server_process.running(kind, python, run.job.server_python, launch) as server:
        served = served.model_copy(update={"start_s": server.start_s})
        client, ids = server.client, prompts.plain_ids(base)
        session = Session(
            client, launch.name, adapters, prompts.drawn(base, run.cell.seed), (), prompts.TOKENS, CONCURRENT,
            run.cell.seed,
        )  # fmt: skip
        try:
            _choose_dialect(session)
            judged = judge_answers.judge(session, base, subject, case)
            run.checks += judged.checks
            times, swaps, costs = _timed(run, server, session, ids, prompt_tokens, judged.refused)
        except ServerError as error:
            ended = server.ended()
            raise ServerError(
                f"{kind.name} {ended}: {error.what}" if ended else error.what, where=error.where
            ) from error
        run.checks.append(
            CheckResult(check=identifier(subject, case, ALIVE), outcome=Outcome.PASS, detail="it answered each request")
        )
        nothing = "" if judge_answers.timed(judged.refused) else "no load had answers that could be judged right"
        return served.model_copy(
            update={
                "times": times, "swap_s": swaps, "swap_because": judged.refused.get(judge_answers.SWAP, ""),
                "because": nothing, **costs,
            }
        )  # fmt: skip


def _choose_dialect(session: Session) -> None:
    """Find the dialect (form of requests) that the server accepts, and set it in the session.

    Only dialects with token ids as prompts are tried, so no tokenizer is needed.
    """
    client = session.client

    def try_one(dialect: Dialect) -> None:
        client.dialect = dialect
        client.complete(session.base, session.prompts[0], 1)

    client.dialect = first_dialect(try_one, token_ids_only=True)


def _timed(
    run: CellRun, server: RunningServer, session: Session, ids: Sequence[int], prompt_tokens: int,
    refused: dict[str, str],
) -> tuple[list[ServedTimes], list[float], dict[str, Any]]:  # fmt: skip
    """Return the times of each load, the seconds of each replacement of an adapter, and the memory and CPU use."""
    names, rounds = list(session.adapters), max(timing.ROUNDS, run.cell.evaluation.passes or 0)
    begun, own, others = time.perf_counter(), _own_cpu(server), _machine_cpu()
    times = timing.measure(server.client, session.base, names, ids, prompt_tokens, run.cell.seed, refused, rounds)
    swaps = [] if judge_answers.SWAP in refused else timing.swaps(session, ids, prompt_tokens, rounds)
    own = _own_cpu(server) - own
    return (
        times,
        swaps,
        {
            "memory_B": server.memory_B(),
            "wall_s": time.perf_counter() - begun,
            "own_cpu_s": max(own, 0.0),
            "other_cpu_s": max(_machine_cpu() - others - own, 0.0),
        },
    )


def _own_cpu(server: RunningServer) -> float:
    return server.cpu_s() + time.process_time()


def _machine_cpu() -> float:
    """Return the CPU seconds of all processes of the machine since its start."""
    times = psutil.cpu_times()
    return float(times.user + times.system)


def _prompt_tokens(model: Any, wanted: int) -> int:
    """Return the number of tokens of a prompt: `wanted`, or fewer if the model has too few positions."""
    positions = getattr(model.config, "max_position_embeddings", None) or wanted + timing.TOKENS
    return max(1, min(wanted, positions - timing.TOKENS))
