"""The command `peft-harness night`: plan within the budget, run each part (one command), and write page and verdict.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from harness import resources
from harness.assets import fetch
from harness.assets.table import load_table
from harness.bench.gpu import Gpu, find_gpu
from harness.console import print_json, print_lines, print_note
from harness.errors import Exit, UsageError, did_you_mean, plural
from harness.kernels import card_tables
from harness.process.signals import handle_termination
from harness.records import environment, store
from harness.records.files import sha256, write_atomic
from harness.regression.baseline import store as baselines
from harness.regression.night import budget, documents, page, part_run, parts, summary
from harness.regression.night.budget import Limit
from harness.regression.night.parts import Device, NightPart
from harness.regression.night.results import NightFooter, NightManifest, PartFailure, PartResult, PlannedPart
from harness.report.formatting import seconds as duration
from harness.suites import loader

PAGE = "index.html"
_ENDED = {
    "budget": "the budget was over",
    "share": "its share of the budget, {}, was over, and the rest is kept for later parts",
    "estimate": "it took too long, and was ended after {}",
}
"""`Limit.by` -> clause that says why a part was ended."""
_INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class NightRequest:
    """Options of the command `night`."""

    budget_s: float | None = None
    """Seconds for the whole nightly run. None for the default of the device."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: Path | None = None
    only: tuple[str, ...] = ()
    """Names, or prefixes of names, of the parts to run. Empty for all parts."""
    real: Path | None = None
    """File of a suite for the part `matrix-real`. If None, the suite is `sentinels`."""
    command: Sequence[str] = part_run.COMMAND
    """Command line of peft-harness, to which the arguments of a part are appended."""


@dataclass
class NightRun:
    """Plan and results of a nightly run that is running or has ended."""

    manifest: NightManifest
    folder: Path
    results: list[PartResult] = field(default_factory=list)
    interrupted: bool = False
    missing: str = ""
    """Reason why there is no GPU although one was wanted. Otherwise empty."""
    real: Path | None = None
    """File of the suite for the part `matrix-real`. None for `sentinels`."""

    @property
    def exit(self) -> Exit:
        """The exit code: the first in this list whose condition holds.

        - 1: a part has a finding, e.g. a failed check or a regression.
        - 4: the nightly run was interrupted, a part failed, or a GPU was wanted and there is none.
        - 5: nothing was measured.
        - 0: otherwise, even if there was too little time for all parts.
        """
        statuses = Counter(one.status for one in self.results)
        if statuses["finding"]:
            return Exit.FAIL
        if self.interrupted or self.missing or statuses["failed"]:
            return Exit.INFRASTRUCTURE
        measured = any(one.status == "ok" or (one.status == "cut" and one.summary) for one in self.results)
        return Exit.PASS if measured else Exit.NOTHING_COMPARED

    @property
    def baseline(self) -> str:
        """Name of the baseline for the GPU in use. Empty on a CPU, where a nightly run is only a rehearsal."""
        return baseline_name(self.manifest.card) if self.manifest.device == "cuda" else ""

    @property
    def left_out(self) -> dict[str, str]:
        """Name of a part -> reason why it was cut or not run: lack of time, or an interruption."""
        return {one.name: one.because for one in self.results if one.left_out}

    @property
    def page(self) -> Path:
        """Path of the HTML page."""
        return self.folder / PAGE

    @property
    def verdict(self) -> str:
        """Verdict in one sentence: the number of parts with each status, and whether the GPU has no baseline."""
        counts = Counter(one.status for one in self.results)
        shown = ", ".join(f"{count} {status}" for status, count in counts.items())
        return "; ".join(filter(None, [shown, self.without_baseline]))

    @property
    def without_baseline(self) -> str:
        """Clause of the verdict that says that the GPU has no baseline; empty if it has one or needs none."""
        asked = any(one.name == "baseline" for one in self.results)
        return "this card has no baseline yet" if asked and self.lacks_baseline else ""

    @property
    def lacks_baseline(self) -> bool:
        """True if the nightly run uses a GPU for which no baseline is stored."""
        return (
            bool(self.baseline and not self.missing)
            and not (baselines.BASELINES / self.baseline / "run.json").is_file()
        )


def baseline_name(card: str) -> str:
    """Return the name of the baseline of a GPU. card: name of the GPU; empty if it is unknown."""
    return f"night-{Path(card_tables.file_name(card or 'unknown GPU')).stem}"


def night(request: NightRequest, as_json: bool) -> Exit:
    """Run the parts (commands) of a nightly run, write its files, print the verdict, and return the exit code.

    Raises UsageError for a part or a suite that does not exist, and for a folder that is not empty. Raises SuiteError
    for a suite with mistakes.
    """
    began = time.monotonic()
    device: Device = "cpu" if request.device == "cpu" else "cuda"
    budget_s = budget.DEFAULT_S[device] if request.budget_s is None else request.budget_s
    gpu = find_gpu() if device == "cuda" else Gpu()
    plan = parts.on_gpu() if device == "cuda" else parts.on_cpu()
    if request.real is not None:
        if not request.real.is_file():
            hint = f"name the file of a suite; without --real, {parts.REAL} runs `{parts.REAL_SUITE}`"
            raise UsageError("there is no such file", where=f"--real {request.real}", hint=hint)
        plan = [parts.with_suite(one, request.real.absolute()) if one.name == parts.REAL else one for one in plan]
    plan = _chosen(plan, request.only, device)
    if request.real is not None and any(part.name == parts.REAL for part in plan):
        loader.load(request.real)  # a mistake in it must not wait for its part
    name = f"{store.now().replace(':', '').replace('-', '')}-night-{secrets.token_hex(3)}"
    folder = _folder(request.out or store.RUNS / name)
    manifest = NightManifest(
        night=name, device=device, card=gpu.name, budget_s=budget_s,
        parts=_planned(plan, budget_s, device, folder, baseline_name(gpu.name) if device == "cuda" else ""),
        environment=environment.describe(environment.threads()), notes=[gpu.note] if gpu.note else [],
        argv=["peft-harness", *sys.argv[1:]], started=store.now(),
    )  # fmt: skip
    store.write(folder / "night.json", manifest, new=True)
    run = NightRun(manifest, folder, missing=gpu.missing, real=request.real and request.real.absolute())
    if request.real is not None and not any(part.name == parts.REAL for part in plan):
        print_note(f"note: --real {request.real} is not used, because this night has no part {parts.REAL}")
    for note in manifest.notes:
        print_note(note)
    print_note(f"night {manifest.night}: {plural(len(plan), 'part')} within {duration(budget_s)}, into {folder}")
    if not run.missing:
        print_note(f"{run.page} is refreshed after each part")
    with handle_termination():
        try:
            for number, part in enumerate(plan):
                if run.interrupted:
                    _add(run, _not_run(run, part, _INTERRUPTED, left_out=True))
                    continue
                left = budget_s - (time.monotonic() - began) - budget.LAST_S[device]
                limit = budget.limit(part, plan[number + 1 :], left, device, budget_s)
                _add(run, _run_part(run, part, limit, left, request.command))
        except KeyboardInterrupt:  # between two parts, or a second time
            run.interrupted = True
            for part in plan[len(run.results) :]:
                _add(run, _not_run(run, part, _INTERRUPTED, left_out=True))
    _finish(run, time.monotonic() - began)
    if as_json:
        print_json(
            {
                **run.manifest.model_dump(mode="json", by_alias=True),
                "exit": int(run.exit),
                "verdict": run.verdict,
                "results": [one.model_dump(mode="json", by_alias=True) for one in run.results],
            }
        )
    else:
        print_lines(summary.lines(run))
    return run.exit


def _planned(plan: Sequence[NightPart], budget_s: float, device: Device, top: Path, baseline: str) -> list[PlannedPart]:
    runs = [[top / "parts" / p.name / "run" for p in plan[:at] if p.kind == "run"] for at in range(len(plan))]
    lines = [p.line(_filled(top, baseline, p, made)) for p, made in zip(plan, runs, strict=True)]
    return [
        PlannedPart(name=p.name, title=p.title, command=line, estimate_s=p.estimate_s, limit_s=limit_s)
        for p, line, limit_s in zip(plan, lines, budget.planned(plan, budget_s, device), strict=True)
    ]


def _chosen(plan: list[NightPart], only: Sequence[str], device: Device) -> list[NightPart]:
    names = [part.name for part in plan]
    for one in only:
        if not one or not any(name.startswith(one) for name in names):
            raise UsageError(f"no part `{one}`", where="--only", hint=_hint(one, names, device))
    chosen = {name for one in only for name in ([one] if one in names else names) if name.startswith(one)}
    return [part for part in plan if not only or part.name in chosen]


def _hint(wrong: str, names: list[str], device: Device) -> str:
    if "," in wrong:
        return f"repeat the option: {shlex.join(word for one in wrong.split(',') for word in ('--only', one.strip()))}"
    if device == "cpu" and any(one.name.startswith(wrong or " ") for one in parts.on_gpu()):
        return f"only a night on a GPU has it; a rehearsal has {', '.join(names)}"
    return did_you_mean(wrong, names, "parts")


def _folder(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("is not empty", where=f"--out {folder}", hint="name a new folder")
    try:
        (folder / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot be made: {error.strerror}", where=f"--out {folder}", hint="name another folder"
        ) from error
    return folder


def _run_part(run: NightRun, part: NightPart, limit: Limit, left_s: float, command: Sequence[str]) -> PartResult:
    """Run a part if its estimate fits into the `left_s` seconds that are left, and return its result."""
    if run.missing:
        return _not_run(run, part, run.missing)
    if part.estimate_s > left_s:
        has = f"the budget has {duration(max(0.0, left_s))} left"
        return _not_run(run, part, f"{has}, and it needs about {duration(part.estimate_s)}", left_out=True)
    if why := _lacking(run, part):
        return _not_run(run, part, why)
    folder = run.folder / "parts" / part.name
    folder.mkdir()
    words = _filled(run.folder, run.baseline, part)
    again = part.line(parts.typed(words))
    print_note(f"{part.name}: {part.title} About {duration(part.estimate_s)}, at most {duration(limit.seconds)}.")
    ended = part_run.run(words, part.variables, folder, limit.seconds, command)
    run.interrupted = ended.interrupted
    reading = documents.read(part, folder, again)
    status, because = _judged(part, ended, reading, limit)
    failures = reading.failures
    if status == "failed" and not failures:
        failures = [PartFailure(where=part.name, what=because, traceback=ended.tail, reproduce=again)]
    shown = "" if ended.cut and reading.is_missing else reading.summary
    if ended.left:
        because = "; ".join(
            filter(None, [because, f"left processes behind, which were killed: {', '.join(ended.left)}"])
        )
    return PartResult(
        name=part.name, title=part.title, status=status, because=because, command=part.line(words),
        estimate_s=part.estimate_s, seconds=ended.seconds, cpu_s=ended.cpu_s, limit_s=limit.seconds,
        left_out=ended.interrupted or (ended.cut and limit.by != "estimate"),
        exit_code=ended.code, summary=shown, table=reading.table, failures=failures,
        files=_files(run.folder, folder),
    )  # fmt: skip


def _judged(
    part: NightPart, ended: part_run.CommandEnd, reading: documents.PartReading, limit: Limit
) -> tuple[Literal["ok", "finding", "failed", "cut", "not-run"], str]:
    """Return (status of a part, reason for the status)."""
    cut = _ENDED[limit.by].format(duration(limit.seconds)) if ended.cut else ""
    cut = _INTERRUPTED if ended.interrupted else cut
    if reading.wrong:  # also in what a part has measured before it was cut
        return "finding", "; ".join(filter(None, [reading.wrong, cut]))
    if cut:
        kept = "what it had measured is kept" if reading.summary and not reading.is_missing else "nothing was measured"
        return "failed" if limit.by == "estimate" and not ended.interrupted else "cut", f"{cut}; {kept}"
    if ended.died:
        return "failed", ended.died
    if reading.is_missing and ended.code in (Exit.PASS, Exit.FAIL, Exit.INCONCLUSIVE):
        return "failed", reading.summary or "its document cannot be read"
    if ended.code == Exit.FAIL and part.kind in ("claims", "run"):
        return "ok", ""
    if part.kind == "run" and any(one.where == documents.NO_CELL for one in reading.failures):
        return "failed", documents.NO_CELL
    if ended.code in (Exit.PASS, Exit.INCONCLUSIVE):
        return "ok", ""
    if ended.code == Exit.FAIL:
        return "finding", reading.summary
    if ended.code == Exit.NOTHING_COMPARED:
        return "not-run", "nothing was compared"
    return "failed", f"exit code {ended.code}: {_last_line(ended.tail)}"


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def _filled(top: Path, baseline: str, part: NightPart, made: Sequence[Path] | None = None) -> list[str]:
    """Return the arguments of a part with its placeholders replaced.

    top: folder of the nightly run. baseline: name of the GPU's baseline. It is empty for a CPU, where the run `matrix`
    is compared with itself. made: folders of runs for the placeholder `RUNS`; by default, all finished runs of the
    nightly run.
    """
    made = sorted(path.parent for path in top.glob("parts/*/run/footer.json")) if made is None else sorted(made)
    runs = [word for path in made for word in ("--run", str(path))]
    out, matrix = str(top / "parts" / part.name), str(top / "parts" / "matrix" / "run")
    single = {parts.MATRIX: matrix, parts.CARD: baseline or matrix}
    words: list[str] = []
    for word in part.words:
        words += runs if word == parts.RUNS else [single.get(word, word).replace(parts.OUT, out)]
    return words


def _lacking(run: NightRun, part: NightPart) -> str:
    """Return what a part needs and does not have. If it can run, return an empty string."""
    if part.kind == "pairs":
        return "" if find_spec("scipy") else "scipy, which judges pairs, is not installed"
    if part.kind == "claims" and not any(run.folder.glob(f"parts/{parts.HEADLINE}*/run/footer.json")):
        return "no headline run of this night has finished"  # the claims would judge published runs instead
    return _no_baseline(run) if part.kind == "baseline" else _no_model(part)


def _no_baseline(run: NightRun) -> str:
    """Return the reason why the matrix cannot be compared with a baseline. If it can, return an empty string."""
    if not (run.folder / "parts" / "matrix" / "run" / "footer.json").is_file():
        return "the part `matrix` has left no finished run"
    return f"there is no baseline `{run.baseline}` yet" if run.lacks_baseline else ""


def _no_model(part: NightPart) -> str:
    """Return which assets of the suite `sentinels` this machine lacks, so that the part cannot run.

    A nightly run downloads nothing. If no asset is missing, or the part has another suite, return an empty string.
    """
    if parts.REAL_SUITE not in part.words:
        return ""
    table = load_table(resources.data_folder("suites") / "sources.yaml")
    missing = [name for name in parts.REAL_SOURCES if not fetch.is_local(table[name])]
    return f"not on this machine: {', '.join(missing)}" if missing else ""


def _files(top: Path, folder: Path) -> list[str]:
    found = [folder / "check.html", folder / "claims.html", folder / "run" / "report.html", folder / "log.txt"]
    return [path.relative_to(top).as_posix() for path in found if path.is_file()]


def _not_run(run: NightRun, part: NightPart, because: str, *, left_out: bool = False) -> PartResult:
    return PartResult(
        name=part.name,
        title=part.title,
        status="not-run",
        because=because,
        command=part.line(_filled(run.folder, run.baseline, part)),
        estimate_s=part.estimate_s,
        left_out=left_out,
    )


def _add(run: NightRun, result: PartResult) -> None:
    """Add the result of a part to `run`, print it, and write it to disk. If the part was started, rewrite the page.

    So the page exists even if the nightly run is killed later.
    """
    run.results.append(result)
    store.write(run.folder / "parts" / f"{result.name}.json", result)
    took = f" in {duration(result.seconds)}" if result.seconds is not None else ""
    if not run.missing:
        print_note(f"{result.name}: {result.status}{took}{f': {result.because}' if result.because else ''}")
    if result.seconds is not None:
        with contextlib.suppress(OSError):
            _write_page(run)


def _write_page(run: NightRun) -> None:
    planned = {one.name for one in run.results}
    waiting = [one for one in run.manifest.parts if one.name not in planned]
    write_atomic(run.page, page.render(run, waiting).encode(errors="backslashreplace"))


def _finish(run: NightRun, took_s: float) -> None:
    files = sorted((run.folder / "parts").glob("*.json"))
    footer = NightFooter(
        night=run.manifest.night, ended=store.now(), how="interrupted" if run.interrupted else "finished",
        exit=int(run.exit), verdict=run.verdict, seconds=took_s, counts=dict(Counter(one.status for one in run.results)),
        left_out=run.left_out,
        sha256={file.name: sha256(file) for file in [run.folder / "night.json", *files]},
    )  # fmt: skip
    store.write(run.folder / "footer.json", footer)
    _write_page(run)
