"""A whole run: resolve, fetch, write run.json, run the Cells, write the footer, make the report."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import harness
from harness.analysis import verdict
from harness.assets import fetch
from harness.assets.table import Source, resolve
from harness.cell.job import Asset, Job, JobTask, used
from harness.errors import Exit, HarnessError, Problem, StoreError, SuiteError, UsageError
from harness.process import termination
from harness.records import environment, naming, store
from harness.records.manifest import Footer, Manifest
from harness.records.record import Environment, Provider, Status
from harness.report import html, terminal
from harness.runner import task_assets
from harness.runner.attempt import RunContext
from harness.runner.executors import node
from harness.runner.executors.executor import Device, Executor
from harness.runner.executors.local import Local
from harness.runner.progress import Progress
from harness.suites import loader, model_checks
from harness.suites.expand import Plan
from harness.suites.expand import only as keep_only
from harness.suites.suite import Suite

DEFAULT_TIMEOUT_S = 3600.0

_How = Literal["finished", "interrupted", "failed"]
Works = dict[str, tuple[Asset, Asset | None, JobTask]]
"""By cell_id: the model, the data and the task, at hand."""


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


@termination.handle_termination()
def run_suite(
    suite_name: str,
    *,
    out: Path | None = None,
    only: str | None = None,
    resume: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    timeout: float = DEFAULT_TIMEOUT_S,
    strict: bool = False,
    executor: Executor | None = None,
) -> Exit:
    """Run a suite and report it. Prints the summary on stdout and returns the exit code.

    executor: where its Cells run; None for one at a time, here.
    """
    times = _Times()
    suite = loader.load(suite_name)
    plan = suite.plan if only is None else keep_only(suite.plan, only)
    here = environment.describe(environment.threads())
    with contextlib.ExitStack() as held:
        old = _old(plan, out, resume, held)
        model_checks.refuse(suite, plan)
        place = held.enter_context(executor or Local())
        chosen = place.device(device)
        times.lap("startup")
        progress = Progress(plan.cells)
        held.callback(progress.close)
        works = _resolve(suite, plan, progress)
        model_checks.refuse(suite, plan)  # again: now every model is at hand
        times.lap("fetch")
        if old:
            folder, run_id, done = _reopen(old, here, works, chosen, progress, elsewhere=place.elsewhere)
        else:
            folder, run_id, done = _open(suite, plan, here, out, progress, held)
        times.lap("scheduling")
        with _saying_what_is_kept(folder):
            todo = _Todo(plan, works, done, folder, run_id, chosen, times, progress)
            how = _measure(todo, place, RunContext(folder, here, timeout))
            progress.close()
            return _report(folder, interrupted=how == "interrupted", strict=strict)


@dataclass
class _Todo:
    """What is to be measured, and the account of the time."""

    plan: Plan
    works: Works
    done: set[str]
    folder: store.RunFolder
    run_id: str
    device: Device
    times: _Times
    progress: Progress
    in_cells: float = 0.0
    """Seconds in which a Cell was at work."""

    def each(self) -> Iterator[Job]:
        """Give the attempts that are to be made, as an executor has room for them."""
        for cell in self.plan.cells:
            self.rest()
            if cell.cell_id in self.done:
                self.progress.resumed(cell)
                self.times.lap("scheduling")
                continue
            attempt = self.folder.next_attempt(cell.cell_id)
            model, data, task = self.works[cell.cell_id]
            work = Job(
                run=self.run_id, folder=str(self.folder.path.resolve()), attempt=attempt, cell=cell,
                model=model, data=data, task=task, device=self.device,
            )  # fmt: skip
            self.times.lap("scheduling")
            yield work

    def rest(self) -> None:
        """Book the time since the last lap on the Cells."""
        self.in_cells += self.times.skip()


def _measure(todo: _Todo, place: Executor, terms: RunContext) -> _How:
    """Run the Cells that are not done, and write the footer whatever ends it."""
    folder, run_id, times, progress = todo.folder, todo.run_id, todo.times, todo.progress
    how: _How = "finished"
    made: set[str] = set()
    try:
        with contextlib.closing(place.run(todo.each(), terms, progress)) as records:
            for record in records:
                made.add(record.cell_id)
                todo.rest()
                progress.end(record)
                times.lap("scheduling")
        todo.rest()
    except KeyboardInterrupt as error:
        how = "interrupted"
        todo.rest()
        by = f" by {error}" if isinstance(error, termination.Terminated) else ""
        progress.say(f"interrupted{by}: what was finished is kept; the report shows it")
    except BaseException:
        todo.rest()
        with contextlib.suppress(StoreError):  # what ended the run is what its user must read
            _finish(folder, run_id, "failed", times, todo.in_cells, made)
        raise
    footer = _finish(folder, run_id, how, times, todo.in_cells, made)
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


def _resolve(suite: Suite, plan: Plan, progress: Progress) -> Works:
    """Fetch every model and data set the plan names, before anything runs. Raises SuiteError for data that do not fit."""
    base = suite.path.resolve().parent
    ready: dict[str, Asset] = {}
    tasks: dict[str, tuple[Asset | None, JobTask]] = {}

    def asset(source: Source) -> Asset:
        if source.name not in ready:
            path = fetch.ensure(source, progress.fetching)
            ready[source.name] = Asset(path=str(path.absolute()), source=source, use=fetch.use(source))
        return ready[source.name]

    places = {entry.id: entry.places["items"] for entry in suite.entries}
    found: list[Problem] = []
    for name in dict.fromkeys(cell.task for cell in plan.cells):
        most, where = max(
            (c.evaluation.skip + c.evaluation.items, places[plan.ids[c.cell_id]]) for c in plan.cells if c.task == name
        )
        try:
            tasks[name] = task_assets.ready(suite.tasks[name], most, where, asset)
        except SuiteError as error:
            found += error.problems
    if found:
        raise SuiteError(list(dict.fromkeys(found)))
    return {cell.cell_id: (asset(resolve(cell.model, suite.sources, base)), *tasks[cell.task]) for cell in plan.cells}


def _old(plan: Plan, out: Path | None, resume: str | None, held: contextlib.ExitStack) -> store.Run | None:
    """Return the run to go on with, if any, locked until `held` ends.

    Refuses before anything is fetched what could not be written afterwards.
    """
    if resume is None:
        if out is not None:
            store.refuse_used(out)
        return None
    if out is not None:
        raise UsageError("a resumed run stays in its folder", where=f"--out {out}", hint="leave out --out or --resume")
    old = store.read_run(store.find_run(resume))
    expected = {cell.cell_id for cell in old.manifest.cells}
    named = naming.full(plan.cells)
    if strange := [name for cell_id, name in named.items() if cell_id not in expected]:
        raise UsageError(
            f"{len(strange)} Cells of this suite are not in that run, e.g. {strange[0]}",
            where=f"--resume {old.manifest.run}",
            hint="resume with the suite it was started with, or start a new run",
        )
    held.callback(store.RunFolder.take(old.path).release)
    return store.read_run(old.path)  # again: until now another runner may have written to it


def _reopen(
    old: store.Run,
    here: Environment,
    works: Works,
    device: str,
    progress: Progress,
    *,
    elsewhere: bool,
) -> tuple[store.RunFolder, str, set[str]]:
    """Return an old run's folder, its id, and the Cells that need not run again: same machine, code, device, data, plug-in.

    elsewhere: Cells run on many machines, of which the runner's may be none: the same software has to do.
    """
    folder = store.RunFolder(old.path)
    node.recall(old.path)  # whatever executor it goes on with
    if old.footer is None:
        why = "its footer.json cannot be read" if "footer.json" in old.broken else "it has no footer.json"
        progress.say(f"run {old.manifest.run} is incomplete: {why}; it goes on with what its Cells left")
    folder.reopen()
    doubtful = old.doubtful()
    for what in doubtful.values():
        progress.say(f"{what}: it does not count, and its Cell is measured again")
    done = {
        record.cell_id
        for record in old.latest().values()  # what report and verdict look at
        if record.status is Status.OK
        and (record.environment.software == here.software if elsewhere else record.environment.id == here.id)
        and record.environment.code_version == here.code_version
        and record.device == device
        and (record.provider is None or _is_installed(record.provider))
        and record.cell_id in works
        and record.assets == used(*works[record.cell_id])
    }
    return folder, old.manifest.run, done


def _is_installed(provider: Provider) -> bool:
    """Say whether an implementation would come from the same version of its package as then."""
    try:
        return (importlib.metadata.version(provider.distribution) or "") == provider.version
    except importlib.metadata.PackageNotFoundError:
        return provider.distribution == "unknown"


def _open(
    suite: Suite,
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
        suite_text=suite.text,
        comparisons=list(plan.comparisons),
        tuning=list(plan.tuning),
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
        print("\n".join(terminal.summary(run)))
        html.write_report([run], page)
    except BrokenPipeError:  # the reader of stdout has left; the command knows what to do
        raise
    except Exception as error:
        why = error.what if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}"
        raise HarnessError(
            f"everything was measured and is kept, but the report could not be made: {why}",
            where=str(folder.path),
            hint=f"`peft-harness report {folder.path}` tries again",
        ) from error
    print(f"report: {page}")
    return Exit.INFRASTRUCTURE if interrupted else verdict.judge(run, strict=strict).exit
