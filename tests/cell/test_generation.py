"""Answers that are texts: how they become tokens, what a model writes, who judges it, and a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.assets.rows import AnsweredRow, TextRow
from harness.assets.rows import read as read_rows
from harness.assets.table import Source
from harness.cell.evaluation.likelihood import CausalScorer, generate
from harness.cell.evaluation.lm_eval_task import LmEvalTask
from harness.cell.training.batches import Example, Prompts, answered_examples, collate, order
from harness.cell.training.loop import loss_of
from harness.conformance.subject import configure
from harness.errors import Exit
from harness.methods.registry import discover
from harness.records.record import Accuracy, Record, Status, TrainingMeasured
from harness.suites import loader
from harness.suites.tasks import Answers
from harness.yaml_validation import load as read_yaml
from support import digit_task
from support.sandbox import ForkSandbox

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [
    AnsweredRow(f"r{i}", prompt, f"makes {prompt[-1]}") for i, prompt in enumerate(("ab1", "c2", "defgh3", "i4", "jk5"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digit_task.model(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.tokenizer = AutoTokenizer.from_pretrained(folder)
    return loaded


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "task.yaml"
    path.write_text(digit_task.TASK, encoding="utf-8")
    return read_yaml(path).data


# Tokens and loss


def read(model: Any, example: Example) -> tuple[str, str]:
    """Return an example's text, and the part of it that carries loss."""
    decode = model.tokenizer.decode
    return decode(example.tokens), decode(example.tokens[len(example.tokens) - example.answer :])


def of(model: Any, answer: str = " makes 1", limit: int = 60, loss: str = "answer", eos: bool = True) -> Example:
    return Prompts(model.tokenizer, limit).example("r", "Q: ab1\nA:", answer, loss, eos)


def prompt_tokens(prompts: Prompts, text: str) -> list[int]:
    return list(prompts.open("", text).tokens)


def test_prompt_and_answer_are_one_text_whose_answer_carries_the_loss(model: Any) -> None:
    assert read(model, of(model)) == ("<s>Q: ab1\nA: makes 1</s>", " makes 1</s>")
    assert read(model, of(model, eos=False)) == ("<s>Q: ab1\nA: makes 1", " makes 1")
    assert read(model, of(model, loss="all")) == ("<s>Q: ab1\nA: makes 1</s>", "Q: ab1\nA: makes 1</s>")
    assert not of(model).cut


@pytest.mark.parametrize(
    ("limit", "text", "scored"),
    [
        (19, "<s>Q: ab1\nA: makes 1</s>", " makes 1</s>"),  # it fits
        (18, "<s>: ab1\nA: makes 1</s>", " makes 1</s>"),  # the prompt loses its beginning, but not <s>
        (10, "<s> makes 1</s>", " makes 1</s>"),
        (9, "<s> makes 1", " makes 1"),  # the answer loses its end: a model is not taught to stop in its middle
        (4, "<s> ma", " ma"),
    ],
)
def test_what_is_too_long_is_cut(model: Any, limit: int, text: str, scored: str) -> None:
    example = of(model, limit=limit)
    assert read(model, example) == (text, scored)
    assert len(example.tokens) == min(limit, 19)
    assert example.cut == (limit < 19)
    everything = of(model, limit=limit, loss="all")
    assert everything.tokens == example.tokens
    assert everything.answer == len(everything.tokens) - 1


def test_a_text_alone_carries_loss_everywhere(model: Any) -> None:
    (example,) = answered_examples([TextRow("t", "abc")], Prompts(model.tokenizer, 60), _never, Answers())
    assert read(model, example) == ("<s>abc</s>", "abc</s>")


def _never(row: Any) -> tuple[str, str]:
    raise AssertionError("a text has no prompt")


def test_without_a_token_that_begins_texts_a_text_follows_the_one_that_ends_them(model: Any) -> None:
    plain = Prompts(_Unbegun(model.tokenizer), 60)
    assert read(model, plain.example("t", "", "abc", "all", False)) == ("</s>abc", "abc")
    assert read(model, plain.example("t", "a", "bc", "answer", False)) == ("abc", "bc")


class _Unbegun:
    """A tokenizer that puts nothing before a text, and takes `=1` for one token."""

    def __init__(self, real: Any) -> None:
        self.real, self.bos_token_id, self.eos_token_id = real, None, real.eos_token_id

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        pair = self.real.convert_tokens_to_ids("z")
        pieces = [self.real.encode(part, add_special_tokens=False) for part in text.split("=1")]
        return [token for i, piece in enumerate(pieces) for token in ([pair] if i else []) + piece]


def test_where_the_border_is_inside_a_token_the_two_are_tokenised_apart(model: Any) -> None:
    plain = Prompts(_Unbegun(model.tokenizer), 60)
    assert plain.pair("a=", "1") == (prompt_tokens(plain, "a="), prompt_tokens(plain, "1"))
    assert plain.pair("a", "=1") == (prompt_tokens(plain, "a"), prompt_tokens(plain, "z"))


@pytest.mark.parametrize("loss", ["answer", "all"])
def test_the_loss_is_the_mean_over_the_tokens_that_carry_it(model: Any, loss: str) -> None:
    examples = [of(model, answer, loss=loss) for answer in (" makes 1", " 7", " makes 1 ab")]
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            log_p = model(torch.tensor([example.tokens])).logits[0].double().log_softmax(-1)
            for at in range(len(example.tokens) - example.answer, len(example.tokens)):
                total, count = total - float(log_p[at - 1, example.tokens[at]]), count + 1
        batch = collate(examples, model.tokenizer.pad_token_id, "left")
        assert batch.scored == count
        assert f"{float(loss_of(model, batch)):.4f}" == f"{total / count:.4f}"


# Generation


def alone(model: Any, prompt: list[int], most: int) -> list[int]:
    """Write greedily, one prompt at a time, without cache, padding or transformers' own loop."""
    written: list[int] = []
    while len(written) < most and (not written or written[-1] != model.tokenizer.eos_token_id):
        logits = model(torch.tensor([prompt + written])).logits[0, -1]
        written.append(int(logits.argmax()))
    return written


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_what_is_written_is_the_likeliest_token_each_time(model: Any, batch: int) -> None:
    prompts = [prompt_tokens(Prompts(model.tokenizer, 60), f"Q: {row.prompt}\nA:") for row in ROWS]
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)  # a model's file may say so
    said: list[tuple[int, int]] = []
    got = generate(model.train(), model.tokenizer, prompts, [], 9, batch, lambda *done: said.append(done))
    with torch.no_grad():
        want = [model.tokenizer.decode(alone(model.eval(), p, 9), skip_special_tokens=True) for p in prompts]
    assert got == want
    assert len(set(got)) > 1
    assert said[-1] == (5, 5)


@pytest.mark.parametrize("implementation", ["fused", "hf-peft"])
def test_an_adapted_model_writes_what_it_computes_without_a_cache(folder: Path, implementation: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [prompt_tokens(Prompts(model.tokenizer, 60), f"Q: {row.prompt}\nA:") for row in ROWS]
    base = generate(model, model.tokenizer, prompts, [], 9, 5, lambda *_: None)
    config = configure("lora", {"rank": 4, "targets": ["q_proj", "k_proj", "v_proj", "down_proj"]})
    adapted = discover().find("method", "lora", implementation)(model, config, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        got = generate(model, model.tokenizer, prompts, [], 9, 5, lambda *_: None)
        want = [model.tokenizer.decode(alone(model.eval(), p, 9), skip_special_tokens=True) for p in prompts]
    assert got == want != base


def test_an_answer_ends_before_the_first_text_that_ends_answers(model: Any) -> None:
    prompts = [prompt_tokens(Prompts(model.tokenizer, 60), f"Q: {row.prompt}\nA:") for row in ROWS]
    whole = generate(model, model.tokenizer, prompts, [], 9, 5, lambda *_: None)
    longest = max(whole, key=len)
    end = longest[3:5]
    want = [text.partition(end)[0] for text in whole]
    steps: list[int] = []
    hook = model.register_forward_hook(lambda *_: steps.append(1))
    at = whole.index(longest)
    got = generate(model, model.tokenizer, prompts[at : at + 1], [end], 9, 1, lambda *_: None)
    hook.remove()
    assert got == [want[at]] != [longest]
    assert len(steps) == len(want[at]) + len(end) < len(longest), "nothing is computed behind the end"
    assert generate(model, model.tokenizer, prompts, [end, "\0"], 9, 5, lambda *_: None) == want


# The judge


class Rigged(CausalScorer):
    """Writes what it is told to."""

    def __init__(self, model: Any, written: dict[str, str]) -> None:
        super().__init__(model, model.tokenizer, 2, 60, lambda done, of: None)
        self.written, self.asked = written, []

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        self.asked += [request.args for request in requests]
        return [self.written[request.args[0]] for request in requests]


@pytest.mark.parametrize(
    ("judge", "right"), [("last-number", [1, 0, 1, 0, 1]), ("strict", [0, 0, 0, 0, 1])], ids=["last-number", "strict"]
)
def test_items_are_judged_by_the_filter_that_the_task_names(
    model: Any, spec: dict[str, Any], judge: str, right: list[int]
) -> None:
    answers = (" makes 1", " makes 3", " it is 9, no: 3", " four", " 5")
    rigged = Rigged(model, {f"Q: {row.prompt}\nA:": text for row, text in zip(ROWS, answers, strict=True)})
    task = LmEvalTask(spec, ROWS, judge)
    assert [(item.id, item.correct) for item in task.score(rigged)] == [
        (row.id, correct) for row, correct in zip(ROWS, right, strict=True)
    ]
    assert task.metric == f"exact match ({judge})"
    assert {how["max_gen_toks"] for _, how in rigged.asked} == {12}


def test_the_training_prompt_is_the_one_that_is_answered(model: Any, spec: dict[str, Any]) -> None:
    task = LmEvalTask(spec, ROWS, "strict")
    seen: list[Any] = []
    hook = model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["input_ids"]), with_kwargs=True)
    task.score(CausalScorer(model, model.tokenizer, 1, 60, lambda done, of: None))
    hook.remove()
    prompts = Prompts(model.tokenizer, 60)
    first = {tuple(ids[0].tolist()) for ids in seen if ids.shape[1] > 1}
    examples = answered_examples(ROWS, prompts, task.pair, Answers())
    assert first == {example.tokens[: -example.answer] for example in examples}


def test_prompts_that_were_cut_are_counted(model: Any, spec: dict[str, Any]) -> None:
    lengths = [len(prompt_tokens(Prompts(model.tokenizer, 60), f"Q: {row.prompt}\nA:")) for row in ROWS]
    for limit in {*lengths, min(lengths) - 1}:
        scorer = CausalScorer(model, model.tokenizer, 5, limit, lambda done, of: None)
        LmEvalTask(spec, ROWS, "strict").score(scorer)
        assert len(scorer.cut) == sum(length > limit for length in lengths)


@pytest.mark.slow
def test_a_model_that_is_taught_answers(folder: Path, spec: dict[str, Any], tmp_path: Path) -> None:
    source = Source.model_validate(
        {"name": "d", "kind": "data", "source": "file:d", "rows": {
            "format": "jsonl", "holds": "answers", "prompt": "query", "answer": "response"}}
    )  # fmt: skip
    taught = read_rows(source, digit_task.rows(tmp_path / "train", 400, seed=2))
    asked = read_rows(source, digit_task.rows(tmp_path / "test", 20, seed=1))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = LmEvalTask(spec, asked, "last-number")
    scorer = CausalScorer(model, tokenizer, 20, 40, lambda done, of: None)
    before = task.score(scorer)
    examples = answered_examples(taught, Prompts(tokenizer, 40), task.pair, Answers())
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 80)
    for group in order(examples, 80, 16, seed=0):
        optimizer.zero_grad()
        loss_of(model, collate(group, tokenizer.pad_token_id, "left")).backward()
        optimizer.step()
        schedule.step()
    after = task.score(scorer)
    assert [item.id for item in before] == [item.id for item in after]
    assert sum(item.correct for item in before) < len(asked) / 2 < sum(item.correct for item in after)


# A run: the suite `llama-8b` itself, with a small model on disk, local data and few steps

SOURCES = """\
sources:
  - name: digits-test
    kind: data
    source: file:test.jsonl
    rows: &rows {format: jsonl, holds: answers, prompt: query, answer: response}
  - {name: digits-train, kind: data, source: 'file:train.parquet', rows: {<<: *rows, format: parquet, longest: 12}}
matrix:
"""
SMALLER = {
    "llama-3.2-3b": "./model", "llama-3.1-8b": "./larger", "metamath-gsm8k": "task.yaml", "steps: 5000": "steps: 8",
    "warmup: 500": "warmup: 1", "max_tokens: 768": "max_tokens: 60", "lr: 1e-5": "lr: 1e-2",
    "tinit: 200": "tinit: 2", "tfinal: 500": "tfinal: 2", "items: 1319": "items: 6", "batch: 50": "batch: 6",
    "tokens: 512, passes: 102": "tokens: 8, passes: 6", "matrix:\n": SOURCES,
}  # fmt: skip
OF_TASK = {"data: gsm8k": "data: digits-test", "train: metamathqa": "train: digits-train", "test: 1319": "test: 20",
           "max_gen_toks: 300": "max_gen_toks: 10"}  # fmt: skip


def rehearsed(folder: Path) -> Path:
    """Write `llama-8b` so that this machine can run it; return its path."""
    import pyarrow
    import pyarrow.parquet

    digit_task.model(folder / "model", positions=80)
    (folder / "larger").symlink_to("model")
    digit_task.rows(folder / "test.jsonl", 30, seed=1, says="####")
    lines = digit_task.rows(folder / "train.jsonl", 100, seed=2, says="####").read_text(encoding="utf-8").splitlines()
    told = [*map(json.loads, lines), {"id": "long", "query": "a" * 10, "response": "#### 1"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(told), folder / "train.parquet")
    for name, path, changes in (
        ("llama-8b.yaml", folder / "suite.yaml", SMALLER),
        ("tasks/metamath-gsm8k.yaml", folder / "task.yaml", OF_TASK),
    ):
        text = (loader.data_folder("suites") / name).read_text(encoding="utf-8")
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
    return folder / "suite.yaml"


@pytest.mark.nightly
def test_llama_8b_rehearsed(fork_sandbox: ForkSandbox) -> None:
    path = rehearsed(fork_sandbox.folder)
    plan = loader.load(path).plan
    original = loader.load("llama-8b").plan
    assert list(plan.ids.values()) == list(original.ids.values())
    wanted = {("full", "reference"), ("lora-r32", "hf-peft")}
    chosen = [c.cell_id for c in plan.cells if (plan.ids[c.cell_id], c.implementation) in wanted]
    finished = fork_sandbox.command("run", str(path), "--out", "run", "--only", ",".join(chosen))
    assert finished.code == Exit.PASS, finished.err + finished.out
    run = fork_sandbox.read()
    assert [record.status for record in run.records] == [Status.OK] * 2
    cells = {plan.ids[record.cell_id]: record for record in run.records}
    full, lora = (accuracy(cells[name]) for name in ("full", "lora-r32"))
    assert trained(cells["full"]).losses[-1] < trained(cells["full"]).losses[0]
    assert [item.id for item in full.items] == [item.id for item in lora.items]
    assert {item.id.partition("-")[0] for item in full.items} == {"test"}
    assert (full.metric, full.scored_by[:8]) == ("exact match (flexible-extract)", "lm-eval ")
    orders = {trained(cells[name]).data_order_sha256 for name in ("full", "lora-r32")}
    assert len(orders) == 1, "every method of a seed sees the same texts in the same order"
    assert "all tokens but the first, with an end-of-sequence token" in trained(cells["full"]).text_rules
    assert trained(cells["full"]).cut_examples == 0
    used = cells["full"].assets
    assert [asset.name for asset in used] == ["./model", "digits-test", "digits-train", "task.yaml"]
    assert all(asset.sha256 for asset in used)


def accuracy(record: Record) -> Accuracy:
    assert record.measurements is not None, record.because
    assert record.measurements.accuracy is not None
    return record.measurements.accuracy


def trained(record: Record) -> TrainingMeasured:
    assert record.measurements is not None, record.because
    assert record.measurements.training is not None
    return record.measurements.training
