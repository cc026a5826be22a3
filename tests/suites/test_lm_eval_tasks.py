"""lm-eval's own tasks by name: found without importing it, their data fetched once, trained and scored as they say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.assets import fetch, lm_eval_files
from harness.assets.table import resolve
from harness.cell.data import CellData
from harness.cell.job import Asset, Job
from harness.cli import main
from harness.errors import AssetError, Exit, UsageError
from harness.records.record import AssetUse, Cell
from harness.runner import task_assets
from harness.suites import loader, tasks
from support import digit_task

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Tasks as lm-eval has them: a file that includes another, and functions in Python beside it.
FILES = {
    "_digits": """\
dataset_path: json
dataset_kwargs: {data_files: {train: TRAIN, test: TEST}}
training_split: train
test_split: test
fewshot_split: train
num_fewshot: 2
process_docs: !function helpers.only_short
metadata: {version: 1.0}
""",
    "digits_written.yaml": """\
include: _digits
task: digits_written
output_type: generate_until
doc_to_text: "Q: {{query}}\\nA:"
doc_to_target: "{{response}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
filter_list:
  - {name: strict, filter: [{function: regex, regex_pattern: "^ ?([0-9])$"}, {function: take_first}]}
  - {name: number, filter: [{function: regex, regex_pattern: "([0-9])", group_select: -1}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: [".*makes "]}
""",
    "choice.yaml": """\
include: _digits
task: digits_chosen
output_type: multiple_choice
doc_to_text: !function helpers.question
doc_to_target: !function helpers.digit
doc_to_choice: ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "untaught.yaml": """\
task: untaught
dataset_path: org/data
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{q}}"
doc_to_target: label
doc_to_choice: [a, b]
""",
    "sampled.yaml": """\
task: sampled
dataset_path: json
test_split: train
output_type: generate_until
generation_kwargs: {do_sample: true}
""",
    "rolling.yaml": "task: rolling\ndataset_path: json\ntest_split: train\noutput_type: loglikelihood_rolling\n",
    "program.yaml": "task: program\nclass: !function helpers.Program\n",
    "helpers.py": """\
def only_short(docs):
    return docs.filter(lambda doc: len(doc["query"]) < 10)

def question(doc):
    return f"Q: {doc['query']}"

def digit(doc):
    return int(doc["query"][-1])
""",
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the files above in the place of lm-eval's tasks."""
    (folder := tmp_path / "tasks" / "digits").mkdir(parents=True)
    for name, part, seed in (("train", 60, 2), ("test", 6, 1)):
        path = digit_task.rows(tmp_path / f"{name}.jsonl", part, seed)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"id": "long", "query": "a" * 20, "response": "makes 1"}) + "\n")
    for name, text in FILES.items():
        text = text.replace("TRAIN", str(tmp_path / "train.jsonl")).replace("TEST", str(tmp_path / "test.jsonl"))
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(lm_eval_files, "tasks_folder", lambda: tmp_path / "tasks")
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def suite(folder: Path, task: str, more: str = "") -> Path:
    if not (folder / "model").is_dir():
        digit_task.model(folder / "model", positions=128)
    path = folder / "suite.yaml"
    path.write_text(
        f"suite: own\nmatrix:\n  - model: ./model\n    task: {task}\n    method: lora\n"
        f"    training: {{steps: 3, batch: 4, max_tokens: 80}}\n    evaluation: {{items: 5, batch: 2}}\n{more}",
        encoding="utf-8",
    )
    return path


def data_of(path: Path, **change: Any) -> tuple[CellData, Any, Cell]:
    loaded = loader.load(path)
    (cell,) = loaded.plan.cells
    cell = cell.model_copy(update=change)
    source = resolve("./model", {}, path.parent)
    model = Asset(path=str(path.parent / "model"), source=source, use=AssetUse(name="m", source="m"))

    def fetched(one: Any) -> Asset:
        return Asset(path=str(fetch.ensure(one)), source=one, use=fetch.asset_use(one))

    data, task = task_assets.ready(loaded.tasks[cell.task], cell.evaluation.items, "here:1", fetched)
    work = Job(run="r", folder="f", attempt=1, cell=cell, model=model, data=data, task=task, device="cpu", launched=0.0)
    causal = AutoModelForCausalLM.from_pretrained(model.path)
    held: Any = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(model.path), model=causal, head={})
    return CellData(work, held, lambda *_, **__: None), held, cell


@pytest.mark.slow
def test_a_generative_task_trains_on_its_own_split_and_is_scored_on_its_own(own: Path) -> None:
    data, held, _ = data_of(suite(own, "lm-eval:digits_written:number"))
    decode = held.tokenizer.decode
    texts = [decode(ids[mask.bool()]) for b in data.batches for ids, mask in zip(*_inputs(b), strict=True)]
    assert len(texts) == 12
    assert all(text.startswith("<s>Q: ") and text.endswith("</s>") and " makes " in text for text in texts)
    assert {b.answers for b in data.batches} == {(9 + 1 - 1,) * 4}  # ` makes 3` and the end
    seen: list[str] = []
    hook = held.model.register_forward_pre_hook(
        lambda m, a, kw: seen.extend(map(decode, kw["input_ids"])), with_kwargs=True
    )
    result = data.evaluate(held.model)
    hook.remove()
    assert [item.id for item in result.items] == [f"test-{i}" for i in range(5)]
    assert result.metric == "exact match (number)"
    prompts = [text for text in seen if text.count("Q: ") > 1]
    assert len(prompts) == 5, "each question stands behind examples"
    assert all(text.count(" makes ") == 2 for text in prompts)
    assert data.text_rules.startswith("loss over the answer's tokens alone")


def _inputs(batch: Any) -> tuple[Any, Any]:
    return batch.inputs["input_ids"], batch.inputs["attention_mask"]


def test_a_task_of_choices_trains_on_the_right_one(own: Path) -> None:
    path = suite(own, "lm-eval:digits_chosen")  # its file has another name
    data, held, _ = data_of(path)
    decode = held.tokenizer.decode
    for batch in data.batches:
        assert batch.answers == (2,) * 4
        for ids in batch.inputs["input_ids"]:
            text = decode(ids).split("<pad>")[-1]
            assert text[-3] + text[-1] == text[-1] * 2, f"{text} ends with the digit that it asks for"
    assert [item.id for item in data.evaluate(held.model).items] == [f"test-{i}" for i in range(5)]


def test_choices_may_have_a_filter_of_their_own(own: Path) -> None:
    with (own / "tasks" / "digits" / "choice.yaml").open("a", encoding="utf-8") as file:
        file.write("filter_list: [{name: likeliest, filter: [{function: take_first}]}]\n")
    data, held, _ = data_of(suite(own, "lm-eval:digits_chosen"))
    assert len(data.evaluate(held.model).items) == 5


def test_what_the_test_asks_is_not_trained_on(own: Path) -> None:
    (own / "train.jsonl").write_text((own / "test.jsonl").read_text() + '{"query": "zz9", "response": "makes 9"}\n')
    data, held, _ = data_of(suite(own, "lm-eval:digits_chosen"), evaluation=SimpleNamespace(items=6, batch=2, skip=0))
    texts = {held.tokenizer.decode(ids) for b in data.batches for ids in b.inputs["input_ids"]}
    assert texts == {"Q: zz9 9"}


def test_a_search_is_scored_on_the_items_after_those_of_the_ranking(own: Path) -> None:
    path = suite(own, "lm-eval:digits_written:number")
    data, held, _ = data_of(path, evaluation=SimpleNamespace(items=2, batch=2, skip=3))
    seen: list[str] = []
    hook = held.model.register_forward_pre_hook(
        lambda m, a, kw: seen.extend(map(held.tokenizer.decode, kw["input_ids"])), with_kwargs=True
    )
    assert [item.id for item in data.evaluate(held.model).items] == ["test-3", "test-4"]
    hook.remove()
    rows = [json.loads(line) for line in (own / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [text for text in seen if text.count("Q: ") > 1]
    asked = {text.rpartition("Q: ")[2].partition("\n")[0] for text in prompts}
    assert asked == {row["query"] for row in rows[3:5]}


def test_items_that_the_task_itself_drops_are_missed(own: Path) -> None:
    with pytest.raises(UsageError, match="items 1 to 7 are selected, and digits_chosen tests 6"):
        data_of(suite(own, "lm-eval:digits_chosen"), evaluation=SimpleNamespace(items=7, batch=2, skip=0))


def test_data_are_fetched_once_and_have_a_hash(own: Path) -> None:
    source = tasks.load("lm-eval:digits_chosen", own, {}).data
    first = fetch.ensure(source)
    assert fetch.ensure(source) == first
    assert sorted(path.name for path in first.iterdir()) == ["test.parquet", "train.parquet"]
    before = fetch.asset_use(source)
    assert len(before.sha256) == 64
    digit_task.rows(own / "test.jsonl", 6, seed=9)
    assert fetch.ensure(source) != first, "other files are other data"
    assert fetch.asset_use(source).sha256 != before.sha256


def test_local_files_that_cannot_be_read_are_not_the_hubs(own: Path) -> None:
    source = tasks.load("lm-eval:digits_chosen", own, {}).data
    (own / "train.jsonl").write_text("{broken\n", encoding="utf-8")
    with pytest.raises(AssetError, match="cannot read the files of lm-eval:digits_chosen: ") as caught:
        fetch.ensure(source)
    assert "train.jsonl" in (caught.value.hint or "")
    (own / "train.jsonl").unlink()
    with pytest.raises(AssetError, match="cannot read the files of lm-eval:digits_chosen: Unable to find"):
        fetch.ensure(source)


@pytest.mark.slow
def test_hub_data_are_read_at_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path))
    asked: list[Any] = []

    def load(*what: Any, **options: Any) -> Any:
        asked.append((what, options))
        return datasets.Dataset.from_dict({"question": ["1+1?"], "answer": ["two #### 2"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = tasks.load(f"lm-eval:gsm8k:flexible-extract@{COMMIT}", tmp_path, {})  # lm-eval's own file
    assert task.answers is not None
    assert (task.filter, task.trains) == ("flexible-extract", True)
    folder = fetch.ensure(task.data)
    assert asked == [(("openai/gsm8k", "main"), {"split": split, "revision": COMMIT}) for split in ("test", "train")]
    use = fetch.asset_use(task.data)
    assert (use.source, use.revision, len(use.sha256)) == ("lm-eval:gsm8k", COMMIT, 64)
    from harness.cell.evaluation.lm_eval_task import BuiltinLmEvalTask

    own = BuiltinLmEvalTask(task.path, folder, range(1), "flexible-extract")
    assert own.training() == []  # the only question is in the test
    (row,) = own.tested()
    assert own.pair(row) == ("Question: 1+1?\nAnswer:", " two #### 2")


MISTAKES = {
    "lm-eval:digits_writen": ("lm-eval has no task `digits_writen`", "did you mean `digits_written`"),
    "lm-eval:digits_written": ("has 2 filters", "lm-eval:digits_written:strict, lm-eval:digits_written:number"),
    "lm-eval:digits_written:loose": ("has 2 filters", "lm-eval:digits_written:number"),
    "lm-eval:untaught": ("does not pin its data, org/data", "write lm-eval:untaught@ and the 40 hex digits"),
    f"lm-eval:untaught@{COMMIT}": ("has no training split, but `steps` is 3", "write `steps: 0`"),
    "lm-eval:sampled": ("samples its answers", "write your own task"),
    "lm-eval:rolling": ("has the output type 'loglikelihood_rolling'", "multiple_choice or generate_until"),
    "lm-eval:program": ("is a Python class", "described in YAML"),
    "lm-eval:a b": ("names no task of lm-eval", "write lm-eval:TASK"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_run_is_said_by_plan(name: str, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = suite(own, f'"{name}"')
    assert main(["plan", str(path)]) == Exit.USAGE
    said = capsys.readouterr().err
    what, hint = MISTAKES[name]
    assert f"{path}:{6 if 'training split' in what else 4}: " in said
    assert what in said
    assert hint in said.partition("hint: ")[2]


def test_more_items_than_there_are_is_said_with_its_place_before_anything_runs(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = suite(own, "[lm-eval:digits_chosen, lm-eval:digits_written:number]")
    path.write_text(path.read_text().replace("items: 5", "items: 50"), encoding="utf-8")
    assert main(["run", str(path), "--out", str(own / "out")]) == Exit.USAGE
    said = capsys.readouterr().err
    for task in ("digits_chosen", "digits_written:number"):
        assert f"{path}:7: `items` is 50, those of `tune` included, and lm-eval:{task} has 7 test items" in said
