"""Tokenise texts into batches: truncation, padding, data order and loss mask, the same for every Method."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.assets.rows import AnyRow, TextRow
from harness.errors import UsageError
from harness.suites.tasks import Answers


@dataclass(frozen=True)
class Example:
    """One tokenised text."""

    id: str
    tokens: tuple[int, ...]
    label: int
    """The class, or the index of the right choice; 0 if the answer is a text."""
    answer: int = 0
    """For causal models, the number of tokens at the end that have a loss."""
    cut: bool = False
    """True if the text was too long and lost tokens. Always False for a causal model's text with a `label`."""


@dataclass(frozen=True)
class Batch:
    """N texts, padded to L tokens."""

    inputs: dict[str, Tensor]
    """Keyword arguments of the model, int64 (N, L)."""
    labels: Tensor
    """Label of each text, int64 (N,)."""
    answers: tuple[int, ...]
    """Number of tokens of each answer; 0 for encoders."""
    real_tokens: int
    padded_tokens: int
    """Number of tokens of the batch, padding included: N * L."""

    def to(self, device: torch.device) -> Batch:
        """Return this batch on `device`."""
        moved = {name: t.to(device) for name, t in self.inputs.items()}
        return Batch(moved, self.labels.to(device), self.answers, self.real_tokens, self.padded_tokens)

    @property
    def scored(self) -> int:
        """Number of terms in the mean loss of the batch: the tokens of all answers, or for an encoder the texts."""
        return sum(self.answers) or len(self.answers)

    def parts(self, count: int) -> list[Batch]:
        """Divide the batch into `count` smaller batches of neighbouring texts, and return them.

        Each smaller batch is padded to its own longest text.
        """
        if count == 1:
            return [self]
        size = -(-len(self.answers) // count)
        return [self._rows(slice(first, first + size)) for first in range(0, len(self.answers), size)]

    def _rows(self, rows: slice) -> Batch:
        used = self.inputs["attention_mask"][rows].any(0)
        inputs = {name: t[rows][:, used] for name, t in self.inputs.items()}
        mask = inputs["attention_mask"]
        return Batch(inputs, self.labels[rows], self.answers[rows], int(mask.sum()), mask.numel())


def order(examples: Sequence[Example], steps: int, batch: int, seed: int) -> list[list[Example]]:
    """Return `steps` lists of `batch` examples, in the order of `order_indices`."""
    return [[examples[i] for i in group] for group in order_indices(examples, steps, batch, seed)]


def order_indices(examples: Sequence[Example], steps: int, batch: int, seed: int) -> list[list[int]]:
    """Return the data order: `steps` lists of `batch` positions in `examples`.

    The order depends on the seed, not on the Method. Each epoch is shuffled. The epochs follow one another, and are
    divided into pools of eight batches. To save padding, each pool is sorted by length and then divided into batches.
    The batches of a pool are then shuffled. Raises UsageError if there is no example.
    """
    if not examples:
        hint = "add rows to the data, or lower the task's `test`"
        raise UsageError("there is no example to train on: every text outside the test set is also in it", hint=hint)
    rng = random.Random(seed)  # noqa: S311
    stream: list[int] = []
    pools: list[list[int]] = []
    while len(pools) < steps:
        while len(stream) < 8 * batch:
            epoch = list(range(len(examples)))
            rng.shuffle(epoch)
            stream += epoch
        pool, stream = sorted(stream[: 8 * batch], key=lambda i: len(examples[i].tokens)), stream[8 * batch :]
        batches = [pool[i : i + batch] for i in range(0, len(pool), batch)]
        rng.shuffle(batches)
        pools += batches
    return pools[:steps]


def collate(examples: Sequence[Example], pad: int, side: str) -> Batch:
    """Return a Batch of the examples, padded to the longest one with the token `pad`.

    side: where the padding is. It is `right` for encoders, and `left` for causal models, so that all answers end at the
    same position.
    """
    length = max(len(e.tokens) for e in examples)
    ids = torch.full((len(examples), length), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        place = slice(length - len(example.tokens), length) if side == "left" else slice(0, len(example.tokens))
        ids[row, place] = torch.tensor(example.tokens)
        mask[row, place] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if side == "left":
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)  # so that padding shifts no position
    return Batch(
        inputs,
        torch.tensor([e.label for e in examples]),
        tuple(e.answer for e in examples),
        int(mask.sum()),
        ids.numel(),
    )


def classification_examples(rows: Sequence[Any], tokenizer: Any, max_tokens: int) -> list[Example]:
    """Tokenise rows (id, text, label) for an encoder, truncate them to `max_tokens`, and return the examples.

    `max_tokens` includes the special tokens. Raises UsageError if the special tokens leave no room for text.
    """
    special = tokenizer.num_special_tokens_to_add()
    if special >= max_tokens:
        what = f"`training.max_tokens` is {max_tokens}, and the tokenizer adds {special} special tokens to every text"
        raise UsageError(what, hint=f"raise it to at least {special + 1}")
    # A verbose tokenizer would warn about texts that are cut below.
    whole = tokenizer([row.text for row in rows], verbose=False)["input_ids"] if rows else []
    return [
        Example(row.id, tuple(ids), row.label)
        if len(ids) <= max_tokens
        else Example(
            row.id, tuple(tokenizer(row.text, truncation=True, max_length=max_tokens)["input_ids"]), row.label, cut=True
        )
        for row, ids in zip(rows, whole, strict=True)
    ]


def answer_examples(
    rows: Sequence[Any],
    prompt: Callable[[Any], str],
    answers: Callable[[Any], Sequence[str]],
    encode_pair: Callable[[str, str], tuple[list[int], list[int]]],
    max_tokens: int,
) -> list[Example]:
    """Tokenise the prompt and the right answer of each row for a causal model, and return the examples.

    A prompt that is too long loses its beginning, as in evaluation. Only the tokens of the answer have a loss. Raises
    UsageError if an answer leaves no room for its prompt.
    """
    pairs = [encode_pair(prompt(row), answers(row)[row.label]) for row in rows]
    if pairs:
        refuse_long_answers(max(len(answer) for _, answer in pairs), max_tokens)
    return [
        Example(row.id, tuple((context + answer)[-max_tokens:]), row.label, len(answer))
        for row, (context, answer) in zip(rows, pairs, strict=True)
    ]


def refuse_long_answers(longest: int, max_tokens: int) -> None:
    """Raise UsageError if an answer of `longest` tokens leaves no room for a prompt."""
    if longest >= max_tokens:
        raise UsageError(
            f"an answer has {longest} tokens, which leaves no room for a prompt in `training.max_tokens`, {max_tokens}",
            hint=f"raise it to at least {longest + 1}, better to the length of a whole prompt and its answer",
        )


class Prompts:
    """A tokeniser of prompts and answers, for training and for generation.

    A prompt begins with the beginning-of-sequence token, if the tokenizer adds one. A prompt that is too long loses its
    beginning, except for this token. An answer that is too long loses its end, and also the end-of-sequence token.
    max_tokens: in training, the limit of prompt and answer together; in generation, the limit of the prompt alone.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self._tokenizer, self._limit = tokenizer, max_tokens
        bos = tokenizer.bos_token_id
        self._start = [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []

    def open(self, name: str, prompt: str) -> Example:
        """Return an example that contains only a prompt, for generation."""
        plain = self._plain(prompt)
        tokens = self._cut(plain, self._limit)
        return Example(name, tuple(tokens), 0, cut=len(tokens) < len(self._start) + len(plain))

    def pair(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt and the tokens of its answer. No tokens are cut off.

        Prompt and answer are tokenised together, unless one token would span the end of the prompt and the start of the
        answer. Then they are tokenised separately, because a generating model reads only the prompt.
        """
        before, whole = self._plain(prompt), self._plain(prompt + answer)
        together = whole[: len(before)] == before
        return before, whole[len(before) :] if together else self._plain(answer)

    def example(self, name: str, prompt: str, answer: str, loss: str, eos: bool) -> Example:
        """Return one example of a prompt and an answer.

        loss: `answer` if only the tokens of the answer have a loss, or `all` if every token except the first has a
        loss. eos: whether an end-of-sequence token follows the answer.
        """
        before, behind = self.pair(prompt, answer)
        # A model predicts a token only from earlier tokens, so an answer needs a token before it.
        start = self._start if prompt or self._start else [self._tokenizer.eos_token_id]
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
    """Tokenise rows and return the examples.

    parts: function that returns the prompt and the answer of a row. It is not called for a TextRow, which is a text
    without a prompt: in it, every token except the first has a loss.
    """
    return [
        prompts.example(row.id, "", row.text, "all", answers.eos)
        if isinstance(row, TextRow)
        else prompts.example(row.id, *parts(row), answers.loss, answers.eos)
        for row in some
    ]


def rules(answers: Answers | None) -> str:
    """Return a sentence for the Record that says which tokens have a loss."""
    if answers is None:
        return "loss over the right choice's tokens alone (an encoder: its label); the prompt loses its beginning"
    of = "the answer's tokens alone" if answers.loss == "answer" else "all tokens but the first"
    end = "with" if answers.eos else "without"
    return (
        f"loss over {of}, {end} an end-of-sequence token (in a row that is a text: over all tokens); a prompt starts "
        "with the tokenizer's start token, if it has one; too long a prompt loses its beginning, too long an answer its end"
    )
