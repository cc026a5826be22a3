"""From the name of a model to its config.json: shapes by name, the harness's table, folders, the hub's cache. No torch.

Nothing is fetched: a shape needs no weights, and a model that is not here is one whose config nobody knows here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import yaml_lines
from harness.assets import fetch
from harness.assets.table import Source, load_table
from harness.errors import UsageError
from harness.resources import folder
from harness.spelling import near

_SHAPES = Path(__file__).with_name("shapes.yaml")
_CAUSAL = ("ForCausalLM", "LMHeadModel")
"""How the classes of transformers end that predict the next token."""


@dataclass(frozen=True)
class Model:
    """A model's name, its config.json, `encoder` or `causal`, and where these come from."""

    name: str
    config: dict[str, Any]
    kind: str
    source: str


def find(name: str) -> Model:
    """Return the model that `name` stands for. Raises UsageError for a name that nobody knows, or without a config here."""
    if name in (shapes := _shapes()):
        return shapes[name]
    table = {s.name: s for s in load_table(folder("suites") / "sources.yaml").values() if s.kind != "data"}
    if name in table:
        return _of_table(table[name])
    if name.startswith((".", "/", "~")):
        return _in_folder(name, Path(name).expanduser())
    if name.count("/") == 1:
        return _of_hub(name)
    raise UsageError(
        f"no model is named `{name}`",
        where="MODEL",
        mend=f"{near(name, [*shapes, *table])}; or a folder (./path), or a repository in the hub's cache (org/name)",
    )


def _shapes() -> dict[str, Model]:
    rows = yaml_lines.load(_SHAPES).data["shapes"]
    return {row["name"]: Model(row["name"], row["config"], "causal", f"shape of {row['source']}") for row in rows}


def _of_table(source: Source) -> Model:
    # What the harness makes itself it makes now, in seconds; anything else would be a download.
    here = fetch.ensure(source) if source.scheme == "made" else fetch.at_hand(source)
    if here is None:
        what = f"{source.name} is not on this machine yet, and `fit` fetches nothing"
        raise UsageError(what, where="MODEL", mend="a run of a suite with it does, e.g. `peft-harness run quick`")
    return Model(source.name, _read(source.name, here / "config.json"), source.kind, source.source)


def _in_folder(name: str, path: Path) -> Model:
    config = _read(name, path / "config.json")
    return Model(name, config, _kind(config), str(path))


def _of_hub(name: str) -> Model:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = name.partition("@")
    try:
        found = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    except HFValidationError as error:
        raise UsageError(f"`{name}` is no name on the hub: {error}", where="MODEL", mend="write org/name") from error
    if not isinstance(found, str):
        raise UsageError(
            f"{name} is not in the hub's cache, and `fit` fetches nothing",
            where="MODEL",
            mend=f"`hf download {repository} config.json`, or write ./{name} if it is a folder here",
        )
    config = _read(name, Path(found))
    return Model(name, config, _kind(config), f"hub:{repository}")


def _read(name: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        what = f"model {name}: cannot read its config.json: {error.strerror}"
        raise UsageError(
            what, where=str(path), mend="name the folder that `model.save_pretrained(FOLDER)` wrote"
        ) from error
    except ValueError as error:
        raise UsageError(f"model {name}: no JSON: {error}", where=str(path), mend="copy the file again") from error
    if not isinstance(config, dict) or "model_type" not in config:
        what = f"model {name}: its config.json names no `model_type`"
        raise UsageError(what, where=str(path), mend="name a model that transformers saved")
    return config


def _kind(config: dict[str, Any]) -> str:
    names = config.get("architectures") or [_CAUSAL[0]]
    return "causal" if any(str(name).endswith(_CAUSAL) for name in names) else "encoder"
