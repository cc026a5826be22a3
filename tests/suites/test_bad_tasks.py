"""Tasks and local data that are wrong: found by `plan` and `run` before anything runs, with place and mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cli import main
from harness.errors import Exit, SuiteError
from harness.suites import loader

SUITE = """\
suite: small
matrix:
  - model: tiny-llama
    task: toy-sentiment
    method: lora
    training: {steps: 4, batch: 2}
    evaluation: {items: 3}
"""
TASK = (loader.data_folder("suites") / "tasks" / "toy-sentiment.yaml").read_text(encoding="utf-8")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = main(argv)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return code, printed.err


@pytest.mark.parametrize(
    ("change", "line", "message", "hint"),
    [
        (("test: 64", "test: many"), 14, "`test` is 'many'", "write a whole number"),
        (("  test: 64\n", ""), 9, "`test` is missing", "add `test:`"),
        (("labels: 2", "labels: 3"), 13, "`labels` is 3, but `doc_to_choice` has 2", "make them agree"),
        (
            ("data: toy-sentiment", "data: toy-sentimnt"),
            11,
            "no model or data set named 'toy-sentimnt'",
            "did you mean",
        ),
        (("data: toy-sentiment", "data: tiny-llama"), 11, "`tiny-llama` is a model", "kind data"),
        (("output_type: multiple_choice\n", ""), 1, "`output_type` is missing", "an lm-eval task needs"),
        (
            ("output_type: multiple_choice", "output_type: [multiple_choice]"),
            2,
            "`output_type` is ['multiple_choice']",
            "write one of multiple_choice, generate_until",
        ),
        (
            ("output_type: multiple_choice", "output_type: loglikelihood_rolling"),
            2,
            "`output_type` is 'loglikelihood_rolling'",
            "write one of multiple_choice, generate_until",
        ),
        (
            ("metric_list:\n  - {metric: acc,", "metric_list:\n  - {metric: acc_norm,"),
            7,
            "`metric_list` has no `acc`",
            "add {metric: acc}",
        ),
        (("doc_to_target: label", "doc_to_target: answer"), 4, "`doc_to_target` is 'answer'; training", "write label"),
        (("doc_to_target: label", 'doc_to_target: "{{1 - label}}"'), 4, "`doc_to_target` is", "write label"),
        (("doc_to_text: ", "num_fewshot: 3\ndoc_to_text: "), 3, "`num_fewshot` is not supported", "`doc_to_text`"),
        (("doc_to_text: ", "description: Judge.\ndoc_to_text: "), 3, "`description` is not supported", "`doc_to_text`"),
        (("doc_to_text: ", "test_split: test\ndoc_to_text: "), 3, "`test_split` is not supported", "from `metadata`"),
        (
            ("doc_to_text: ", "process_docs: f\ndoc_to_text: "),
            3,
            "`process_docs` is not supported",
            "supported keys: task",
        ),
        (("doc_to_text: ", "target_delimeter: x\ndoc_to_text: "), 3, "`target_delimeter` is not", "`target_delimiter`"),
        (('target_delimiter: " "', "target_delimiter: 1"), 6, "`target_delimiter` is 1", "in quotes"),
        (
            ("{{text}}", "{{sentence}}"),
            3,
            "`doc_to_text` uses `sentence`, but rows have no such key",
            "id, text, label",
        ),
        (("{{text}}", "{{text}"), 3, "`doc_to_text` is not a template", "correct its braces"),
        (('doc_to_text: "{{text}} ="', "doc_to_text: 1"), 3, "`doc_to_text` is 1", "write a text in quotes"),
        (
            ("text: text", "text: review"),
            12,
            "`text` is `review`, but rows have id, text, label",
            "rows: {text: review}",
        ),
        (("metadata:", "metadata: none\nmeta:"), 9, "`metadata` is 'none'", "write keys and values"),
        (("doc_to_target: label", "doc_to_target: !function f.g"), 4, "the tag `!function`", "write a plain value"),
    ],
)
def test_bad_task(
    change: tuple[str, str], line: int, message: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = TASK.partition("\n")[2] if TASK.startswith("#") else TASK
    assert change[0] in body
    task, suite = tmp_path / "task.yaml", tmp_path / "suite.yaml"
    task.write_text(body.replace(*change), encoding="utf-8")
    suite.write_text(SUITE.replace("task: toy-sentiment", "task: task.yaml"), encoding="utf-8")
    code, said = run(capsys, "plan", str(suite))
    assert code == Exit.USAGE
    assert f"{task}:{line}: {message}" in said
    assert hint in said


def test_mistakes_of_the_shape_of_a_task_come_first(tmp_path: Path) -> None:
    body = TASK.partition("\n")[2] if TASK.startswith("#") else TASK
    body = body.replace("doc_to_target: label", "doc_to_target: label\ndoc_to_target: !env TARGET")
    body = body.replace("{{text}}", "{{txt}}").replace("test: 64", "test: many")
    suite = tmp_path / "suite.yaml"
    suite.write_text(SUITE.replace("task: toy-sentiment", "task: task.yaml").replace("method: lora", "method: lorra"))
    for text, found in (
        (body, ["task.yaml:5 `doc_to_target` is given twice, first in line 4", "task.yaml:15 `test` is 'many'"]),
        (
            body.replace("test: many", "test: 64").replace("doc_to_target: !env TARGET\n", ""),
            ["task.yaml:3 `doc_to_text` uses `txt`, but rows have no such key"],
        ),
    ):
        (tmp_path / "task.yaml").write_text(text)
        with pytest.raises(SuiteError) as caught:
            loader.load(suite)
        assert [p.where.rpartition("/")[2] + " " + p.what for p in caught.value.problems] == [
            "suite.yaml:5 unknown method `lorra`",
            *found,
        ]


ANSWERED = """\
task: digits
output_type: generate_until
doc_to_text: "Q: {{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 8}
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "([0-9])"}, {function: take_first}]}
metric_list:
  - {metric: exact_match}
metadata: {data: asked, train: taught, test: 2, shuffle_seed: 0}
"""
ANSWERED_SOURCES = """\
sources:
  - {name: asked, kind: data, source: 'file:asked.jsonl', rows: {format: jsonl, holds: answers}}
  - {name: taught, kind: data, source: 'file:taught.csv', rows: {format: csv, holds: text}}
  - {name: labelled, kind: data, source: 'file:asked.jsonl', rows: {format: jsonl}}
matrix:
"""
ASKED = '{"prompt": "a", "answer": "1"}\n{"prompt": "b", "answer": "2"}\n'
TAUGHT = "text\nsome text\nand more\n"


def answered(folder: Path, task: str = ANSWERED, asked: str = ASKED, taught: str = TAUGHT, suite: str = SUITE) -> Path:
    """Write a suite with a generative task, its test and its training set; return its path."""
    for name, text in (("task.yaml", task), ("asked.jsonl", asked), ("taught.csv", taught)):
        (folder / name).write_text(text, encoding="utf-8")
    path = folder / "suite.yaml"
    text = suite.replace("items: 3", "items: 2").replace("task: toy-sentiment", "task: task.yaml")
    path.write_text(text.replace("matrix:\n", ANSWERED_SOURCES), encoding="utf-8")
    return path


def test_a_sound_generative_task(tmp_path: Path) -> None:
    (task,) = loader.load(answered(tmp_path)).tasks.values()
    assert task.answers is not None
    assert (task.filter, task.answers.loss, task.answers.eos) == ("first", "answer", True)
    assert task.train is not None


@pytest.mark.parametrize(
    ("change", "line", "message", "hint"),
    [
        (("{{prompt}}", "{{text}}"), 3, "`doc_to_text` uses `text`, but rows have no such key", "id, prompt, answer"),
        (('until: ["."], ', ""), 5, "`until` is None", "list the texts that end an answer"),
        (("max_gen_toks: 8", "max_gen_toks: 0"), 5, "`max_gen_toks` is 0", "at least 1"),
        (
            ("max_gen_toks: 8", "temperature: 0.7"),
            5,
            "`temperature` is 0.7: answers are generated greedily",
            "remove it",
        ),
        (("max_gen_toks: 8", "num_beams: 4"), 5, "`num_beams` is not supported", "remove it"),
        (("filter: [{function: regex,", "filter: [{regex,"), 7, "not a filter", "function: take_first"),
        (("function: regex,", "function: regx,"), 7, "lm-eval has no filter function `regx`", "did you mean `regex`?"),
        (("([0-9])", "([0-9]"), 7, "`regex_pattern` is not a pattern", "correct it"),
        (("exact_match", "acc"), 8, "`metric_list` has no `exact_match`", "add {metric: exact_match}"),
        (("shuffle_seed: 0", "shuffle_seed: 0, filter: last"), 10, "`filter` is `last`, but", "write one of first"),
        (
            ("metric_list", "  - {name: b, filter: [{function: take_first}]}\nmetric_list"),
            11,
            "`filter` is missing",
            "first, b",
        ),
        (("train: taught", "train: tought"), 10, "no model or data set named 'tought'", "did you mean 'taught'"),
        (("train: taught", "train: labelled"), 10, "rows of labelled have labels", "write `rows: {holds: answers"),
        (
            ("data: asked", "data: taught"),
            10,
            "rows of taught have text, but this task's `data` needs",
            "holds: answers",
        ),
        (("shuffle_seed: 0", "shuffle_seed: 0, loss: prompt"), 10, "`loss` is 'prompt'", "answer"),
        (("test: 2", "test: 3"), 1, "asked has 2 rows, and the task tests 3", "at most 2"),
    ],
)
def test_bad_generative_task(
    change: tuple[str, str], line: int, message: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert change[0] in ANSWERED
    code, said = run(capsys, "plan", str(answered(tmp_path, ANSWERED.replace(*change))))
    assert code == Exit.USAGE
    where = "asked.jsonl" if "rows, and" in message else "task.yaml"
    assert f"{tmp_path / where}:{line}: " in said
    assert message in said
    assert hint in said.partition(message)[2]


def test_all_mistakes_of_both_sets_and_the_suite_come_at_once(tmp_path: Path) -> None:
    path = answered(
        tmp_path,
        asked='{"prompt": "a"}\n{"prompt": "", "answer": "2"}\n{"prompt": "c", "answer": 3}\n',
        taught="body\nsome text\n",
        suite=SUITE.replace("method: lora", "method: lorra"),
    )
    with pytest.raises(SuiteError) as caught:
        loader.load(path)
    assert [(Path(p.where).name, p.what) for p in caught.value.problems] == [
        ("asked.jsonl:1", "cannot read asked: no column 'answer'; there are prompt"),
        ("asked.jsonl:2", "cannot read asked: the prompt is empty"),
        ("asked.jsonl:3", "cannot read asked: the answer is 3, which is no text"),
        ("suite.yaml:9", "unknown method `lorra`"),
        ("taught.csv:2", "cannot read taught: no column 'text'; there are body"),
    ]


def test_one_set_may_be_tested_and_train_and_is_then_counted_for_both(tmp_path: Path) -> None:
    both = ANSWERED.replace("train: taught", "train: asked")
    three = ASKED + '{"prompt": "c", "answer": "3"}\n'
    assert loader.load(answered(tmp_path, both, asked=three)).tasks
    with pytest.raises(SuiteError, match="asked has 2 rows, and the task tests 2 of them: none is left"):
        loader.load(answered(tmp_path, both))


def test_an_encoder_writes_no_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(capsys, "plan", str(answered(tmp_path, suite=SUITE.replace("tiny-llama", "minilm-l6"))))
    assert code == Exit.USAGE
    assert "suite.yaml:8: task.yaml is for causal models, but minilm-l6 is an encoder" in said


# Local data: (what the file holds, line in it, message, mend). The task keeps 3 rows for its test.
BAD_DATA = {
    "a label beyond the labels": (
        "id,text,label\na,one,0\nb,two,7\nc,three,1\nd,four,1\n",
        3,
        "label 7 of row `b`; the task's `labels` allows 0 to 1",
        "correct the row",
    ),
    "no such column": ("id,review,label\na,one,0\n", 2, "no column 'text'; there are id, review, label", "rows in"),
    "a label that is a word": ("text,label\none,0\ntwo,good\n", 3, "label 'good' is no integer", "rows in the table"),
    "an empty text": ("text,label\none,0\n,1\n", 3, "the text is empty", "rows in the table"),
    "too few rows": ("text,label\none,0\ntwo,1\nthree,1\n", 1, "has 3 rows, and the task tests 3", "to at most 2"),
    "nothing": ("", 1, "no rows", "rows in the table"),
}


def local_data(folder: Path, content: str | None) -> Path:
    """Write a suite whose task reads `reviews.csv`, which holds `content`; return the suite's path."""
    task = TASK.replace("data: toy-sentiment", "data: reviews").replace("test: 64", "test: 3")
    (folder / "task.yaml").write_text(task, encoding="utf-8")
    if content is not None:
        (folder / "reviews.csv").write_text(content, encoding="utf-8")
    path = folder / "suite.yaml"
    row = "{name: reviews, kind: data, source: 'file:reviews.csv', rows: {format: csv}}"
    text = SUITE.replace("task: toy-sentiment", "task: task.yaml")
    path.write_text(text.replace("matrix:", f"sources:\n  - {row}\nmatrix:"), encoding="utf-8")
    return path


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_local_data_are_found_before_anything_runs(
    name: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content, line, message, hint = BAD_DATA[name]
    monkeypatch.chdir(tmp_path)
    code, said = run(capsys, verb, str(local_data(tmp_path, content)))
    assert code == Exit.USAGE
    assert "1 mistake in the suite" in said
    assert f"{tmp_path / 'reviews.csv'}:{line}: " in said
    assert message in said
    assert hint in said.partition("hint: ")[2]
    assert not (tmp_path / "results").exists()


def test_a_local_data_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(capsys, "plan", str(local_data(tmp_path, None)))
    assert code == Exit.USAGE
    assert f"{tmp_path / 'task.yaml'}:12: no file for reviews ({tmp_path / 'reviews.csv'})" in said
    assert "hint: correct its path" in said


def test_sound_local_data(tmp_path: Path) -> None:
    assert loader.load(local_data(tmp_path, "text,label\none,0\ntwo,1\nthree,1\nfour,0\n")).entries


def test_mistakes_in_data_come_with_those_of_the_suite(tmp_path: Path) -> None:
    path = local_data(tmp_path, "text,label\none,0\ntwo,5\nthree,x\nfour,x\n,1\n")
    path.write_text(path.read_text(encoding="utf-8").replace("method: lora", "method: lorra"), encoding="utf-8")
    with pytest.raises(SuiteError) as caught:
        loader.load(path)
    places = [(Path(p.where).name, p.what) for p in caught.value.problems]
    assert [place for place, _ in places] == ["reviews.csv:3", "reviews.csv:4", "reviews.csv:6", "suite.yaml:7"]


def test_of_many_wrong_rows_the_first_are_shown(tmp_path: Path) -> None:
    path = local_data(tmp_path, "text,label\n" + "".join(f"text {n},{n}\n" for n in range(100)))
    with pytest.raises(SuiteError) as caught:
        loader.load(path)
    *shown, rest = caught.value.problems
    assert [p.what.partition(" of")[0] for p in shown] == [f"label {n}" for n in range(2, 7)]
    assert rest.what == "93 more mistakes from here on"
    assert rest.where == f"{tmp_path / 'reviews.csv'}:9"
