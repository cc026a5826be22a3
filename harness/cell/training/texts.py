"""Tokenise a prompt and its answer, and select the tokens that carry loss: the same rules for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from harness.assets.rows import AnyRow, TextRow
from harness.cell.training.batches import Example
from harness.suites.tasks import Answers


class Prompts:
    """Tokenises prompts and answers, for training and for generation.

    A prompt begins with the beginning-of-sequence token, if the tokenizer adds one. A prompt that is too long loses its
    beginning, but not that token; an answer that alone is too long loses its end, and with it the end-of-sequence token.
    max_tokens: limit of prompt and answer in training, of the prompt in generation.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self._tokenizer, self._limit = tokenizer, max_tokens
        bos = tokenizer.bos_token_id
        self._start = [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []

    def prompt_tokens(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt for generation."""
        return list(self.open("", prompt).tokens)

    def open(self, name: str, prompt: str) -> Example:
        """Return the tokens of a prompt as an example without an answer, and whether it was cut."""
        plain = self._plain(prompt)
        tokens = self._cut(plain, self._limit)
        return Example(name, tuple(tokens), 0, cut=len(tokens) < len(self._start) + len(plain))

    def pair(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt, uncut, and of its answer.

        The answer's are those of the whole text after the prompt's; if no border of tokens lies between the two, the texts
        are tokenised separately, because a model that generates reads the prompt's own tokens.
        """
        before, whole = self._plain(prompt), self._plain(prompt + answer)
        together = whole[: len(before)] == before
        return before, whole[len(before) :] if together else self._plain(answer)

    def example(self, name: str, prompt: str, answer: str, loss: str, eos: bool) -> Example:
        """Return one example; `loss` is `answer` or `all`, which is every token but the first."""
        before, behind = self.pair(prompt, answer)
        start = (
            self._start if prompt or self._start else [self._tokenizer.eos_token_id]
        )  # an answer needs a token before it
        behind = behind + [self._tokenizer.eos_token_id] * eos
        answer_ids = behind[: self._limit - 1]
        head = self._cut(before, self._limit - len(answer_ids), start)
        tokens = tuple(head + answer_ids)
        cut = len(tokens) < len(start) + len(before) + len(behind)
        return Example(name, tokens, 0, len(tokens) - 1 if loss == "all" else len(answer_ids), cut)

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _cut(self, tokens: list[int], limit: int, start: list[int] | None = None) -> list[int]:
        start = self._start if start is None else start
        room = limit - len(start)
        return start[:limit] + (tokens[-room:] if room > 0 else [])


def answered_examples(
    some: Sequence[AnyRow], prompts: Prompts, parts: Callable[[AnyRow], tuple[str, str]], answers: Answers
) -> list[Example]:
    """Tokenise rows. parts: returns prompt and answer of a row; in a row that is a text, all tokens carry loss."""
    return [
        prompts.example(row.id, "", row.text, "all", answers.eos)
        if isinstance(row, TextRow)
        else prompts.example(row.id, *parts(row), answers.loss, answers.eos)
        for row in some
    ]


def rules(answers: Answers | None) -> str:
    """Return a sentence for the Record on the tokens that the loss is over."""
    if answers is None:
        return "loss over the right choice's tokens alone (an encoder: its label); the prompt loses its beginning"
    of = "the answer's tokens alone" if answers.loss == "answer" else "all tokens but the first"
    end = "with" if answers.eos else "without"
    return (
        f"loss over {of}, {end} an end-of-sequence token (a row that is a text: over all); the prompt begins as the "
        "tokenizer begins texts, and loses its beginning where both are too long, a longer answer its end"
    )
