"""A whole run: resolve, fetch, write run.json, run the Cells, write the footer, make the report."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import harness
from harness import fitting, store, suites
from harness.analysis import naming, verdict
from harness.assets import fetch
from harness.assets.table import Source, resolve
from harness.errors import Exit, HarnessError, StoreError, UsageError
from harness.expand import Plan, expand
from harness.expand import only as keep_only
from harness.manifest import Footer, Manifest
from harness.measure import environment
from harness.records import Environment, Status
from harness.report import html, text
from harness.runner import local, stop, task_assets
from harness.runner.progress import Progress
from harness.runner.work import Asset, TaskWork, Work, used

DEFAULT_TIMEOUT_S = 3600.0

_How = Literal["finished", "interrupted", "failed"]


class _Times:
    """Where the time outside the Cells goes, in seconds."""

    def __init__(self) -> None:
        self.outside: dict[str, float] = {}
        self._began = self._mark = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.outside[name] = self.outside.get(name, 0.0) + now - self._mark
        self._mark = now

    @property
    def total(self) -> float:
        """From the beginning to the last lap."""
        return self._mark - self._began

    def skip(self) -> float:
        """Leave what has passed since the last lap out of the account and return it."""
        now = time.monotonic()
        spent, self._mark = now - self._mark, now
        return spent


@stop.on_request()
def run_suite(
    suite_name: str,
    *,
    out: Path | None = None,
    only: str | None = None,
    resume: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    timeout: float = DEFAULT_TIMEOUT_S,
    strict: bool = False,
) -> Exit:
    """Run a suite and report it. Prints the summary on stdout and returns the exit code."""
    times = _Times()
    suite = suites.load(suite_name)
    plan = expand(suite)
    if only is not None:
        plan = keep_only(plan, only)
    here = environment.describe(environment.physical_cores())
    chosen = _device(device)
    with contextlib.ExitStack() as held:
        old = _old(plan, out, resume, held)
        fitting.refuse(suite, plan)
        times.lap("startup")
        progress = Progress(plan.cells)
        held.callback(progress.close)
        works = _resolve(suite, plan, progress)
        fitting.refuse(suite, plan)  # again: now every model is at hand
        times.lap("fetch")
        if old:
            folder, run_id, done = _reopen(old, here, works, chosen, progress)
        else:
            folder, run_id, done = _open(suite, plan, here, out, progress, held)
        times.lap("scheduling")
        with _saying_what_is_kept(folder):
            how = _measure(plan, works, done, folder, run_id, here, chosen, timeout, times, progress)
            progress.close()
            return _report(folder, interrupted=how == "interrupted", strict=strict)


def _measure(
    plan: Plan,
    works: dict[str, tuple[Asset, Asset, TaskWork]],
    done: set[str],
    folder: store.RunFolder,
    run_id: str,
    here: Environment,
    device: Literal["cpu", "cuda"],
    timeout: float,
    times: _Times,
    progress: Progress,
) -> _How:
    """Run the Cells that are not done, one after the other, and write the footer whatever ends it."""
    how: _How = "finished"
    made: set[str] = set()
    in_cells = 0.0
    try:
        for index, cell in enumerate(plan.cells, 1):
            if cell.cell_id in done:
                progress.resumed(index, cell)
                continue
            progress.begin(index, cell)
            attempt = folder.next_attempt(cell.cell_id)
            model, data, task = works[cell.cell_id]
            work = Work(
                run=run_id, folder=str(folder.path.resolve()), attempt=attempt, cell=cell,
                model=model, data=data, task=task, device=device, launched=time.time(),
            )  # fmt: skip
            times.lap("scheduling")
            record = local.attempt(work, folder, here, timeout, progress)
            in_cells += times.skip()
            made.add(cell.cell_id)
            progress.end(record)
    except KeyboardInterrupt as error:
        how = "interrupted"
        in_cells += times.skip()
        by = f" by {error}" if isinstance(error, stop.Terminated) else ""
        progress.say(f"interrupted{by}: what was finished is kept; the report shows it")
    except BaseException:
        in_cells += times.skip()
        with contextlib.suppress(StoreError):  # what ended the run is what its user must read
            _finish(folder, run_id, "failed", times, in_cells, made)
        raise
    footer = _finish(folder, run_id, how, times, in_cells, made)
    if footer.kept:
        everything = sum(record.duration_s for record in store.read_run(folder.path).latest().values())
        progress.say(
            f"this resumed part took {footer.seconds_total:.1f} s; the Cells of the whole run together {everything:.1f} s, "
            f"{footer.kept} of them measured earlier"
        )
    return how


@contextlib.contextmanager
def _saying_what_is_kept(folder: store.RunFolder) -> Iterator[None]:
    """Add to an error of ours, which nobody foresaw, where its user finds what had been finished before it."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"what was finished is kept in {folder.path}; `peft-harness report {folder.path}` shows it")
        raise


def _device(wanted: str) -> Literal["cpu", "cuda"]:
    if wanted == "cuda" and not environment.gpus():
        raise HarnessError(
            "no NVIDIA GPU was found", where="--device cuda", mend="run with --device cpu, or see `peft-harness doctor`"
        )
    return "cuda" if wanted == "cuda" or (wanted == "auto" and environment.gpus()) else "cpu"


def _resolve(suite: suites.Suite, plan: Plan, progress: Progress) -> dict[str, tuple[Asset, Asset, TaskWork]]:
    """Fetch every model and data set the plan names, before anything runs. Raises SuiteError for data that do not fit."""
    base = suite.path.resolve().parent
    ready: dict[str, Asset] = {}
    tasks: dict[str, tuple[Asset, TaskWork]] = {}

    def asset(source: Source) -> Asset:
        if source.name not in ready:
            path = fetch.ensure(source, progress.fetching)
            ready[source.name] = Asset(path=str(path), source=source, use=fetch.use(source))
        return ready[source.name]

    works = {}
    for cell in plan.cells:
        if cell.task not in tasks:
            items = max(c.evaluation.items for c in plan.cells if c.task == cell.task)
            tasks[cell.task] = task_assets.ready(suite.tasks[cell.task], items, asset)
        works[cell.cell_id] = (asset(resolve(cell.model, suite.sources, base)), *tasks[cell.task])
    return works


def _old(plan: Plan, out: Path | None, resume: str | None, held: contextlib.ExitStack) -> store.Run | None:
    """Return the run to go on with, if any, locked until `held` ends.

    Refuses before anything is fetched what could not be written afterwards.
    """
    if resume is None:
        if out is not None:
            store.refuse_used(out)
        return None
    if out is not None:
        raise UsageError("a resumed run stays in its folder", where=f"--out {out}", mend="leave out --out or --resume")
    old = store.read_run(store.find_run(resume))
    expected = {cell.cell_id for cell in old.manifest.cells}
    named = naming.full(plan.cells)
    if strange := [name for cell_id, name in named.items() if cell_id not in expected]:
        raise UsageError(
            f"{len(strange)} Cells of this suite are not in that run, e.g. {strange[0]}",
            where=f"--resume {old.manifest.run}",
            mend="resume with the suite it was started with, or start a new run",
        )
    held.callback(store.RunFolder.take(old.path).release)
    return store.read_run(old.path)  # again: until now another runner may have written to it


def _reopen(
    old: store.Run, here: Environment, works: dict[str, tuple[Asset, Asset, TaskWork]], device: str, progress: Progress
) -> tuple[store.RunFolder, str, set[str]]:
    """Return an old run's folder, its id, and the Cells that need not run again: same machine, code, device, assets."""
    folder = store.RunFolder(old.path)
    if old.footer is None:
        why = "its footer.json cannot be read" if "footer.json" in old.broken else "it has no footer.json"
        progress.say(f"run {old.manifest.run} is incomplete: {why}; it goes on with what its Cells left")
    folder.reopen()
    doubtful = old.doubtful()
    for what in doubtful.values():
        progress.say(f"{what}: it does not count, and its Cell is measured again")
    done = {
        record.cell_id
        for record in old.records
        if record.status is Status.OK
        and record.cell_id not in doubtful
        and record.environment.id == here.id
        and record.environment.code_version == here.code_version
        and record.device == device
        and record.cell_id in works
        and record.assets == used(*works[record.cell_id])
    }
    return folder, old.manifest.run, done


def _open(
    suite: suites.Suite,
    plan: Plan,
    here: Environment,
    out: Path | None,
    progress: Progress,
    held: contextlib.ExitStack,
) -> tuple[store.RunFolder, str, set[str]]:
    """Make the run folder, locked until `held` ends; return it, the run's id, and no Cells that need not run."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    unique = hashlib.sha256(f"{stamp}{os.getpid()}{time.monotonic_ns()}".encode()).hexdigest()[:6]
    run_id = f"{stamp}-{suite.name}-{unique}"
    manifest = Manifest(
        run=run_id,
        suite=suite.name,
        title=suite.title,
        about=suite.about.strip(),
        suite_file=suite.path.name,
        suite_sha256=suite.sha256,
        comparisons=list(plan.comparisons),
        cells=list(plan.cells),
        environment=here,
        argv=["peft-harness", *sys.argv[1:]],
        started=store.now(),
        harness_version=harness.__version__,
    )
    folder = store.RunFolder.create(out or store.RUNS / run_id, manifest)
    held.callback(folder.release)
    progress.say(f"run {run_id}: {len(plan.cells)} Cells into {folder.path}")
    return folder, run_id, set()


def _finish(folder: store.RunFolder, run_id: str, how: _How, times: _Times, in_cells: float, made: set[str]) -> Footer:
    run = store.read_run(folder.path)
    times.lap("scheduling")
    footer = Footer(
        run=run_id,
        ended=store.now(),
        how=how,
        counts=dict(Counter(record.status.value for record in run.latest().values())),
        missing=run.missing(),
        kept=len(run.latest().keys() - made),
        seconds_total=times.total,
        seconds_in_cells=in_cells,
        seconds_outside=times.outside,
    )
    folder.close(footer)
    return footer


def _report(folder: store.RunFolder, *, interrupted: bool, strict: bool) -> Exit:
    run = store.read_run(folder.path)
    page = folder.path / "report.html"
    try:
        print("\n".join(text.summary(run)))
        html.write_report([run], page)
    except BrokenPipeError:  # the reader of stdout has left; the command knows what to do
        raise
    except Exception as error:
        why = error.what if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}"
        raise HarnessError(
            f"everything was measured and is kept, but the report could not be made: {why}",
            where=str(folder.path),
            mend=f"`peft-harness report {folder.path}` tries again",
        ) from error
    print(f"report: {page}")
    return Exit.INFRASTRUCTURE if interrupted else verdict.judge(run, strict=strict).exit
