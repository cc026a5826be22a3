"""Find and read the files of lm-eval's own tasks, and save their data, so that workers need no network.

lm-eval is not imported, because its import takes seconds to index its tasks.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from harness import yaml_validation
from harness.assets import hub
from harness.assets.carrier import Progress
from harness.assets.table import Source
from harness.errors import AssetError, UsageError, closest_match
from harness.records.files import combined_sha256
from harness.records.files import sha256 as file_sha256

PREFIX = "lm-eval:"
LOCAL = ("json", "csv", "parquet", "text", "arrow")
"""Names of the loaders in `datasets` that read local files. Such files have no revision."""
_TASK = re.compile(rb"""^["']?task["']?: *["']?([\w.+-]+)["']?[ \t\r]*(?:#.*)?$""", re.MULTILINE)
_REGISTERED = re.compile(r"""^@register_filter\(["']([\w-]+)["']\)""", re.MULTILINE)
_NAME = re.compile(r"lm-eval:(?P<task>[\w.+-]+)(?::(?P<filter>[\w.+-]+))?(?:@(?P<revision>[0-9a-f]{40}))?", re.ASCII)


@dataclass(frozen=True)
class TaskFile:
    """A task of lm-eval. In a suite, its name is `lm-eval:TASK:FILTER@REVISION`, where FILTER and REVISION are optional."""

    task: str
    filter: str
    revision: str
    path: Path
    spec: dict[str, Any]
    """Content of the task's YAML file and of the files that it includes. Functions are represented by their names."""

    @property
    def splits(self) -> dict[str, str]:
        """Use of a split (`test`, and also `train` and `fewshot` if the task has them) -> name of the split."""
        spec = self.spec
        test = spec.get("test_split") or spec.get("validation_split")
        shots = spec.get("fewshot_split") or (spec.get("fewshot_config") or {}).get("split")
        named = {"test": test, "train": spec.get("training_split"), "fewshot": shots}
        return {use: str(split) for use, split in named.items() if split}

    @property
    def data_files(self) -> list[Path]:
        """The local data files that the task reads."""
        files = (self.spec.get("dataset_kwargs") or {}).get("data_files", [])
        listed = list(files.values()) if isinstance(files, dict) else [files]
        flat = [name for one in listed for name in (one if isinstance(one, list) else [one])]
        return [Path(str(name)) for name in flat]


def find(text: str, folder: Path | None = None) -> TaskFile:
    """Return the task with the name `text`, as written in a suite. Raises UsageError for an unknown name.

    folder: folder of lm-eval's tasks; if None, the folder of the installed lm-eval.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        hint = "write lm-eval:TASK[:FILTER][@COMMIT]; COMMIT has 40 hex digits"
        raise UsageError(f"`{text}` names no task of lm-eval", hint=hint)
    name, where = match["task"], folder or tasks_folder()
    path, known = _path(where, name)
    if path is None:
        close = closest_match(name, sorted(known))
        hint = f"did you mean `{close}`?" if close else "`lm-eval ls tasks` lists them"
        raise UsageError(f"lm-eval has no task `{name}`", hint=hint)
    return TaskFile(name, match["filter"] or "", match["revision"] or "", path, _read(path))


def tasks_folder() -> Path:
    """Return the folder of the tasks that come with the installed lm-eval."""
    if (package := _package()) is None:
        raise UsageError("lm-eval is not installed", hint="pip install lm-eval")
    return package / "tasks"


def _package() -> Path | None:
    found = importlib.util.find_spec("lm_eval")
    return Path(found.origin).parent if found and found.origin else None


@cache
def filter_functions() -> tuple[str, ...]:
    """Return the names of the filter functions of the installed lm-eval. If none are found, the tuple is empty."""
    files = package.glob("filters/*.py") if (package := _package()) else ()
    return tuple(sorted(name for file in files for name in _REGISTERED.findall(file.read_text(encoding="utf-8"))))


def _path(folder: Path, name: str) -> tuple[Path | None, set[str]]:
    """Find the file that defines a task. Return the file, and the names of all tasks that the search has seen.

    If no file defines the task, return None instead of a file. The search first reads the file with the task's name, then
    the files of its family, and then all files of lm-eval (about fourteen thousand).
    """
    files = _files(folder)
    known = {path.stem for path in files}
    family = re.split(r"[^a-z0-9]", name.lower())[0]
    for some in (
        (path for path in files if path.stem == name),
        (path for path in files if family in str(path)[len(str(folder)) :].lower()),
        files,
    ):
        named = _named(some)
        if name in named:
            return named[name], known
        known |= named.keys()
    return None, known


def _named(files: Iterable[Path]) -> dict[str, Path]:
    """Map the name of each task to the first of `files` that defines the task."""
    found: dict[str, Path] = {}
    for path in files:
        for name in _TASK.findall(path.read_bytes()):
            found.setdefault(name.decode(), path)
    return found


@cache
def _files(folder: Path) -> tuple[Path, ...]:
    walked = sorted((parent, sorted(names)) for parent, _, names in os.walk(folder))
    return tuple(Path(parent, name) for parent, names in walked for name in names if name.endswith((".yaml", ".yml")))


def _read(path: Path, inside: tuple[Path, ...] = ()) -> dict[str, Any]:
    own = dict(yaml_validation.load(path, tags=True).data)
    included = own.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        other = (path.parent / str(name)).resolve()
        if other in inside:
            raise UsageError("a task's file that includes itself", where=str(other), hint="correct its `include`")
        merged.update(_read(other, (*inside, path.resolve())))
    return {**merged, **own}


def write_splits(source: Source, folder: Path, progress: Progress) -> None:
    """Write each split that the task of `source` uses to the file SPLIT.parquet in `folder`."""
    import datasets
    from datasets.exceptions import DatasetsError

    task = find(source.source)
    spec = task.spec
    options = {k: v for k, v in (spec.get("dataset_kwargs") or {}).items() if k != "trust_remote_code"}
    if source.revision:
        options["revision"] = source.revision
    progress(f"{source.name}: its data", 0, None)
    datasets.disable_progress_bars()  # the runner shows its own
    folder.mkdir()
    for split in sorted(set(task.splits.values())):
        # `datasets` raises ValueError for a subset or split that the data do not have.
        with hub.hub_errors(source, DatasetsError, ValueError), _local_file_errors(source, task):
            data = datasets.load_dataset(spec["dataset_path"], spec.get("dataset_name"), split=split, **options)
            data.to_parquet(folder / f"{split}.parquet")


@contextmanager
def _local_file_errors(source: Source, task: TaskFile) -> Iterator[None]:
    """Turn errors about local data files into AssetErrors that do not mention the hub."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, ValueError, FileNotFoundError, PermissionError) as error:
        if task.spec["dataset_path"] not in LOCAL:
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        what = f"cannot read the files of {source.name}: {reason}"
        hint = f"look at its `dataset_kwargs` and at {', '.join(map(str, task.data_files))}"
        raise AssetError(what, where=str(task.path), hint=hint) from error


def count_rows(folder: Path, split: str) -> int:
    """Return the number of rows of the file SPLIT.parquet in `folder`."""
    from pyarrow.parquet import read_metadata

    try:
        return int(read_metadata(folder / f"{split}.parquet").num_rows)
    except OSError as error:
        raise AssetError(
            f"no split {split}", where=str(folder), hint="remove this folder, so that it is written again"
        ) from error


def splits_sha256(folder: Path) -> str:
    """Return one SHA-256, in hex digits, of all saved splits in a folder."""
    return combined_sha256(sorted(folder.glob("*.parquet")))


def fingerprint(source: Source) -> str:
    """Return a hash of everything that the saved data depend on: the task's file and its local data files."""
    task = find(source.source)
    files = [file_sha256(path) for path in task.data_files if path.is_file()]
    return hashlib.sha256(repr([sorted(task.spec.items()), files]).encode()).hexdigest()
