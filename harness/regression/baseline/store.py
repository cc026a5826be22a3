"""Baselines on disk: each is a folder results/baselines/NAME, to be committed to git.

The folder holds unchanged copies of run.json, footer.json and cells/, so that the hashes in the footer still hold.
baseline.json names the origin of the baseline. The logs and the HTML page of the run are not copied.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from harness.analysis import failed_checks
from harness.errors import Problem, RefusedError, StoreError, UsageError, did_you_mean, first_names, plural
from harness.records import naming, store
from harness.records.base_model import FrozenModel
from harness.records.record import SCHEMA, Status
from harness.records.store import Run
from harness.regression import git

BASELINES = Path("results") / "baselines"
PROVENANCE = "baseline.json"
_OF_A_RUN = re.compile(r"run\.json|cells/[0-9a-f]+\.\d+\.json")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)


class Provenance(FrozenModel):
    """Content of baseline.json: the origin of a baseline, its author, and the reason for it."""

    schema_: int = Field(default=SCHEMA, alias="schema")
    name: str
    run: str
    suite: str
    code_versions: list[str]
    """Code versions of the Records, the most frequent first."""
    git_shas: list[str]
    author: str
    promoted: str
    """Time when the run became a baseline: UTC, ISO 8601."""
    reason: str
    replaces: str = ""
    """Id of the run that was the baseline of this name before. Empty if the name was new."""


@dataclass(frozen=True)
class Baseline:
    """A baseline on disk: a run in results/baselines, or any other run folder that is used as a baseline."""

    name: str
    path: Path
    provenance: Provenance | None
    """Content of baseline.json. None if the file is missing or cannot be read."""
    why: str = ""
    """Reason why `provenance` is None. Otherwise empty."""

    @property
    def origin(self) -> str:
        """Origin, author and reason of the baseline, in words."""
        p = self.provenance
        if p is None:
            return f"of unknown origin ({self.why})"
        code = ", ".join(p.git_shas[:1] or p.code_versions[:1])[:12]
        return f"run {p.run} at {code or 'unknown code'}, promoted {p.promoted} by {p.author}: {p.reason}"

    def document(self) -> dict[str, Any]:
        """Return the baseline and its provenance for JSON."""
        provenance = self.provenance.model_dump(mode="json", by_alias=True) if self.provenance else {}
        return {"name": self.name, "path": str(self.path), "why": self.why, **provenance}


def known(baselines: Path = BASELINES) -> list[Baseline]:
    """Return all baselines, sorted by name."""
    return [_read(path.parent) for path in sorted(baselines.glob("[!.]*/run.json"))]


def find(name: str, baselines: Path = BASELINES) -> Baseline:
    """Return the baseline with this name, or the run in this folder as a baseline.

    name: name of a baseline, or, if it contains a slash, path of a run folder. Raises UsageError if `name` matches
    neither.
    """
    if _NAME.fullmatch(name) and (baselines / name / "run.json").is_file():
        return _read(baselines / name)
    if os.sep in name:
        if not (Path(name) / "run.json").is_file():
            hint = "name the folder of a run, or a baseline of `peft-harness baseline list`"
            raise UsageError("is no run: it has no run.json", where=name, hint=hint)
        is_promoted = (Path(name) / PROVENANCE).is_file()
        return _read(Path(name)) if is_promoted else Baseline(Path(name).name, Path(name), None, "it was not promoted")
    names = [baseline.name for baseline in known(baselines)]
    hint = "`peft-harness baseline promote RUN NAME --reason ...` makes one"
    hint = did_you_mean(name, names, "there are") if names else hint
    raise UsageError(f"no baseline `{name}`", where=str(baselines), hint=hint)


def promote(
    run: Run, name: str, *, reason: str, author: str = "", replace: bool = False, baselines: Path = BASELINES
) -> Baseline:
    """Copy a run atomically to the baseline `name`, and return the baseline.

    Raises RefusedError if the run is unfit to be a baseline, the name is invalid or taken, or the reason is empty.
    Raises StoreError if files cannot be written.
    """
    target = baselines / name
    problems = [*_misnamed(name, reason), *_taken(target, replace), *unfit(run)]
    if problems:
        raise RefusedError(str(run.path), problems)
    versions = Counter(record.environment.code_version for record in run.records)
    shas = Counter(record.environment.git_sha for record in run.records if record.environment.git_sha)
    old = _read(target).provenance if target.exists() else None
    provenance = Provenance(
        schema=SCHEMA, name=name, run=run.manifest.run, suite=run.manifest.suite,
        code_versions=[version for version, _ in versions.most_common()], git_shas=[sha for sha, _ in shas.most_common()],
        author=author.strip() or _author(), promoted=store.now(), reason=reason.strip(), replaces=old.run if old else "",
    )  # fmt: skip
    sealed = run.footer.sha256 if run.footer else {}
    try:
        _copy(run.path, [*sealed, "footer.json"], target, provenance)
    except OSError as error:
        hint = f"make room and see that {baselines} can be written; nothing was promoted"
        raise StoreError(f"cannot write: {error.strerror}", where=str(target), hint=hint) from error
    return Baseline(name, target, provenance)


def _misnamed(name: str, reason: str) -> Iterator[Problem]:
    if not _NAME.fullmatch(name) or name.endswith("."):
        hint = "letters, digits, `.`, `_` and `-`, e.g. quick-cpu"
        yield Problem("NAME", f"{name!r} cannot be the name of a folder", hint)
    if not reason.strip():
        yield Problem("--reason", "is empty", "give the reason why later runs are compared with this one")


def _taken(target: Path, replace: bool) -> Iterator[Problem]:
    if target.exists() and not replace:
        yield Problem(str(target), "a baseline of this name exists", "choose another name, or --replace it")


def unfit(run: Run) -> Iterator[Problem]:
    """Yield the reasons why a run cannot be a baseline."""
    again = "run the suite again, in a tree without uncommitted changes"
    latest, names = run.latest(), naming.full(run.manifest.cells)
    if run.footer is None:
        yield Problem("footer.json", "is missing or cannot be read: the run is incomplete", "finish it with --resume")
    elif run.footer.how != "finished":
        yield Problem("footer.json", f"the run was {run.footer.how}", "finish it with --resume")
    elif not run.footer.sha256:
        what = "holds no hashes, so a changed Record would not be detected"
        yield Problem("footer.json", what, "run the suite again")
    if missing := run.missing():
        what = f"{plural(len(missing), 'Cell')} without any Record: {first_names([names[i] for i in missing])}"
        yield Problem("run.json", what, "finish it with --resume")
    for file, why in run.broken.items():
        if file != "footer.json":
            yield Problem(f"cells/{file}", why, "move the file away and --resume the run")
    for file, what in (run.changed | run.ungated).items():
        yield Problem(file, what, "restore the file of the run, or run the suite again")
    for file in run.footer.sha256 if run.footer else ():
        if not _OF_A_RUN.fullmatch(file):
            yield Problem("footer.json", f"names {file!r}, which is no file of a run", "run the suite again")
    environments = [run.manifest.environment, *(record.environment for record in run.records)]
    if dirty := sum(e.git_dirty is True for e in environments[1:]):
        yield Problem("cells/", f"{dirty} of {len(run.records)} Records made from uncommitted changes", again)
    elif environments[0].git_dirty:
        yield Problem("run.json", "the run was started from uncommitted changes", again)
    ended = [r for r in latest.values() if r.status is not Status.OK]
    # A later attempt does not undo a failed check: otherwise a user could rerun until it passes.
    red = [r for r in run.records if failed_checks.nonconforming(r) and r not in ended]
    for record in [*ended, *red]:
        failed = ", ".join(c.check for c in failed_checks.failed(record))
        status = f"{names.get(record.cell_id, record.cell_id)} is {record.status.value}"
        why = f"{failed} failed" if failed else record.because
        yield Problem(f"cells/{record.id}.json", f"{status}: {why}" if why else status, _hint(record.status))


def _hint(status: Status) -> str:
    if status is Status.OK or status.departs:
        return "fix what the check found, and run the suite again"
    return "leave the Cell out (--only) and run again, or --resume where it can be measured"


def _copy(run: Path, files: Iterable[str], target: Path, provenance: Provenance) -> None:
    """Copy `files` from the folder of a run to a new folder, then put the new folder in the place of `target`.

    The names of temporary folders start with a dot.
    """
    fresh = target.with_name(f".{target.name}.{os.getpid()}.new")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        (fresh / "cells").mkdir(parents=True)
        for name in files:
            shutil.copyfile(run / name, fresh / name)
        store.write(fresh / PROVENANCE, provenance)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _read(path: Path) -> Baseline:
    try:
        found = Provenance.model_validate_json((path / PROVENANCE).read_bytes())
    except (OSError, ValidationError) as error:
        why = error.strerror if isinstance(error, OSError) else " ".join(str(error).splitlines()[:3])
        return Baseline(path.name, path, None, f"{PROVENANCE}: {why}")
    return Baseline(path.name, path, found)


def _author() -> str:
    """Return git's user, or the name of the account if git has no user."""
    try:
        return git.user() or getpass.getuser()
    except (OSError, KeyError):  # this user has no account name, as in some containers
        return f"uid {os.getuid()}"
