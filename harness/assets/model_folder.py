"""Check that a model's folder is complete (config, safetensors, tokenizer), and that the model can be trained here."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.assets.table import Source
from harness.errors import AssetError
from harness.records.files import combined_sha256, sha256

_LONGEST_HEADER = 100_000_000
"""Largest size of a header in bytes, which is the limit of safetensors."""
_INDEX = "model.safetensors.index.json"
_POSITIONS = ("max_position_embeddings", "n_positions")  # GPT-2 uses the second name
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TWO_SIDED = ("ForMaskedLM", "ForPreTraining")
"""Suffixes of transformers' classes that predict a token from both sides."""


def check(folder: Path, source: Source) -> Path:
    """Return `folder`. Raises AssetError if it lacks a file, or if its model cannot be trained here."""
    if not folder.is_dir():
        raise AssetError(f"no folder for model {source.name}", where=str(folder), hint="correct its path")
    if not (folder / "config.json").is_file():
        hint = "name the folder that `model.save_pretrained(FOLDER)` wrote"
        raise AssetError(f"model {source.name} has no config.json", where=str(folder), hint=hint)
    if source.scheme != "shape":
        _refuse_incomplete(folder, source)
    refuse_architecture(_config(folder), source.name, source.kind, folder / "config.json")
    return folder


def _refuse_incomplete(folder: Path, source: Source) -> None:
    """Raise AssetError for missing weights or a missing tokenizer."""
    absent = [path.name for path in _weights(folder) if not path.is_file()]
    if absent:
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        what = f"model {source.name} has no {', '.join(absent[:3])}"
        hint = "copy the folder again, or name one with safetensors weights"
        if pickled:
            what += f", only pickled weights ({pickled[0]}), which can run code when they are loaded"
            hint = "load it where you trust it and write it again with `model.save_pretrained(FOLDER)`"
        raise AssetError(what, where=str(folder), hint=hint)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        what = f"model {source.name} has no tokenizer (none of {', '.join(_TOKENIZERS)})"
        raise AssetError(what, where=str(folder), hint="write it there with `tokenizer.save_pretrained(FOLDER)`")


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 in hex digits of the file of weights, or one combined hash if there are several files."""
    files = _weights(folder)
    return sha256(files[0]) if len(files) == 1 else combined_sha256(files)


def layers(folder: Path) -> set[str]:
    """Return the paths of the modules with weights in a model's folder, from the headers of its files.

    Unreadable files are skipped; the later loading reports the reason.
    """
    paths = set()
    for file in _weights(folder):
        try:
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length)) if length <= _LONGEST_HEADER else {}
        except (OSError, ValueError):
            continue
        paths |= {name.rpartition(".")[0] for name in header if name != "__metadata__"}
    return paths


def positions(folder: Path) -> int | None:
    """Return the maximum number of tokens that a model's config allows, or None if the config has no limit."""
    config = _config(folder)
    most = next((config[key] for key in _POSITIONS if key in config), None)
    return most if isinstance(most, int) and most > 0 else None


def refuse_architecture(config: Mapping[str, Any], name: str, kind: str, where: Path) -> None:
    """Raise AssetError for an architecture that no Cell can score.

    An ambiguous config is accepted, because the Cell checks its model again. where: the file of the config.
    """
    model_type = config.get("model_type")
    if config.get("is_encoder_decoder") is True:
        raise AssetError(
            f"model {name} is an encoder-decoder ({model_type or 'of an unnamed type'}); only encoders and causal models "
            "are trained and scored",
            where=str(where),
            hint="name an encoder (a BERT) with `kind: encoder`, or a causal model (a Llama, a GPT)",
        )
    names = config.get("architectures")
    masked = next((n for n in names if str(n).endswith(_TWO_SIDED)), None) if isinstance(names, list) else None
    # With `is_decoder` in the config, the same weights are a causal model.
    if kind == "causal" and masked is not None and config.get("is_decoder") is not True:
        raise AssetError(
            f"model {name} is declared causal and is a masked language model ({masked}): it sees the answer that it must "
            "predict, so a score would have no meaning",
            where=str(where),
            hint="declare it in a row under `sources:` with `kind: encoder`",
        )
    if isinstance(model_type, str) and lacks_type(kind, model_type):
        does = "classifies texts" if kind == "encoder" else "predicts the next token"
        what = f"model {name} has the type `{model_type}`, and the installed transformers has no such class that {does}"
        raise AssetError(what, where=str(where), hint="name a model of texts (a BERT, a Llama), and its `kind`")


def _config(folder: Path) -> dict[str, Any]:
    """Return a model's config; empty if it cannot be read. The later loading reports the reason."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _weights(folder: Path) -> list[Path]:
    """List the weight files that transformers loads, sorted by name, whether they exist or not."""
    whole, index = folder / "model.safetensors", folder / _INDEX
    if whole.is_file() or not index.is_file():
        return [whole]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AssetError("not an index of weights", where=str(index), hint="copy the folder again") from error
    return [folder / name for name in names]


_NAMES = {"causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "encoder": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"}
CACHES = ("cache", "past_key_values", "cache_params")
"""Names of the cache argument: since transformers 5.24; in older releases; in older releases for state-space models."""
_START, _END = " = OrderedDict(", "\n)\n"


def lacks_type(kind: str, model_type: str) -> bool:
    """Return whether the installed transformers knows this type but has no model of this kind (`causal`, `encoder`) for it.

    Returns False for an unknown type: the folder may contain its code, or the Cell may run with another release.
    """
    there = _types(kind)
    return bool(there) and model_type not in there and f'("{model_type}", ' in _source()


@cache
def _types(kind: str) -> frozenset[str]:
    """Return the model types of a kind; empty if the source of transformers has an unknown form."""
    _, found, rest = _source().partition(_NAMES[kind] + _START)
    return frozenset(dict(ast.literal_eval(rest.partition(_END)[0].strip()))) if found else frozenset()


@cache
def _source() -> str:
    package = find_spec("transformers")
    file = Path(package.origin).parent / "models" / "auto" / "modeling_auto.py" if package and package.origin else None
    return file.read_text(encoding="utf-8") if file is not None and file.is_file() else ""
