"""Find the config.json of a named model in the presets, the table of models, folders and the hub's cache.

Imports no torch, and downloads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.assets import fetch, shapes
from harness.assets.model_folder import refuse_architecture
from harness.assets.table import Source, load_table
from harness.errors import UsageError, did_you_mean
from harness.resources import data_folder, user_path

_CAUSAL = ("ForCausalLM", "LMHeadModel")
"""Suffixes of transformers' classes for causal language models."""


@dataclass(frozen=True)
class ModelShape:
    """A model without weights: its name and its config.json."""

    name: str
    config: dict[str, Any]
    """Content of the model's config.json."""
    kind: str
    """Kind of the model, `encoder` or `causal`."""
    source: str
    """Origin of the config: a paper, a path or an address."""


def find_model(name: str) -> ModelShape:
    """Return the model called `name`. Raises UsageError if the name is unknown, or its config is not on this machine."""
    if preset := shapes.preset(name.removeprefix(shapes.PREFIX)):
        return ModelShape(preset.name, preset.config, preset.kind, f"shape of {preset.source}")
    table = {s.name: s for s in load_table(data_folder("suites") / "sources.yaml").values() if s.kind != "data"}
    if name in table:
        return _of_table(table[name])
    if name.startswith((".", "/", "~")):
        path = user_path(name)
        return _of_file(path / "config.json", name, str(path))
    if name.count("/") == 1:
        return _of_hub(name)
    instead = "name a folder (./path), or org/name in the hub's cache"
    hint = did_you_mean(name, [*shapes.presets(), *table], instead=instead)
    raise UsageError(f"no model is named `{name}`", where="MODEL", hint=hint)


def _of_table(source: Source) -> ModelShape:
    # Only a generated model is fetched here: generating it takes seconds, and any other model would be a download.
    here = fetch.ensure(source) if source.scheme == "made" else fetch.local_folder(source)
    if here is None:
        what = f"{source.name} is not on this machine, and `fit` downloads nothing"
        raise UsageError(what, where="MODEL", hint="run a suite with it first, e.g. `peft-harness run quick`")
    return ModelShape(source.name, shapes.read_config(here / "config.json", source.name), source.kind, source.source)


def _of_hub(name: str) -> ModelShape:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = name.partition("@")
    try:
        found = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    except HFValidationError as error:
        raise UsageError(f"`{name}` is no name on the hub: {error}", where="MODEL", hint="write org/name") from error
    if not isinstance(found, str):
        hint = f"`hf download {repository} config.json`, or write ./{name} if it is a folder here"
        raise UsageError(f"{name} is not in the hub's cache, and `fit` downloads nothing", where="MODEL", hint=hint)
    return _of_file(Path(found), name, f"hub:{repository}")


def _of_file(file: Path, name: str, source: str) -> ModelShape:
    """Return the model that a config.json describes. Raises AssetError for an unsupported architecture."""
    config = shapes.read_config(file, name)
    kind = model_kind(config)
    refuse_architecture(config, name, kind, file)
    return ModelShape(name, config, kind, source)


def model_kind(config: dict[str, Any]) -> str:
    """Return the kind of a model, `causal` or `encoder`. The class name in its config.json decides."""
    names = config.get("architectures") or [_CAUSAL[0]]
    return "causal" if any(str(name).endswith(_CAUSAL) for name in names) else "encoder"
