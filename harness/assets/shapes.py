"""Model shapes: configurations without weights, from a preset of `shapes.yaml` or a config.json. Imports no torch."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from harness import resources, yaml_lines
from harness.errors import UsageError, did_you_mean

PREFIX = "shape:"
"""Prefix of the name of a shape, e.g. `shape:llama-7b` or `shape:./config.json`."""
PATH_STARTS = ("./", "../", "/", "~")
_PRESETS = Path(__file__).with_name("shapes.yaml")
_CUT = re.compile(r"(?P<name>[^/]+)/(?P<blocks>[1-9]\d*)-blocks?")
"""Address of a model with only the first blocks of a preset, e.g. `llama-65b/2-blocks`."""
DEPTHS = ("num_hidden_layers", "n_layer")
"""Keys that configurations use for the number of blocks."""


@dataclass(frozen=True)
class Preset:
    """A shape that comes with the harness."""

    name: str
    kind: Literal["encoder", "causal"]
    config: dict[str, Any]
    """Content of config.json."""
    source: str
    """The publication that the numbers are from."""


@functools.cache
def presets() -> dict[str, Preset]:
    """Return the shapes of `shapes.yaml` by name."""
    rows = yaml_lines.load(_PRESETS).data["shapes"]
    return {row["name"]: Preset(row["name"], row["kind"], row["config"], row["source"]) for row in rows}


@functools.cache
def preset(address: str) -> Preset | None:
    """Return the preset `llama-65b`, or its first two blocks for `llama-65b/2-blocks`; None for other addresses."""
    cut = _CUT.fullmatch(address)
    if cut is None or cut["name"] not in presets():
        return presets().get(address)
    whole = presets()[cut["name"]]
    if (few := int(cut["blocks"])) > (all_of_them := blocks(whole.config)):
        return None
    source = f"{few} of the {all_of_them} blocks of {whole.source}"
    return replace(whole, name=address, config=first_blocks(whole.config, few), source=source)


def first_blocks(config: Mapping[str, Any], few: int) -> dict[str, Any]:
    """Return the configuration with only its first `few` blocks."""
    depth = next(key for key in DEPTHS if key in config)
    return {**config, depth: few}


def blocks(config: dict[str, Any]) -> int:
    """Return the number of blocks of a configuration."""
    return int(next(config[key] for key in DEPTHS if key in config))


def address_problem(address: str) -> str:
    """Return "MISTAKE; HINT" for an address that is neither a path nor a preset; otherwise an empty string."""
    if address.startswith(PATH_STARTS) or preset(address):
        return ""
    cut = _CUT.fullmatch(address)
    if cut and (whole := presets().get(cut["name"])):
        return f"`{cut['name']}` has {blocks(whole.config)} blocks, not {cut['blocks']}; write as many or fewer"
    hint = f"{did_you_mean(address, [*presets()])}, NAME/2-blocks for the first two of its blocks"
    return f"no shape is called `{address}`; {hint}, or shape:./config.json"


def config_of(address: str) -> dict[str, Any]:
    """Return the configuration of an address: a preset or a file. Raises UsageError as `read_config` does."""
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
    """Return an encoder's configuration with a head of `labels` classes."""
    return {k: v for k, v in config.items() if k not in ("id2label", "label2id")} | {"num_labels": labels}
