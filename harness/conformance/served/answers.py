"""Read tokens and log-probabilities from answers of the completions API, and refuse incomplete answers. Imports no
torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from harness.errors import ServerError, UsageError

TokenNames = Callable[[str], int | None]
"""Function that maps the name of a token in an answer to the token's id. It returns None for an unknown or ambiguous
name."""
_LONGEST_MESSAGE = 200
_LARGEST_ID = 2**31


@dataclass(frozen=True)
class Position:
    """One token of an answer or of an echoed prompt, with log-probabilities."""

    token: int
    """Id of the token."""
    logprob: float | None
    """Log-probability of the token in nats. NaN if the server sent none. None for the first token of a prompt."""
    others: Mapping[int, float]
    """Token id -> log-probability, for the most likely tokens at this position except `token`."""

    @property
    def values(self) -> tuple[float, ...]:
        """The log-probability of the token, followed by the values of `others`."""
        return (math.nan if self.logprob is None else self.logprob, *self.others.values())


@dataclass(frozen=True)
class Answer:
    """The answer of a server to one prompt."""

    positions: tuple[Position, ...]
    prompt_tokens: int | None
    """Number of tokens of the prompt, as the server counts them. None if the server does not say."""
    prompt_ids: tuple[int, ...] | None
    """Token ids of the prompt. None if the server does not return them."""


def token_id(name: str) -> int | None:
    """Return the id from a name such as `token_id:42`, or None for other names."""
    found = re.fullmatch(r"token_id:([0-9]{1,18})", name)
    return int(found[1]) if found else None


def message(content: bytes) -> str:
    """Return the error message in the body of a server's answer, as one short line."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        text = "" if content.lstrip()[:1] == b"<" else content.decode("utf-8", "replace")
    else:
        inner = document.get("error", document) if isinstance(document, dict) else document
        keys = ("message", "detail")
        text = str(next((inner[k] for k in keys if inner.get(k)), "") if isinstance(inner, dict) else inner)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_MESSAGE else text[: _LONGEST_MESSAGE - 1] + "…"


def read(document: Any, tokens: int, echo: bool, names: TokenNames, where: str) -> Answer:
    """Read the answer to one prompt from a JSON document.

    tokens: number of tokens requested. echo: whether the prompt's tokens were requested too. names: finds the ids of
    tokens if the answer has none. where: address of the request, for messages.

    Raises UsageError for an answer without log-probabilities or with unknown tokens, and ServerError for an incomplete
    answer.
    """

    def half(what: str) -> ServerError:
        return ServerError(f"incomplete answer: {what}", where=where, hint="the server's log may have the reason")

    choices = document.get("choices") if isinstance(document, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise half(f"{len(choices)} choices for one prompt" if isinstance(choices, list) else "it has no `choices`")
    choice = choices[0]
    found = choice.get("logprobs")
    if not isinstance(found, dict) or found.get("token_logprobs") is None:
        if isinstance(found, dict) and found.get("content"):
            raise UsageError("log-probabilities have the form of chat completions", where=where, hint=_NEEDED)
        raise UsageError("the server returned no log-probabilities", where=where, hint=_NEEDED)
    texts, values = found.get("tokens"), found["token_logprobs"]
    if not isinstance(texts, list) or not isinstance(values, list) or len(texts) != len(values):
        raise half("`tokens` and `token_logprobs` differ in length")
    tops = found.get("top_logprobs") or [None] * len(texts)
    if not isinstance(tops, list) or len(tops) != len(texts):
        raise half("`top_logprobs` and `tokens` differ in length")
    usage: Any = document.get("usage") if isinstance(document.get("usage"), dict) else {}
    given = choice.get("prompt_token_ids")
    prompt = tuple(given) if _are_ids(given) else None
    ids = choice.get("token_ids") if _are_ids(choice.get("token_ids")) else None
    known = [*(prompt or ()), *ids] if echo and ids is not None else ids
    if known is None or len(known) != len(texts):
        known = [names(str(text)) for text in texts]
    if None in known:
        text = texts[known.index(None)]
        raise UsageError(f"the id of token {_short(text)} in the answer is unknown", where=where, hint=_NAMES)
    positions = tuple(
        Position(
            int(known[i]), _number(values[i], i > 0 or not echo, half), _others(tops[i], int(known[i]), names, half)
        )
        for i in range(len(texts))
    )
    count = usage.get("prompt_tokens")
    generated = len(positions) - (count if echo and isinstance(count, int) else 0)
    if not positions or (generated < tokens and choice.get("finish_reason") != "stop"):
        reason = choice.get("finish_reason")
        raise half(f"{max(generated, 0)} of {tokens} tokens, and finish_reason is {_short(reason)}, not 'stop'")
    if generated > tokens and not (echo and count is None):
        raise half(f"{generated} tokens, although the request allows {tokens}")
    return Answer(positions, count if isinstance(count, int) else None, prompt)


_NEEDED = "the check compares the field `logprobs` of /v1/completions; vLLM has it, `transformers serve` ignores it"
_NAMES = (
    "the server must return token ids, as vLLM does for `return_tokens_as_token_ids`, or --base-model needs a tokenizer"
)


def _number(value: Any, needed: bool, half: Callable[[str], ServerError]) -> float | None:
    """Convert a log-probability of an answer to a float. For null, return NaN if `needed`, else None (a prompt's first
    token). half: makes the error for a value that is no number.
    """
    if value is None:
        return math.nan if needed else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise half(f"a log-probability is {_short(value)}")
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.nan


def _are_ids(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < _LARGEST_ID for one in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}…"


def _others(top: Any, token: int, names: TokenNames, half: Callable[[str], ServerError]) -> dict[int, float]:
    if top is None:
        return {}
    if not isinstance(top, dict):
        raise half("`top_logprobs` has an entry that is no object")
    found = {names(str(name)): _number(value, True, half) for name, value in top.items()}
    return {one: value for one, value in found.items() if one is not None and one != token and value is not None}
