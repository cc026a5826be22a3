"""Save the data of lm-eval's own tasks, a parquet file per split, so that workers need no network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.assets import hub, lm_eval_files
from harness.assets.carrier import Progress
from harness.assets.table import Source
from harness.errors import AssetError
from harness.records.files import combined_sha256
from harness.records.files import sha256 as file_sha256


def write(source: Source, folder: Path, progress: Progress) -> None:
    """Write the splits that the task of `source` uses as SPLIT.parquet."""
    import datasets
    from datasets.exceptions import DatasetsError

    task = lm_eval_files.find(source.source)
    spec = task.spec
    options = {k: v for k, v in (spec.get("dataset_kwargs") or {}).items() if k != "trust_remote_code"}
    if source.revision:
        options["revision"] = source.revision
    progress(f"{source.name}: its data", 0, None)
    datasets.disable_progress_bars()  # the runner has its own
    folder.mkdir()
    for split in sorted(set(task.splits.values())):
        # ValueError: a subset or split that the data do not have.
        with hub.hub_errors(source, DatasetsError, ValueError), _local_file_errors(source, task):
            data = datasets.load_dataset(spec["dataset_path"], spec.get("dataset_name"), split=split, **options)
            data.to_parquet(folder / f"{split}.parquet")


@contextmanager
def _local_file_errors(source: Source, task: lm_eval_files.TaskFile) -> Iterator[None]:
    """Raise errors about local data files as AssetErrors that do not mention the hub."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, ValueError, FileNotFoundError, PermissionError) as error:
        if task.spec["dataset_path"] not in lm_eval_files.LOCAL:
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise AssetError(
            f"cannot read the files of {source.name}: {reason}",
            where=str(task.path),
            hint=f"look at its `dataset_kwargs` and at {', '.join(map(str, task.data_files))}",
        ) from error


def count(folder: Path, split: str) -> int:
    """Return the number of rows of a split."""
    from pyarrow.parquet import read_metadata

    try:
        return int(read_metadata(folder / f"{split}.parquet").num_rows)
    except OSError as error:
        raise AssetError(
            f"no split {split}", where=str(folder), hint="remove this folder, so that it is written again"
        ) from error


def sha256(folder: Path) -> str:
    """Return one hash over all splits."""
    return combined_sha256(sorted(folder.glob("*.parquet")))


def fingerprint(source: Source) -> str:
    """Return a hash over the task's file and its local data files, on which the data depend."""
    task = lm_eval_files.find(source.source)
    files = [file_sha256(path) for path in task.data_files if path.is_file()]
    return hashlib.sha256(repr([sorted(task.spec.items()), files]).encode()).hexdigest()
