"""Make a whole run: read the suite, fetch assets, write run.json, run the Cells, write footer.json and the report."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import harness
from harness.analysis.comparison.reproducibility import possible_reruns
from harness.analysis.run_facts import analyse
from harness.assets import fetch
from harness.assets.table import Source, resolve
from harness.cell import gate_key
from harness.cell.job import Asset, ImportedAdapter, Job, JobTask, used
from harness.console import print_lines
from harness.errors import Exit, HarnessError, Problem, StoreError, SuiteError, UsageError
from harness.process import signals
from harness.records import environment, naming, store
from harness.records.manifest import Footer, Manifest
from harness.records.record import ADAPTER_SHA256, Cell, Environment, Provider, Record, Status
from harness.report import html, terminal
from harness.runner import cell_environments, executors, task_assets
from harness.runner.attempt import RunContext
from harness.runner.cell_environments import CellEnvironment
from harness.runner.executors.executor import Device, Executor
from harness.runner.executors.local import Local
from harness.runner.progress import Progress
from harness.runner.shared_gates import SharedGates
from harness.suites import loader, model_checks
from harness.suites.expand import Plan, select
from harness.suites.suite import Suite

DEFAULT_TIMEOUT_S = 3600.0
_IN_CELLS = "cells"
"""Key of `_Times.seconds` for the time in which Cells run."""

_How = Literal["finished", "interrupted", "failed"]
CellAssets = dict[str, tuple[Asset, Asset | None, JobTask]]
"""cell_id -> model, data and task of the Cell. Their files are on this machine."""


class _Times:
    """A stopwatch that measures how long each activity of a run takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        """Name of an activity, e.g. `fetch` -> seconds that it has taken so far."""
        self._lap = time.monotonic()

    def lap(self, activity: str) -> None:
        """Add the seconds since the previous call of this method to the total of `activity`."""
        now = time.monotonic()
        self.seconds[activity] += now - self._lap
        self._lap = now


@signals.handle_termination()
def run_suite(
    suite_name: str | Suite,
    *,
    out: Path | None = None,
    only: str | None = None,
    resume: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    timeout: float = DEFAULT_TIMEOUT_S,
    strict: bool = False,
    executor: Executor | None = None,
    imported: ImportedAdapter | None = None,
    own_gates: bool = False,
) -> Exit:
    """Run a suite, write its report, print the summary on stdout, and return the exit code.

    suite_name: name or path, or the suite itself. out: folder of a new run. only: expression that selects Cells.
    resume: folder or id of a run to complete. timeout: seconds for each Cell. strict: if true, an undecided comparison
    gives the exit code INCONCLUSIVE. executor: runs the Cells. By default, they run one at a time on this machine.
    imported: a finished adapter, loaded by the Cells with the key `ADAPTER_SHA256` in their config. own_gates: if true,
    every Cell runs its own parity gate; if false, a Cell may reuse the gate of an earlier Cell.
    """
    times = _Times()
    suite = suite_name if isinstance(suite_name, Suite) else loader.load(suite_name)
    plan = suite.plan if only is None else select(suite.plan, only)
    here = environment.describe(environment.threads())
    with contextlib.ExitStack() as stack:
        old = _find_old(plan, out, resume, stack)
        model_checks.check_models(suite, plan)
        entered = stack.enter_context(executor or Local())
        chosen = entered.device(device)
        times.lap("startup")
        progress = Progress(plan.cells)
        stack.callback(progress.close)
        assets = _fetch(suite, plan, progress)
        homes = cell_environments.ensure(plan.cells, progress.print)
        model_checks.check_models(suite, plan)  # again, since all models are on this machine now
        times.lap("fetch")
        gates = SharedGates(own=own_gates)
        if old:
            folder, run_id, done = _reopen(old, here, homes, assets, chosen, progress, is_remote=entered.is_remote)
        else:
            folder, run_id, done = _open(suite, plan, here, out, progress, stack)
        times.lap("scheduling")
        with _note_folder_on_errors(folder):
            servers = cell_environments.server_pythons(plan.cells)
            session = _Session(
                plan, assets, homes, servers, done, folder, run_id, chosen, times, progress, imported, gates
            )
            run = _measure(session, entered, RunContext(folder, here, timeout, lambda: times.lap("imports")))
            progress.close()
            return _report(run, strict=strict)


@dataclass
class _Session:
    """The plan, the assets and the stopwatch of one invocation of `run`."""

    plan: Plan
    assets: CellAssets
    homes: Mapping[str, CellEnvironment]
    servers: Mapping[str, str]
    """Name of a model server -> path of its interpreter. A server without an environment of its own is left out."""
    done: set[str]
    """Ids of the Cells that need not run again, because a resumed run has their Records."""
    folder: store.RunFolder
    run_id: str
    device: Device
    times: _Times
    progress: Progress
    imported: ImportedAdapter | None
    """A finished adapter, loaded by the Cells with the key `ADAPTER_SHA256` in their config. None if no adapter is
    imported."""
    gates: SharedGates

    def jobs(self) -> Iterator[Job]:
        """Yield one job per Cell that is not done. The executor takes a job only when it can run another Cell.

        The order is the plan's, except that a Cell lets later ones go first while another Cell runs the parity gate that it
        could reuse.
        """
        last_attempts = self.folder.last_attempts()
        for cell in self.gates.in_order(self.plan.cells, lambda cell: _gate_key(self.assets, cell, self.device)):
            self.times.lap(_IN_CELLS)
            if cell.cell_id in self.done:
                self.progress.resumed(cell)
                self.times.lap("scheduling")
                continue
            attempt = last_attempts.get(cell.cell_id, 0) + 1
            model, data, task = self.assets[cell.cell_id]
            job = Job(
                run=self.run_id, folder=str(self.folder.path.resolve()), attempt=attempt, cell=cell,
                model=model, data=data, task=task, device=self.device,
                python=self.homes[cell.environment].python if cell.environment else "",
                server_python=self.servers.get(cell.serve, ""),
                imported=self.imported if ADAPTER_SHA256 in cell.config else None,
            )  # fmt: skip
            job = job.model_copy(update={"known_gate": self.gates.known(job)})
            self.times.lap("scheduling")
            yield job


def _measure(session: _Session, executor: Executor, context: RunContext) -> store.Run:
    """Run the Cells that are not done, and write footer.json, even after an error. Return the run as it is on disk."""
    progress = session.progress
    how: _How = "finished"
    measured: set[str] = set()
    try:
        with contextlib.closing(executor.run(session.jobs(), context, progress)) as records:
            for record in records:
                measured.add(record.cell_id)
                session.gates.add(_gate_key(session.assets, record.cell, session.device), record)
                session.times.lap(_IN_CELLS)
                progress.end(record)
                session.times.lap("scheduling")
    except KeyboardInterrupt as error:
        how = "interrupted"
        by = f" by {error}" if isinstance(error, signals.Terminated) else ""
        progress.print(f"interrupted{by}: finished Cells are saved, and the report shows them")
    except BaseException:
        with contextlib.suppress(StoreError):  # the user must read the error that ended the run
            _finish(session, "failed", measured)
        raise
    run, footer = _finish(session, how, measured)
    if footer.kept:
        total = sum(record.duration_s for record in run.latest().values())
        progress.print(
            f"this resumed part took {footer.seconds_total:.1f} s; the Cells of the whole run took {total:.1f} s, "
            f"{footer.kept} of them were measured earlier"
        )
    return run


def _gate_key(assets: CellAssets, cell: Cell, device: Device) -> str:
    """Return the key of the parity gate of a Cell. Empty if the Cell is not in `assets` or never shares its gate."""
    if cell.cell_id not in assets:
        return ""
    model, _, task = assets[cell.cell_id]
    return gate_key.of_cell(cell, model, task, device)


@contextlib.contextmanager
def _note_folder_on_errors(folder: store.RunFolder) -> Iterator[None]:
    """Add a note to every error that is raised inside the context. The note names the folder of the finished Cells."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"finished Cells are saved in {folder.path}; `peft-harness report {folder.path}` shows them")
        raise


def _fetch(suite: Suite, plan: Plan, progress: Progress) -> CellAssets:
    """Fetch every model and data set of the plan, and return the assets of each Cell.

    Raises SuiteError for data that do not fit their task.
    """
    base = suite.path.resolve().parent
    ready: dict[str, Asset] = {}
    tasks: dict[str, tuple[Asset | None, JobTask]] = {}

    def asset(source: Source) -> Asset:
        if source.name not in ready:
            path = fetch.ensure(source, progress.fetching)
            ready[source.name] = Asset(path=str(path.absolute()), source=source, use=fetch.asset_use(source))
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


def _find_old(plan: Plan, out: Path | None, resume: str | None, stack: contextlib.ExitStack) -> Path | None:
    """Return the folder of the run to resume. If this is a new run, return None.

    The folder is locked until `stack` ends, and Cells that an earlier runner left running are stopped. Raises
    UsageError or StoreError if the folder cannot be used.
    """
    if resume is None:
        if out is not None:
            store.refuse_used(out)
        return None
    if out is not None:
        raise UsageError("a resumed run stays in its folder", where=f"--out {out}", hint="leave out --out or --resume")
    path = store.find_run(resume)
    manifest = store.read_manifest(path)
    expected = {cell.cell_id for cell in manifest.cells}
    named = naming.full(plan.cells)
    if unknown := [name for cell_id, name in named.items() if cell_id not in expected]:
        what = f"{len(unknown)} Cells of this suite are not in that run, e.g. {unknown[0]}"
        hint = "resume with the suite it was started with, or start a new run"
        raise UsageError(what, where=f"--resume {manifest.run}", hint=hint)
    stack.callback(store.RunFolder.take(path).release)
    executors.end_orphans(path)  # they end while models are fetched, and their last Records count
    return path


def _reopen(
    path: Path, here: Environment, homes: Mapping[str, CellEnvironment], assets: CellAssets, device: str,
    progress: Progress, *, is_remote: bool,
) -> tuple[store.RunFolder, str, set[str]]:  # fmt: skip
    """Prepare an old run for new Records. Return its folder, its id, and the ids of the Cells that need not run again.

    A Cell need not run again if its newest Record is `ok` and was made under the same conditions: machine, code,
    device, data and plug-in. homes: name of an environment -> environment. is_remote: whether the Cells run on other
    machines. Then the software must be the same, but the machine may differ.
    """
    # Another runner, or the Cells that it left running, may have written until now.
    folder, old = store.RunFolder(path), store.read_run(path)
    if old.footer is None:
        why = "its footer.json cannot be read" if "footer.json" in old.broken else "it has no footer.json"
        progress.print(f"run {old.manifest.run} is incomplete: {why}; it is resumed from its Cells' Records")
    folder.reopen()
    for problem in old.doubtful().values():
        progress.print(f"{problem}: it does not count, and its Cell is measured again")
    done = {
        record.cell_id
        for record in old.latest().values()  # the report and the verdict use the same Records
        if record.status is Status.OK
        and record.cell_id in assets
        and _is_of(record, homes[name].described if (name := record.cell.environment) else here, is_remote=is_remote)
        and record.device == device
        and (record.provider is None or name or _is_installed(record.provider))
        and record.assets == used(*assets[record.cell_id])
    }
    return folder, old.manifest.run, done


def _is_of(record: Record, here: Environment, *, is_remote: bool) -> bool:
    """Return whether a Record was made with the software and code of `here`, and on the same machine.

    is_remote: if true, the machine may differ.
    """
    there = record.environment
    same = there.software == here.software if is_remote else there.id == here.id
    return same and there.code_version == here.code_version


def _is_installed(provider: Provider) -> bool:
    """Return whether the package of an implementation is unknown, or installed here in the recorded version."""
    try:
        return (importlib.metadata.version(provider.distribution) or "") == provider.version
    except importlib.metadata.PackageNotFoundError:
        return provider.distribution == "unknown"


def _open(
    suite: Suite, plan: Plan, here: Environment, out: Path | None, progress: Progress, stack: contextlib.ExitStack
) -> tuple[store.RunFolder, str, set[str]]:
    """Make the folder of a new run. Return the folder, the run's id, and an empty set, since no Cell is done.

    The folder is locked until `stack` ends.
    """
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
    stack.callback(folder.release)
    progress.print(f"run {run_id}: {len(plan.cells)} Cells into {folder.path}")
    return folder, run_id, set()


def _finish(session: _Session, how: _How, measured: set[str]) -> tuple[store.Run, Footer]:
    """Read the run from its folder and write its footer.json. Return the run and the footer.

    measured: ids of the Cells that this invocation measured.
    """
    session.times.lap(_IN_CELLS)
    run = store.read_run(session.folder.path)
    session.times.lap("scheduling")
    seconds = session.times.seconds
    footer = Footer(
        run=session.run_id,
        ended=store.now(),
        how=how,
        counts=dict(Counter(record.status.value for record in run.latest().values())),
        missing=run.missing(),
        kept=len(run.latest().keys() - measured),
        seconds_total=sum(seconds.values()),
        seconds_in_cells=seconds[_IN_CELLS],
        seconds_outside={activity: spent for activity, spent in seconds.items() if activity != _IN_CELLS},
    )
    return session.folder.close(run, footer), footer


def _report(run: store.Run, *, strict: bool) -> Exit:
    facts, page = analyse(run), run.path / "report.html"
    try:
        print_lines(terminal.summary(facts))
        html.write_report([facts], page, possible_reruns([run]))
    except Exception as error:
        why = error.what if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}"
        what = f"all Cells are measured and saved, but making the report failed: {why}"
        raise HarnessError(what, where=str(run.path), hint=f"`peft-harness report {run.path}` tries again") from error
    print_lines([f"report: {page}"])
    interrupted = run.footer is not None and run.footer.how == "interrupted"
    return Exit.INFRASTRUCTURE if interrupted else facts.verdict.exit_code(strict=strict)
