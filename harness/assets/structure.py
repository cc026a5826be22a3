"""Build a model from its config on the meta device, without weights, and find names of layers that match no layer.

`python -m harness.assets.structure JSON` takes a list of [FOLDER, KIND, NAMES]. For each entry it prints one line:
ANSWER, followed by a JSON object with a `Misfit` for each name that matches no layer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.assets.misfit import Misfit
from harness.errors import closest_match
from harness.process.supervisor import ANSWER

if TYPE_CHECKING:
    import torch

BUILD_ERRORS = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""Errors that transformers may raise for a config that it cannot build."""


def build(config: Mapping[str, Any], kind: str, dtype: torch.dtype) -> Any:
    """Return the model that a config describes, on the meta device and in training mode.

    The model has every layer, but no weights. Each Conv1D is replaced by a linear layer. Raises ValueError for a model
    type that transformers does not have.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

    from harness.assets import conv1d

    facts = dict(config)
    name = facts.pop("model_type", None)
    if name not in CONFIG_MAPPING:
        raise ValueError(f"transformers has no model of the type {name!r}")
    factory: Any = AutoModelForSequenceClassification if kind == "encoder" else AutoModelForCausalLM
    with torch.device("meta"):
        model = factory.from_config(CONFIG_MAPPING[name].from_dict(facts), dtype=dtype).train()
    conv1d.as_linear(model)
    if kind == "encoder":
        without_padding(model)
    return model


def without_padding(model: Any) -> None:
    """Let a classifier without a padding token accept batches whose texts have equal lengths."""
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = -1  # the id of no token


def misfits(folder: str, kind: str, names: Sequence[str]) -> dict[str, Misfit]:
    """Return those of `names` that match no adaptable layer of the model in `folder`, each with the reason."""
    import torch

    config = json.loads((Path(folder) / "config.json").read_bytes())
    return model_misfits(build(config, kind, torch.float32), names)


def model_misfits(model: Any, names: Sequence[str]) -> dict[str, Misfit]:
    """Return those of `names` that match no layer of `model` that a Method can adapt, each with the reason."""
    from reference.shared.layers import KINDS, targets

    found: dict[str, Misfit] = {}
    for name in names:
        try:
            targets(model, (name,), KINDS)
        except ValueError as error:
            found[name] = {"reason": str(error), "closest": _closest(model, name)}
    return found


def _closest(model: Any, name: str) -> str:
    """Return the closest name of adaptable layers, or the closest word for layers. If none is close, return "".

    Also return "" if the model has modules of the given name: the name is not misspelt.
    """
    from reference.shared.layers import KINDS, WORDS, kind_of, named

    if named(model, [name]):
        return ""
    parts = name.count(".") + 1
    paths = [path.split(".") for path, module in model.named_modules() if kind_of(module) in KINDS]
    return closest_match(name, sorted({*WORDS, *(".".join(path[-parts:]) for path in paths)}))


def _answer(folder: str, kind: str, names: Sequence[str]) -> dict[str, Misfit]:
    try:
        return misfits(folder, kind, names)
    except BUILD_ERRORS:
        return {}


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        print(ANSWER + json.dumps(_answer(*one)), flush=True)
