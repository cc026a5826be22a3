"""The data of a Cell: what is tokenised, and in which order it is trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from harness.assets import fetch, generated, rows, table
from harness.cell import data
from harness.cell.data import RandomData
from harness.cell.job import Job
from harness.cell.training.batches import Example, order
from harness.errors import UsageError
from harness.records.record import Cell, Training
from harness.suites import loader

TEXTS = [rows.LabelledRow(f"r{i}", "word " * (1 + i * 7 % 13), i % 2) for i in range(5000)]


def _examples(some: Sequence[rows.LabelledRow]) -> list[Example]:
    return [Example(row.id, tuple(range(row.text.count("word"))), row.label) for row in some]


def test_only_what_is_looked_at_is_tokenised() -> None:
    asked: list[str] = []

    def tokenise(some: Sequence[rows.LabelledRow]) -> list[Example]:
        asked.extend(row.id for row in some)
        return _examples(some)

    lazy = order(data._Tokenised(TEXTS, tokenise), 12, 8, seed=3)
    assert lazy == order(_examples(TEXTS), 12, 8, seed=3)
    # Twelve batches come from two pools of eight; each of their texts is tokenised once.
    assert len(asked) == len(set(asked)) == 2 * 8 * 8
    assert data._Tokenised(TEXTS, _examples)[1:3] == _examples(TEXTS[1:3])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    generated.tiny_llama(path := tmp_path_factory.mktemp("tiny-llama"))
    return AutoTokenizer.from_pretrained(path)


def _data(
    cell: Cell, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, read: list[rows.LabelledRow], model: Any = None
) -> data.CellData:
    task = loader.load("smoke").tasks[cell.task]
    source = table.resolve(cell.model, loader.load("smoke").sources, Path())
    monkeypatch.setattr(rows, "read", lambda *_: read)
    use = {"name": "unused", "source": "unused"}
    work = Job.model_validate(
        {"run": "r", "folder": "f", "attempt": 1, "cell": cell, "device": "cpu", "launched": 0.0,
         "model": {"path": "unused", "source": source, "use": use},
         "data": {"path": "unused", "source": task.data, "use": fetch.asset_use(task.data)},
         "task": {"name": task.name, "spec": task.spec, "labels": task.labels, "test": 50, "shuffle_seed": 1, "use": use}}
    )  # fmt: skip
    loaded: Any = SimpleNamespace(tokenizer=tokenizer, model=model, head={})
    return data.CellData(work, loaded, lambda *_, **__: None)


def test_no_more_tokens_than_the_loaded_model_has_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    # RoBERTa's config says 25; two of them are taken, as only the model itself tells.
    embeddings = SimpleNamespace(padding_idx=1)
    model = SimpleNamespace(
        config=SimpleNamespace(max_position_embeddings=25),
        named_modules=lambda: [("roberta.embeddings.position_embeddings", embeddings)],
    )
    cell = next(c for c in loader.load("smoke").plan.cells if c.method == "lora")
    assert cell.training.max_tokens == 24
    with pytest.raises(UsageError, match=r"`max_tokens` is 24, but tiny-llama has 23 positions") as caught:
        _data(cell, None, monkeypatch, TEXTS, model)
    assert caught.value.hint == "write at most 23"


@pytest.mark.slow
def test_the_order_of_data_has_a_name(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    texts = [
        rows.LabelledRow(f"r{i}", " ".join(rng.choices(["good", "bad", "film"], k=5)) + f" {i}", i % 2)
        for i in range(500)
    ]
    cell = next(c for c in loader.load("smoke").plan.cells if c.method == "lora")
    seen = []
    real = data.answer_examples

    def watched(some: Sequence[rows.LabelledRow], *rest: Any) -> list[Example]:
        seen.extend(row.id for row in some)
        return real(some, *rest)

    monkeypatch.setattr(data, "answer_examples", watched)
    one = _data(cell, tokenizer, monkeypatch, texts)
    steps, batch = cell.training.steps, cell.training.batch
    assert len(one.batches) == steps
    assert len(seen) <= -(-steps // 8) * 8 * batch + data._PROBED
    assert one.order_sha256 == _data(cell, tokenizer, monkeypatch, texts).order_sha256
    other = cell.model_copy(update={"seed": cell.seed + 1})
    assert one.order_sha256 != _data(other, tokenizer, monkeypatch, texts).order_sha256
    longer = cell.model_copy(update={"training": cell.training.model_copy(update={"steps": steps + 1})})
    assert one.order_sha256 != _data(longer, tokenizer, monkeypatch, texts).order_sha256
    (moved := list(texts)).reverse()
    assert one.order_sha256 != _data(cell, tokenizer, monkeypatch, moved).order_sha256


@pytest.mark.slow
@pytest.mark.parametrize("special", [False, True], ids=["nothing", "special tokens alone"])
@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_a_tokenizer_that_makes_no_tokens_is_told_with_its_folder(
    kind: str, special: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Tokenizer(BPE({"[PAD]": 0, "[CLS]": 1, "[EOS]": 2}, []))  # which knows no letter, and says nothing of any
    if special:
        around = [("[CLS]", 1)]
        tokens.post_processor = TemplateProcessing(single="[CLS] $A", pair="[CLS] $A $B", special_tokens=around)
    deaf = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", eos_token="[EOS]", cls_token="[CLS]")
    cell = next(c for c in loader.load("smoke").plan.cells if c.method == "lora")
    source = table.resolve(cell.model, loader.load("smoke").sources, Path())
    monkeypatch.setattr(table, "resolve", lambda *_: source.model_copy(update={"kind": kind}))
    model = SimpleNamespace(config=SimpleNamespace(), named_modules=list)
    with pytest.raises(UsageError, match="the texts have no tokens") as caught:
        _data(cell, deaf, monkeypatch, TEXTS, model)
    assert caught.value.where == "unused"
    assert "tokenizer.save_pretrained" in caught.value.hint


def test_random_data_of_another_batch_or_length_have_another_name() -> None:
    def named(**change: int) -> str:
        training = Training(steps=2, batch=2, max_tokens=8).model_copy(update=change)
        model = SimpleNamespace(config=SimpleNamespace(vocab_size=50), named_modules=lambda: [])
        cell = SimpleNamespace(training=training, seed=0, model="m", config={})
        source = SimpleNamespace(kind="causal")
        work: Any = SimpleNamespace(cell=cell, device="cpu", model=SimpleNamespace(source=source))
        loaded: Any = SimpleNamespace(model=model)
        return RandomData(work, loaded).order_sha256

    assert named() == named()
    assert len({named(), named(batch=4), named(max_tokens=4)}) == 3
