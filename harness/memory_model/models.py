"""From the name of a model to its config.json: shapes by name, the harness's table, folders, the hub's cache. No torch.

Nothing is fetched: a shape needs no weights, and a model that is not here is one whose config nobody knows here.
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
"""How the classes of transformers end that predict the next token."""


@dataclass(frozen=True)
class ModelShape:
    """A model's name, its config.json, `encoder` or `causal`, and where these come from."""

    name: str
    config: dict[str, Any]
    kind: str
    source: str


def find(name: str) -> ModelShape:
    """Return the model that `name` stands for. Raises UsageError for a name that nobody knows, or without a config here."""
    if preset := shapes.preset(name.removeprefix(shapes.PREFIX)):
        return ModelShape(preset.name, preset.config, preset.kind, f"shape of {preset.source}")
    table = {s.name: s for s in load_table(data_folder("suites") / "sources.yaml").values() if s.kind != "data"}
    if name in table:
        return _of_table(table[name])
    if name.startswith((".", "/", "~")):
        return _in_folder(name, user_path(name))
    if name.count("/") == 1:
        return _of_hub(name)
    raise UsageError(
        f"no model is named `{name}`",
        where="MODEL",
        hint=f"{did_you_mean(name, [*shapes.presets(), *table])}; or a folder (./path), or of the hub's cache, org/name",
    )


def _of_table(source: Source) -> ModelShape:
    # What the harness makes itself it makes now, in seconds; anything else would be a download.
    here = fetch.ensure(source) if source.scheme == "made" else fetch.at_hand(source)
    if here is None:
        what = f"{source.name} is not on this machine yet, and `fit` fetches nothing"
        raise UsageError(what, where="MODEL", hint="a run of a suite with it does, e.g. `peft-harness run quick`")
    return ModelShape(source.name, shapes.read(here / "config.json", source.name), source.kind, source.source)


def _in_folder(name: str, path: Path) -> ModelShape:
    return _of_file(path / "config.json", name, str(path))


def _of_hub(name: str) -> ModelShape:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = name.partition("@")
    try:
        found = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    except HFValidationError as error:
        raise UsageError(f"`{name}` is no name on the hub: {error}", where="MODEL", hint="write org/name") from error
    if not isinstance(found, str):
        raise UsageError(
            f"{name} is not in the hub's cache, and `fit` fetches nothing",
            where="MODEL",
            hint=f"`hf download {repository} config.json`, or write ./{name} if it is a folder here",
        )
    return _of_file(Path(found), name, f"hub:{repository}")


def _of_file(file: Path, name: str, source: str) -> ModelShape:
    """Return the model of a config.json. Raises AssetError for one that no suite could train either."""
    config = shapes.read(file, name)
    kind = kind_of(config)
    refuse_architecture(config, name, kind, file)
    return ModelShape(name, config, kind, source)


def kind_of(config: dict[str, Any]) -> str:
    """Return `causal` or `encoder`, as a config.json tells by the class that it was saved from."""
    names = config.get("architectures") or [_CAUSAL[0]]
    return "causal" if any(str(name).endswith(_CAUSAL) for name in names) else "encoder"
