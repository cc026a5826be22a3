"""Check that a model's folder is complete (config, safetensors, tokenizer), and that the model can be trained here."""

from __future__ import annotations

import ast
import hashlib
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
"""Largest size of the header of a safetensors file, in bytes. It is the limit of the safetensors library."""
_INDEX = "model.safetensors.index.json"
_POSITIONS = ("max_position_embeddings", "n_positions")  # GPT-2 uses the second name
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DROPOUTS = ("_pdrop", "dropout", "dropout_prob", "dropout_rate")
_OF_HEADS = ("summary_", "classifier_")
"""Prefixes of dropouts that only a classification head uses. A causal model does not use them."""
_EACH = "num_experts_per_tok"
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Keys of a config for the number of experts in a block. A config has one of them."""
_TWO_SIDED = ("ForMaskedLM", "ForPreTraining")
"""Last parts of the names of transformers classes for models that predict a token from the tokens on both sides."""


def check(folder: Path, source: Source) -> Path:
    """Return `folder` if the model is complete and can be trained here.

    Raises AssetError if a file is missing, or if the harness cannot train this kind of model.
    """
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
    """Raise AssetError if weights or the tokenizer are missing."""
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
    """Return the SHA-256 of a model's weights in hex digits. If there are several files, it is one combined hash."""
    files = _weights(folder)
    return sha256(files[0]) if len(files) == 1 else combined_sha256(files)


def headers_sha256(folder: Path) -> str:
    """Return the SHA-256, in hex digits, of the headers of a model's weight files: names, dtypes and shapes."""
    return hashlib.sha256(b"".join(map(_header, _weights(folder)))).hexdigest()


def layers(folder: Path) -> set[str]:
    """Return the paths of all modules with weights, as listed in the headers of the weight files.

    Unreadable files are skipped; the error appears when the model is loaded later.
    """
    paths = set()
    for file in _weights(folder):
        try:
            header = json.loads(_header(file))
        except ValueError:
            continue
        paths |= {name.rpartition(".")[0] for name in header if name != "__metadata__"}
    return paths


def positions(folder: Path) -> int | None:
    """Return the largest number of tokens that a model's config allows. If the config has no limit, return None."""
    config = _config(folder)
    most = next((config[key] for key in _POSITIONS if key in config), None)
    return most if isinstance(most, int) and most > 0 else None


def model_type(folder: Path) -> str:
    """Return the `model_type` of a model's config, e.g. `llama`. If there is none, return an empty string."""
    return str(_config(folder).get("model_type") or "")


def dropout(folder: Path) -> str:
    """Return the key of a model's config that sets a dropout above 0. If there is none, return an empty string.

    A key in `text_config` is returned with this prefix, e.g. `text_config.attention_dropout`.
    """
    config = _config(folder)
    part = config.get("text_config")
    named = dict(config)
    if isinstance(part, dict):
        named |= {f"text_config.{key}": value for key, value in part.items()}
    above = (key for key, value in named.items() if type(value) in (int, float) and value > 0)  # type() excludes True
    return next(filter(_is_dropout, above), "")


def _is_dropout(key: str) -> bool:
    name = key.rpartition(".")[2]
    return name.endswith(_DROPOUTS) and not name.startswith(_OF_HEADS)


def refuse_architecture(config: Mapping[str, Any], name: str, kind: str, where: Path) -> None:
    """Raise AssetError if the harness cannot score a model with this config's architecture, or if it cannot run.

    A config that does not determine the architecture is accepted, because the model is checked again when it is loaded.
    where: path of the config, for the message.
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
    refuse_routing(config, name, str(where))


def refuse_routing(config: Mapping[str, Any], name: str, where: str) -> None:
    """Raise AssetError if a mixture of experts sends a token to no expert, or to more experts than it has.

    A config without experts is accepted, since dense models may state 0 experts. where: path of the config.
    """
    key = next((key for key in _EXPERTS if isinstance(config.get(key), int) and config[key] > 0), "")
    each = config.get(_EACH)
    if key and isinstance(each, int) and not 1 <= each <= config[key]:
        what = f"model {name}: `{_EACH}` is {each}, and a token needs 1 to {config[key]} experts (`{key}`)"
        raise AssetError(what, where=where, hint=f"write a number from 1 to {config[key]} as `{_EACH}`")


def _config(folder: Path) -> dict[str, Any]:
    """Return a model's config, or an empty dict if it cannot be read; the error appears when the model is loaded later."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _weights(folder: Path) -> list[Path]:
    """List the weight files that transformers would load, sorted by name. The files need not exist."""
    whole, index = folder / "model.safetensors", folder / _INDEX
    if whole.is_file() or not index.is_file():
        return [whole]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AssetError("not an index of weights", where=str(index), hint="copy the folder again") from error
    return [folder / name for name in names]


def _header(file: Path) -> bytes:
    """Return the header of a safetensors file, which is JSON. If it cannot be read, return no bytes."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            return opened.read(length) if length <= _LONGEST_HEADER else b""
    except OSError:
        return b""


_NAMES = {"causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "encoder": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"}
CACHES = ("cache", "past_key_values", "cache_params")
"""Possible names of the argument for the cache in transformers. `cache` is its name since release 5.24. In older
releases it is `past_key_values`, or `cache_params` for state-space models."""
_START, _END = " = OrderedDict(", "\n)\n"


def lacks_type(kind: str, model_type: str) -> bool:
    """Return whether the installed transformers knows this model type, but has no model of the kind `kind` for it.

    kind: `causal` or `encoder`. For an unknown type, return False: its code may be in the model's folder, or the Cell
    may run with another release of transformers.
    """
    there = _types(kind)
    return bool(there) and model_type not in there and f'("{model_type}", ' in _source()


@cache
def _types(kind: str) -> frozenset[str]:
    """Return the model types that transformers has for a kind of model.

    They are read from the source code of transformers. If this code has an unknown form, the set is empty.
    """
    _, found, rest = _source().partition(_NAMES[kind] + _START)
    return frozenset(dict(ast.literal_eval(rest.partition(_END)[0].strip()))) if found else frozenset()


@cache
def _source() -> str:
    package = find_spec("transformers")
    file = Path(package.origin).parent / "models" / "auto" / "modeling_auto.py" if package and package.origin else None
    return file.read_text(encoding="utf-8") if file is not None and file.is_file() else ""
