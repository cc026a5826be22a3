"""The data of lm-eval's own tasks: each split one parquet file, as `datasets` gave it, so that workers need no network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.assets import hub, lm_eval_files
from harness.assets.carrier import Progress
from harness.assets.carrier import sha256 as file_sha256
from harness.assets.table import Source
from harness.errors import AssetError


def write(source: Source, folder: Path, progress: Progress) -> None:
    """Write the splits that the task of `source` uses as SPLIT.parquet."""
    import datasets
    from datasets.exceptions import DatasetsError

    named = lm_eval_files.find(source.source)
    said = named.spec
    options = {k: v for k, v in (said.get("dataset_kwargs") or {}).items() if k != "trust_remote_code"}
    if source.revision:
        options["revision"] = source.revision
    progress(f"{source.name}: its data", 0, None)
    datasets.disable_progress_bars()  # the runner has its own
    folder.mkdir()
    for split in sorted(set(named.splits.values())):
        # ValueError: a subset or split that the data do not have.
        with hub.hub_errors(source, DatasetsError, ValueError), _local_explained(source, named):
            data = datasets.load_dataset(said["dataset_path"], said.get("dataset_name"), split=split, **options)
            data.to_parquet(folder / f"{split}.parquet")


@contextmanager
def _local_explained(source: Source, named: lm_eval_files.TaskFile) -> Iterator[None]:
    """Turn what is raised for files on this machine into an AssetError: the hub has no part in it. A full disk is none."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, ValueError, FileNotFoundError, PermissionError) as error:
        if named.spec["dataset_path"] not in lm_eval_files.LOCAL:
            raise
        said = str(error).partition("\n")[0] or type(error).__name__
        raise AssetError(
            f"cannot read the files of {source.name}: {said}",
            where=str(named.path),
            hint=f"look at its `dataset_kwargs` and at {', '.join(map(str, named.data_files))}",
        ) from error


def count(folder: Path, split: str) -> int:
    """Return how many rows a split has."""
    from pyarrow.parquet import read_metadata

    try:
        return int(read_metadata(folder / f"{split}.parquet").num_rows)
    except OSError as error:
        raise AssetError(
            f"no split {split}", where=str(folder), hint="remove this folder: it is then made anew"
        ) from error


def sha256(folder: Path) -> str:
    """Return one hash over the names and the hashes of all splits."""
    files = sorted(folder.glob("*.parquet"))
    return hashlib.sha256("".join(f"{path.name} {file_sha256(path)}\n" for path in files).encode()).hexdigest()


def fingerprint(source: Source) -> str:
    """Return what the data depend on beside the source's own words: the task's file, and the local files that it names."""
    named = lm_eval_files.find(source.source)
    files = [file_sha256(path) for path in named.data_files if path.is_file()]
    return hashlib.sha256(repr([sorted(named.spec.items()), files]).encode()).hexdigest()
