"""Texts to batches: the data order of a seed, padding, truncation, and what leaves no room for text."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.assets.rows import LabelledRow
from harness.cell.training.batches import (
    Example,
    answer_examples,
    classification_examples,
    collate,
    order,
    order_indices,
)
from harness.errors import UsageError

GOLDEN_ORDER = [[20, 46, 9, 11], [27, 40, 3, 42], [29, 5, 7, 33]]
EXAMPLES = [Example(f"e{i}", tuple(range(1, 2 + i * 7 % 13)), i % 2) for i in range(50)]


# The data order


def test_the_order_depends_on_the_seed_alone() -> None:
    first = order(EXAMPLES, 20, 4, seed=1)
    torch.manual_seed(99)
    assert order(EXAMPLES, 20, 4, seed=1) == first
    assert order(EXAMPLES, 20, 4, seed=2) != first
    assert order(EXAMPLES, 9, 4, seed=1) == first[:9]  # a longer run begins as a shorter one


def test_epochs_cover_every_row() -> None:
    batch = 5  # ten batches an epoch; pools hold eight of them, so that 40 batches are four whole epochs
    seen = Counter(e.id for group in order(EXAMPLES, 40, batch, seed=3) for e in group)
    assert seen == {e.id: 4 for e in EXAMPLES}


def test_positions_are_those_of_the_examples() -> None:
    positions = order_indices(EXAMPLES, 7, 4, seed=2)
    assert [[EXAMPLES[i] for i in group] for group in positions] == order(EXAMPLES, 7, 4, seed=2)
    # The order of a published run: a change makes no run comparable with an older one.
    assert order_indices(EXAMPLES, 3, 4, seed=0) == GOLDEN_ORDER


@pytest.mark.parametrize(("rows", "batch"), [(50, 4), (3, 4), (1, 2), (33, 1)])
def test_every_batch_is_full(rows: int, batch: int) -> None:
    groups = order(EXAMPLES[:rows], 25, batch, seed=0)
    assert [len(group) for group in groups] == [batch] * 25


def test_batches_are_of_like_length() -> None:
    spread = [max(len(e.tokens) for e in g) - min(len(e.tokens) for e in g) for g in order(EXAMPLES, 24, 4, seed=0)]
    assert sum(spread) / len(spread) < 3  # lengths go from 1 to 13: in chance batches of four some seven


def test_nothing_to_train_on_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(UsageError, match="no example to train on"):
        order([], 1, 1, seed=0)


# Batches


def test_padding_on_the_right() -> None:
    batch = collate([Example("a", (5, 6, 7), 1), Example("b", (8,), 0)], pad=0, side="right")
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert batch.labels.tolist() == [1, 0]
    assert (batch.real_tokens, batch.padded_tokens) == (4, 6)


def test_padding_on_the_left_shifts_no_position() -> None:
    batch = collate([Example("a", (5, 6, 7), 1, 2), Example("b", (8,), 0, 1)], pad=0, side="left")
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch.answers == (2, 1)


def encode(context: str, answer: str) -> tuple[list[int], list[int]]:
    return [ord(c) for c in context], [ord(c) for c in answer]


def examples(prompt: str, answer: str, limit: int) -> list[Example]:
    return answer_examples([LabelledRow("r", prompt, 0)], lambda row: row.text, lambda row: [answer], encode, limit)


def test_a_long_prompt_loses_its_beginning_and_never_its_answer() -> None:
    (example,) = examples("abcdef", "yz", 5)
    assert bytes(example.tokens) == b"defyz"
    assert example.answer == 2


@pytest.mark.parametrize("limit", [1, 2])
def test_an_answer_without_room_for_a_prompt_is_refused(limit: int) -> None:
    with pytest.raises(UsageError, match="an answer has 2 tokens") as caught:
        examples("abc", "yz", limit)
    assert "raise it to at least 3" in caught.value.hint


def test_special_tokens_without_room_for_text_are_refused() -> None:
    tokenizer = SimpleNamespace(num_special_tokens_to_add=lambda: 4)
    with pytest.raises(UsageError, match=r"`training.max_tokens` is 4, and the tokenizer adds 4") as caught:
        classification_examples([LabelledRow("r", "a", 0)], tokenizer, 4)
    assert "raise it to at least 5" in caught.value.hint


class Letters:
    """A tokenizer: a letter is a token, between two special ones."""

    def num_special_tokens_to_add(self) -> int:
        return 2

    def __call__(
        self, text: str | list[str], *, truncation: bool = False, max_length: int = 0, verbose: bool = True
    ) -> Any:
        if isinstance(text, list):
            return {"input_ids": [self(one, truncation=truncation, max_length=max_length)["input_ids"] for one in text]}
        kept = text[: max_length - 2] if truncation else text
        return {"input_ids": [1, *map(ord, kept), 2]}


def test_a_text_that_is_cut_for_an_encoder_says_so() -> None:
    rows = [LabelledRow("fits", "abc", 0), LabelledRow("long", "abcd", 1)]
    fits, long = classification_examples(rows, Letters(), 5)
    assert fits == Example("fits", (1, *b"abc", 2), 0)
    assert long == Example("long", (1, *b"abc", 2), 1, cut=True)
