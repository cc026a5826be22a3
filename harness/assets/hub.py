"""Fetch repositories of the Hugging Face hub at a pinned commit into the hub's own cache.

If HF_HUB_OFFLINE is set, nothing is fetched.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.assets.carrier import Progress
from harness.assets.table import Source
from harness.errors import AssetError

# Files that transformers loads from the top folder. No code: no pickled weights, no Python files.
_WANTED = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors"]
_NESTED = ["*/*"]


def snapshot(source: Source, progress: Progress, local_only: bool = False) -> Path:
    """Return the folder of a model repository in the hub's cache.

    Missing files are fetched first, unless `local_only` is set.
    """
    import huggingface_hub

    with hub_errors(source):
        folder = huggingface_hub.snapshot_download(
            source.address,
            revision=source.revision,
            allow_patterns=_WANTED,
            ignore_patterns=_NESTED,
            tqdm_class=_bar(f"{source.name}: from the hub", progress),
            local_files_only=local_only,
        )
    return Path(folder)


def write_rows(source: Source, path: Path, progress: Progress) -> None:
    """Write one split of a data repository as jsonl, with the keys that `harness.assets.rows` reads."""
    import datasets
    from datasets.exceptions import DatasetsError

    assert source.rows is not None  # noqa: S101  # data have rows, by Source
    rows = source.rows
    progress(f"{source.name}: from the hub", 0, None)
    # `datasets` raises ValueError for a subset or split that the repository does not have.
    with hub_errors(source, DatasetsError, ValueError):
        data = datasets.load_dataset(source.address, rows.subset or None, split=rows.split, revision=source.revision)
    missing = set(rows.columns.values()) - set(data.column_names)
    if missing:
        hint = f"correct rows in the table; the columns are {', '.join(data.column_names)}"
        raise AssetError(f"{source.name} has no column {', '.join(sorted(missing))}", where=_where(source), hint=hint)
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(data, 1):
            record = {"id": str(row.get(rows.id, number)), **{name: row[c] for name, c in rows.columns.items()}}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


@contextmanager
def hub_errors(source: Source, *refusals: type[Exception]) -> Iterator[None]:
    """Turn errors of the hub's client libraries into AssetErrors.

    refusals: further types of errors that do not come from the network, e.g. an unknown subset.
    """
    import huggingface_hub.errors as hub
    from huggingface_hub import constants

    # This base class is httpx's HTTPError. The client raises it for errors of a proxy or a broken connection.
    http_error = hub.HfHubHTTPError.__bases__[0]
    unreachable: tuple[type[Exception], ...] = (hub.LocalEntryNotFoundError, ConnectionError, http_error)
    refused: tuple[type[Exception], ...] = (hub.RepositoryNotFoundError, hub.RevisionNotFoundError)
    refused += (hub.HFValidationError, *refusals)
    try:
        yield
    except refused as error:
        what = f"the hub refuses {source.name}: {_first_line(error)}"
        hint = "check its name, revision and rows; if it is private or gated, accept its terms and `hf auth login`"
        raise AssetError(what, where=_where(source), hint=hint) from error
    except unreachable as error:
        if constants.HF_HUB_OFFLINE:
            what = f"{source.name} is not in the hub's cache, and HF_HUB_OFFLINE forbids fetching it"
            hint = f"unset HF_HUB_OFFLINE once, or copy the repository into {constants.HF_HUB_CACHE}"
        else:
            what = f"{source.name} is not in the hub's cache, and the hub cannot be reached: {_first_line(error)}"
            hint = "connect to a network for the first run, or set HF_ENDPOINT to a mirror; or name a local folder"
        raise AssetError(what, where=_where(source), hint=hint) from error
    except OSError as error:
        what = f"cannot write the hub's cache: {error.strerror or error}"
        hint = "free some space there, or set HF_HOME to a folder on a larger disk"
        raise AssetError(what, where=str(error.filename or constants.HF_HUB_CACHE), hint=hint) from error


def _where(source: Source) -> str:
    return f"{source.source}@{source.revision}"


def _first_line(error: Exception) -> str:
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def _bar(label: str, progress: Progress) -> type[Any]:
    """Return a tqdm class that draws nothing and reports the number of bytes to `progress`.

    The hub's client makes two bars, for bytes and for files, and updates them from several threads. So only the bar with the
    unit `B` reports, and the reported number never falls.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    done = 0

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> Any:
            nonlocal done
            drawn = super().update(n)
            if self.unit == "B":
                done = max(done, int(self.n))
                progress(label, done, int(self.total) if self.total else None)
            return drawn

    return Bar
