"""Shapes: models without weights. A shape is a preset of `shapes.yaml`, or the path of a config.json.

Imports no torch.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from harness import resources, yaml_validation
from harness.errors import UsageError, did_you_mean

PREFIX = "shape:"
"""Start of the name of a shape, e.g. `shape:llama-7b` or `shape:./config.json`."""
PATH_STARTS = ("./", "../", "/", "~")
_PRESETS = Path(__file__).with_name("shapes.yaml")
_CUT = re.compile(r"(?P<name>[^/]+)/(?P<blocks>[1-9]\d*)-blocks?")
"""Address of a preset with only its first blocks, e.g. `llama-65b/2-blocks`."""
DEPTHS = ("num_hidden_layers", "n_layer")
"""Keys for the number of blocks in a config. A config has one of them."""


@dataclass(frozen=True)
class Preset:
    """A shape that comes with the harness, in `shapes.yaml`."""

    name: str
    kind: Literal["encoder", "causal"]
    config: dict[str, Any]
    """Content of the model's config.json."""
    source: str
    """The publication from which the numbers are taken."""


@functools.cache
def presets() -> dict[str, Preset]:
    """Return all shapes of `shapes.yaml` by name."""
    rows = yaml_validation.load(_PRESETS).data["shapes"]
    return {row["name"]: Preset(row["name"], row["kind"], row["config"], row["source"]) for row in rows}


@functools.cache
def preset(address: str) -> Preset | None:
    """Return the preset with an address such as `llama-65b`, or `llama-65b/2-blocks` for only its first two blocks.

    For any other address, return None.
    """
    cut = _CUT.fullmatch(address)
    if cut is None or cut["name"] not in presets():
        return presets().get(address)
    whole = presets()[cut["name"]]
    if (few := int(cut["blocks"])) > (all_of_them := blocks(whole.config)):
        return None
    source = f"{few} of the {all_of_them} blocks of {whole.source}"
    return replace(whole, name=address, config=first_blocks(whole.config, few), source=source)


def first_blocks(config: Mapping[str, Any], few: int) -> dict[str, Any]:
    """Return a copy of the config in which the model has only its first `few` blocks."""
    depth = next(key for key in DEPTHS if key in config)
    return {**config, depth: few}


def blocks(config: dict[str, Any]) -> int:
    """Return the number of blocks that a config states."""
    return int(next(config[key] for key in DEPTHS if key in config))


def address_problem(address: str) -> str:
    """Return an empty string if an address is a path or names a preset. Otherwise return the text "MISTAKE; HINT"."""
    if address.startswith(PATH_STARTS) or preset(address):
        return ""
    cut = _CUT.fullmatch(address)
    if cut and (whole := presets().get(cut["name"])):
        return f"`{cut['name']}` has {blocks(whole.config)} blocks, not {cut['blocks']}; write as many or fewer"
    instead = "write NAME/2-blocks for the first two of its blocks, or shape:./config.json"
    return f"no shape is called `{address}`; {did_you_mean(address, presets(), instead=instead)}"


def config_of(address: str) -> dict[str, Any]:
    """Return the config of the preset or file that a shape's address names. Raises UsageError for an unreadable file."""
    found = preset(address)
    return found.config if found else read_config(resources.user_path(address))


def read_config(path: Path, name: str = "") -> dict[str, Any]:
    """Return the content of a model's config.json.

    Raises UsageError if the file cannot be read, is not JSON or has no `model_type`.
    """
    who = f"model {name}: " if name else ""
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        what = f"{who}cannot read its config.json: {error.strerror}"
        hint = "name the folder that `model.save_pretrained(FOLDER)` wrote, or its config.json"
        raise UsageError(what, where=str(path), hint=hint) from error
    except ValueError as error:
        raise UsageError(f"{who}no JSON: {error}", where=str(path), hint="copy the file again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        what = f"{who}its config.json names no `model_type`"
        raise UsageError(what, where=str(path), hint="name a model that transformers saved")
    return config


def with_classes(config: Mapping[str, Any], labels: int) -> dict[str, Any]:
    """Return an encoder's config with a classification head for `labels` classes."""
    return {k: v for k, v in config.items() if k not in ("id2label", "label2id")} | {"num_labels": labels}
