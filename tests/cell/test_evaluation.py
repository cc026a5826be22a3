"""Evaluation: likelihoods and labels, in batches with padding, against plain computations one by one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.assets import generated, table
from harness.assets.rows import LabelledRow
from harness.cell.evaluation import classification
from harness.cell.evaluation.likelihood import CausalScorer
from harness.cell.evaluation.lm_eval_task import LmEvalTask
from harness.cell.training.batches import Example, answer_examples, collate
from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.errors import UsageError
from harness.resources import data_folder
from harness.suites import tasks

TEXTS = (
    "the film is sweet and now warm",
    "the plot is dull",
    "the cast is ugly but still weak and then cold",
    "the title is fresh",
    "the scene is slow and here stale",
)
ROWS = [LabelledRow(f"row-{i}", text, int(i in (0, 3))) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    generated.tiny_llama(path := tmp_path_factory.mktemp("tiny-llama"))
    loaded = AutoModelForCausalLM.from_pretrained(path)
    loaded.tokenizer = AutoTokenizer.from_pretrained(path)
    return loaded


@pytest.fixture
def task() -> LmEvalTask:
    sources = table.load_table(data_folder("suites") / "sources.yaml")
    return LmEvalTask(tasks.load("toy-sentiment", Path(), sources).spec, ROWS)


def scorer(model: Any, batch: int = 3, limit: int = 64) -> CausalScorer:
    return CausalScorer(model, model.tokenizer, batch, limit, lambda done, of: None)


@torch.no_grad()
def alone(model: Any, context: list[int], answer: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, bool]:
    """Return (log-likelihood, greedy) of one answer: no batch, no padding, all logits."""
    model.eval().to(dtype)
    log_p = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
    positions = range(len(context) - 1, len(context) + len(answer) - 1)
    total = torch.stack([log_p[i, token] for i, token in zip(positions, answer, strict=True)]).sum()
    greedy = all(int(log_p[i].argmax()) == token for i, token in zip(positions, answer, strict=True))
    model.float()
    return total, greedy


def requests(model: Any, answers: list[str]) -> list[tuple[tuple[str, str], list[int], list[int]]]:
    own = scorer(model)
    return [((text, answer), *own.encode_pair(f"{text} =", answer)) for text in TEXTS for answer in answers]


def assert_likelihoods(model: Any, asked: list[Any], got: list[tuple[float, bool]]) -> None:
    assert len(got) == len(asked)
    have = torch.tensor([likelihood for likelihood, _ in got])
    truth = torch.stack([alone(model, c, a, torch.float64)[0] for _, c, a in asked])
    rounded = torch.stack([alone(model, c, a)[0] for _, c, a in asked])
    judged = noise_floor({"log p": have}, {"log p": truth}, {"log p": rounded}, "float32")
    assert judged.passed, judged
    assert [greedy for _, greedy in got] == [alone(model, c, a)[1] for _, c, a in asked]


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize(
    "answers",
    [[" bad", " good"], [" sweet and warm", " dull"], [" cold", " now cold but warm", " here stale"]],
    ids=["one token", "three tokens and one", "one, four and two"],
)
def test_likelihoods_are_those_of_a_plain_computation(model: Any, answers: list[str], batch: int) -> None:
    asked = requests(model, answers)
    assert {len(a) for _, _, a in asked} == {len(answer.split()) for answer in answers}
    assert_likelihoods(model, asked, scorer(model, batch)._loglikelihood_tokens(asked))


def test_greedy_is_told(model: Any) -> None:
    context = scorer(model).encode_pair(f"{TEXTS[0]} =", " bad")[0]
    best: list[int] = []
    for _ in range(3):
        best.append(int(model(torch.tensor([context + best])).logits[0, -1].argmax()))
    other = [*best[:2], (best[2] + 1) % model.config.vocab_size]
    asked = [(("", ""), context, best), (("", ""), context, other)]
    assert [greedy for _, greedy in scorer(model)._loglikelihood_tokens(asked)] == [True, False]


def test_one_token_choices_share_a_pass(model: Any) -> None:
    rows: list[int] = []
    hook = model.register_forward_pre_hook(lambda m, a, kw: rows.append(len(kw["input_ids"])), with_kwargs=True)
    asked = requests(model, [" bad", " good"])
    own = scorer(model, batch=2)
    own._loglikelihood_tokens(asked)
    hook.remove()
    assert rows == [2, 2, 1]  # five prompts, ten requests


def test_progress_reaches_its_end(model: Any) -> None:
    said: list[tuple[int, int]] = []
    CausalScorer(model, model.tokenizer, 2, 64, lambda done, of: said.append((done, of)))._loglikelihood_tokens(
        requests(model, [" bad", " good"])
    )
    assert said == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("answers", [[" bad", " good"], [" sweet and warm", " dull"]], ids=["one", "several"])
def test_too_long_a_prompt_loses_its_beginning(model: Any, answers: list[str]) -> None:
    limit = 6
    asked = requests(model, answers)
    assert max(len(c) for _, c, _ in asked) > limit
    cut = [(text, context[-(limit - len(answer)) :], answer) for text, context, answer in asked]
    got = scorer(model, limit=limit)._loglikelihood_tokens(asked)
    assert_likelihoods(model, cut, got)
    whole = scorer(model)._loglikelihood_tokens(asked)
    assert got != whole


def test_items_whose_prompt_was_cut_are_counted_once_each(model: Any, task: LmEvalTask) -> None:
    lengths = [len(scorer(model).encode_pair(task.prompt(row), " bad")[0]) + 1 for row in ROWS]
    for limit, cut in (
        (max(lengths), 0),
        (max(lengths) - 1, lengths.count(max(lengths))),
        (min(lengths) - 1, len(ROWS)),
    ):
        own = scorer(model, limit=limit)
        task.score(own)
        assert len(own.cut) == cut


@pytest.mark.slow
def test_an_answer_without_room_for_a_prompt_is_refused(model: Any) -> None:
    with pytest.raises(UsageError, match="an answer has 3 tokens"):
        scorer(model, limit=3)._loglikelihood_tokens(requests(model, [" sweet and warm"]))


def test_scoring_leaves_training_mode_off_and_dropout_out(model: Any) -> None:
    model.train()
    model.model.layers[0].self_attn.attention_dropout = 0.9
    asked = requests(model, [" bad"])
    first, second = (scorer(model.train())._loglikelihood_tokens(asked) for _ in range(2))
    model.model.layers[0].self_attn.attention_dropout = 0.0
    assert first == second == scorer(model)._loglikelihood_tokens(asked)


def test_what_is_not_offered_says_so(model: Any) -> None:
    with pytest.raises(NotImplementedError, match="use multiple_choice"):
        scorer(model).loglikelihood_rolling([])


# lm-eval


def test_items_are_those_of_a_plain_computation(model: Any, task: LmEvalTask) -> None:
    items = task.score(scorer(model, batch=2))
    want = []
    for row in ROWS:
        likelihoods = [alone(model, *scorer(model).encode_pair(f"{row.text} =", f" {c}"))[0] for c in ("bad", "good")]
        want.append((row.id, int(int(torch.stack(likelihoods).argmax()) == row.label)))
    assert [(item.id, item.correct) for item in items] == want


class Rigged(CausalScorer):
    """Likes one answer."""

    def __init__(self, model: Any, answer: str) -> None:
        super().__init__(model, model.tokenizer, 2, 64, lambda done, of: None)
        self.answer = answer
        self.asked: list[tuple[str, str]] = []

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self.asked += [texts for texts, _, _ in requests]
        return [(float(texts[1] == self.answer), False) for texts, _, _ in requests]


@pytest.mark.parametrize(("answer", "label"), [(" bad", 0), (" good", 1)])
def test_each_item_is_right_where_its_label_is_preferred(model: Any, task: LmEvalTask, answer: str, label: int) -> None:
    items = task.score(Rigged(model, answer))
    assert {item.id: item.correct for item in items} == {row.id: int(row.label == label) for row in ROWS}


def test_the_training_prompt_is_the_scored_prompt(model: Any, task: LmEvalTask) -> None:
    rigged = Rigged(model, " bad")
    task.score(rigged)
    assert rigged.asked == [(task.prompt(row), answer) for row in ROWS for answer in task.answers(row)]
    trained = answer_examples(ROWS, task.prompt, task.answers, rigged.encode_pair, 64)
    for row, example in zip(ROWS, trained, strict=True):
        text = model.tokenizer.decode(example.tokens)
        assert text == f"{row.text} = {('bad', 'good')[row.label]}"
        assert example.answer == 1


def test_the_judge_is_named(task: LmEvalTask) -> None:
    assert task.scored_by.startswith("lm-eval 0.")


# Encoders


class Encoder(nn.Module):
    """A small attention-free encoder whose logits depend on every real token, and on padding if it is let in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.dropout, self.head = nn.Embedding(32, 8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        summed = (self.embed(input_ids) * attention_mask[..., None]).sum(1)
        return SimpleNamespace(logits=self.head(self.dropout(summed)))


ITEMS = [Example(f"x{i}", tuple((i * 5 + j * 3) % 32 for j in range(1 + i * 7 % 11)), i % 3) for i in range(40)]


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_labels_are_those_of_one_by_one(batch: int) -> None:
    model, said = Encoder(), []
    items = classification.score(model.train(), ITEMS, 31, batch, lambda done, of: said.append((done, of)))
    with torch.inference_mode():
        want = [int(int(model.eval()(**collate([e], 31, "right").inputs).logits.argmax()) == e.label) for e in ITEMS]
    assert 0 < sum(want) < len(want)
    assert [(item.id, item.correct) for item in items] == [(e.id, w) for e, w in zip(ITEMS, want, strict=True)]
    assert said[-1] == (40, 40)


def test_scoring_nothing_gives_nothing() -> None:
    assert classification.score(Encoder(), [], 0, 4, lambda done, of: None) == []
