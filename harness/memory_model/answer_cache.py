"""Cache on disk for the answers to each `CountRequest` and `StepRequest`. Imports no torch.

An entry is the file `predictions/KEY.json` in the cache folder. KEY is a hash of all facts that the answer depends on.
The entry also holds these facts, so that `read` ignores a broken or foreign file, and `write` replaces it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from harness.assets import model_folder
from harness.cache_folder import root as cache_root
from harness.errors import AssetError, ImplementationError, StoreError
from harness.methods.registry import OWN_DISTRIBUTION, Registry, discover
from harness.records import environment
from harness.records.files import write_atomic

Request = Mapping[str, Any]
"""A `CountRequest` or a `StepRequest`. It may have further keys with facts that the answer depends on."""

MOST = 4096
"""Largest number of entries, of a few KB each. If there are more, `write` removes the oldest."""
_VARIABLES = ("PEFT_HARNESS_COMPILE", "TRITON_INTERPRET")
"""Environment variables that decide which code a training step runs."""


def folder() -> Path:
    """Return the folder of the entries, without creating it."""
    return cache_root() / "predictions"


def read(request: Request) -> Any | None:
    """Return the cached answer to a request, or None if there is none."""
    if (facts := _facts(request)) is None:
        return None
    try:
        entry = json.loads(_path(facts).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(entry, dict) or json.dumps(entry.get("facts"), sort_keys=True) != facts:
        return None
    answer = entry.get("answer")
    return answer if isinstance(answer, dict) else None


def write(answers: Iterable[tuple[Request, Any]]) -> None:
    """Save pairs of a request and its answer, and remove the oldest entries if there are more than `MOST`.

    An answer is not saved if it is an error, or if another attempt may have another answer, e.g. after a timeout. If
    the cache cannot be written, nothing is saved.
    """
    lasting = [(request, answer) for request, answer in answers if not ({"error", "transient"} & answer.keys())]
    entries = [(facts, answer) for request, answer in lasting if (facts := _facts(request)) is not None]
    if entries:
        with suppress(OSError, StoreError):
            folder().mkdir(parents=True, exist_ok=True)
            for facts, answer in entries:
                text = json.dumps({"facts": json.loads(facts), "answer": answer})
                write_atomic(_path(facts), text.encode())
            _remove_oldest()


def _path(facts: str) -> Path:
    return folder() / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.json"


def _facts(request: Request) -> str | None:
    """Return all facts that the answer to a request depends on, as JSON. Return None if the answer must not be cached.

    An answer must not be cached if the code that computes it can change without a new version: an Implementation in
    another distribution, or a library that is installed as editable.
    """
    surroundings = _surroundings()
    if surroundings is None or not _is_own(request.get("cell")):
        return None
    checkpoint = request.get("checkpoint", "")
    try:
        headers = model_folder.headers_sha256(Path(checkpoint)) if checkpoint else ""
    except AssetError:
        return None
    facts = {
        "request": {name: value for name, value in request.items() if name != "checkpoint"},
        "checkpoint": headers,
        **surroundings,
    }
    return json.dumps(facts, sort_keys=True)


@cache
def _surroundings() -> dict[str, Any] | None:
    """Return the facts about this process that answers depend on, or None if a library is installed as editable."""
    if environment.editable_libraries():
        return None
    return {
        "code": environment.code_version(),
        "software": environment.software(),
        "processor": environment.processor(),
        "variables": {name: os.environ.get(name) for name in _VARIABLES},
    }


def _is_own(cell: Mapping[str, Any] | None) -> bool:
    """Return whether the Implementation of a Cell is part of the harness's own distribution.

    cell: None for a request without a Cell. The result is then True: the request uses only reference Implementations.
    """
    if cell is None:
        return True
    try:
        found = _registry().find("method", cell["method"], cell["implementation"])
    except ImplementationError:
        return False
    return found.distribution == OWN_DISTRIBUTION


@cache
def _registry() -> Registry:
    return discover()


def _remove_oldest() -> None:
    files = list(folder().iterdir())  # including temporary files of writers that were killed
    if len(files) > MOST:
        ages = {}
        for file in files:
            with suppress(FileNotFoundError):  # another process removed it
                ages[file] = file.stat().st_mtime
        for file in sorted(ages, key=ages.__getitem__)[: len(files) - MOST]:
            file.unlink(missing_ok=True)
