"""Prompts of the check of a server, and the tokenizer of the base."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.conformance.adapter_files.adapter_config import read_json_object
from harness.console import foreign_output
from harness.errors import UsageError
from harness.resources import user_path

if TYPE_CHECKING:
    from harness.conformance.served.client import Client

LENGTHS = (1, 3, 7, 12, 20, 40)
"""Lengths of the prompts in tokens. All models get the same prompts: so the check notices a prefix cache that confuses
adapters. 40 tokens fill two blocks of vLLM's cache."""
LONG = 600
"""Largest length of the long prompt in tokens. It is shorter if the base has too few positions. Some mistakes show only
in long prompts: vLLM returned NaN after some 400 tokens."""
TOKENS = 8
"""Number of tokens that the server generates per request."""
TEXTS = (
    "The capital of France is",
    "def mean(numbers):\n    return",
    "Once upon a time there was a small town by the sea, and in that town",
    "Ein Satz auf Deutsch: Größe, Maß und 1,5 kg.",
    "12 + 30 = 42, 7 * 8 =",
    "A harness compares what a server computes with what an adapter file says.",
)
"""Texts that different tokenizers split differently. They are the prompts for servers that accept no token ids."""
_BASE = "--base-model needs the folder of the base: config.json and model.safetensors"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer in the folder of the base."""

    folder: Path

    @classmethod
    def find(cls, folder: Path) -> Tokenizer | None:
        """Return the tokenizer in the folder of a base, or None."""
        return cls(folder) if any((folder / name).is_file() for name in _TOKENIZERS) else None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the special tokens that the tokenizer adds."""
        return list(self._loaded(text)["input_ids"])

    def name_id(self, name: str) -> int | None:
        """Return the id of the token whose text is `name`. Return None if no token or several tokens have this text."""
        return self._ids.get(name)

    @cached_property
    def _ids(self) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for one in range(len(self._loaded)):
            text = self._loaded.decode([one])
            found[text] = None if text in found else one
        return found

    @cached_property
    def _loaded(self) -> Any:
        with foreign_output():
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)


def drawn(folder: Path, seed: int) -> list[list[int]]:
    """Return prompts of random token ids, one per length in LENGTHS, for the base in `folder`.

    Raises UsageError if the folder has no vocabulary size.
    """
    draw, ids = random.Random(seed), plain_ids(folder)  # noqa: S311  # prompts, not secrets
    return [draw.choices(ids, k=length) for length in LENGTHS]


def room(folder: Path, longest: int | None) -> int | None:
    """Return the largest number of tokens that a prompt and its answer may have together. Return None if there is no
    limit.

    folder: the folder of the base, whose number of positions is a limit. longest: limit that the server states, or
    None.
    """
    config = _config(folder)
    inner = config.get("text_config")
    found = [longest] if longest is not None else []
    for one in (config, inner if isinstance(inner, dict) else {}):
        found += [one[key] for key in ("max_position_embeddings", "n_positions") if type(one.get(key)) is int]
    return min(found, default=None)


def long_prompt(folder: Path, seed: int, tokens: int) -> list[int]:
    """Return a prompt of at most LONG random token ids, such that prompt and answer have at most `tokens` tokens.

    Return an empty list if the prompt would be no longer than the longest of LENGTHS.
    """
    length = min(LONG, tokens - TOKENS)
    draw = random.Random(f"{seed} long")  # noqa: S311  # a prompt, not a secret
    return draw.choices(plain_ids(folder), k=length) if length > max(LENGTHS) else []


def long_text(tokenizer: Tokenizer, tokens: int) -> str:
    """Return a long prompt as text: one of TEXTS, repeated. Return "" if not even two repetitions fit into `tokens`
    tokens.
    """
    text = f"{TEXTS[2]} "
    times = min(LONG, tokens - TOKENS) // len(tokenizer.encode(text))
    return (text * times).strip() if times > 1 else ""


def _config(folder: Path) -> Mapping[str, Any]:
    return read_json_object(folder / "config.json", _BASE)


def plain_ids(folder: Path) -> list[int]:
    """Return the ids of all tokens in the vocabulary of the base in `folder`, except bos, eos and pad.

    Raises UsageError if the folder has no vocabulary size.
    """
    config = _config(folder)
    try:
        size = int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError("has no vocabulary size", where=str(folder / "config.json"), hint=_BASE) from error
    special = {one for key in ("bos", "eos", "pad") for one in _listed(config.get(f"{key}_token_id"))}
    return [one for one in range(size) if one not in special]


def require_tokenizer(client: Client, base: str, tokenizer: Tokenizer) -> None:
    """Raise UsageError if the server's tokenizer and the base's tokenizer split a text differently."""
    for text in TEXTS:
        ids = tokenizer.encode(text)
        answer = client.complete(base, text, 1)
        if answer.prompt_ids is not None and list(answer.prompt_ids) != ids:
            raise _another(text, f"ids {_first(ids)}", f"{_first(answer.prompt_ids)}", tokenizer)
        if answer.prompt_ids is None and answer.prompt_tokens not in (None, len(ids)):
            raise _another(text, f"{len(ids)} tokens", f"{answer.prompt_tokens}", tokenizer)


def _another(text: str, mine: str, theirs: str, tokenizer: Tokenizer) -> UsageError:
    return UsageError(
        f"the server has another tokenizer: {text!r} is {mine} in --base-model, and {theirs} on the server",
        where=str(tokenizer.folder), hint="give --base-model the folder that the server loads",
    )  # fmt: skip


def _first(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids[:8])) + (" ..." if len(ids) > 8 else "")


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def adapters(given: Sequence[str]) -> Mapping[str, Path]:
    """Parse the values of `--adapter`, NAME=DIR or DIR, and map each adapter's name on the server to its folder.

    DIR alone gives the adapter the name of the folder. Raises UsageError for a name that occurs twice.
    """
    found: dict[str, Path] = {}
    for one in given:
        name, folder = split(one)
        name = name or folder.resolve().name
        if name in found:
            hint = "name one of them: --adapter NAME=DIR"
            raise UsageError(f"two adapters have the name {name}", where="--adapter", hint=hint)
        found[name] = folder
    return found


def split(value: str) -> tuple[str, Path]:
    """Return name and folder from NAME=DIR. The name is empty if only DIR is given."""
    name, sign, folder = value.partition("=")
    return (name, user_path(folder)) if sign and not user_path(value).is_dir() else ("", user_path(value))
