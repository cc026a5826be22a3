"""Tasks and local data that are wrong: found by `plan` and `run` before anything runs, with place and mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import suites
from harness.cli import main
from harness.errors import Exit, SuiteError

SUITE = """\
suite: small
matrix:
  - model: tiny-llama
    task: toy-sentiment
    method: lora
    training: {steps: 4, batch: 2}
    evaluation: {items: 3}
"""
TASK = (suites.folder("suites") / "tasks" / "toy-sentiment.yaml").read_text(encoding="utf-8")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = main(argv)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return code, printed.err


@pytest.mark.parametrize(
    ("change", "line", "message", "mend"),
    [
        (("test: 64", "test: many"), 14, "`test` is 'many'", "write a whole number"),
        (("  test: 64\n", ""), 9, "`test` is missing", "add `test`"),
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
            ("output_type: multiple_choice", "output_type: loglikelihood_rolling"),
            2,
            "`output_type` is 'loglikelihood_rolling'",
            "offered: multiple_choice, generate_until",
        ),
        (
            ("metric_list:\n  - {metric: acc,", "metric_list:\n  - {metric: acc_norm,"),
            7,
            "`metric_list` has no `acc`",
            "add {metric: acc}",
        ),
        (("doc_to_target: label", "doc_to_target: answer"), 4, "`doc_to_target` is 'answer'; training", "write label"),
        (("doc_to_target: label", 'doc_to_target: "{{1 - label}}"'), 4, "`doc_to_target` is", "write label"),
        (("doc_to_text: ", "num_fewshot: 3\ndoc_to_text: "), 3, "`num_fewshot` is not honoured", "`doc_to_text`"),
        (("doc_to_text: ", "description: Judge.\ndoc_to_text: "), 3, "`description` is not honoured", "`doc_to_text`"),
        (("doc_to_text: ", "test_split: test\ndoc_to_text: "), 3, "`test_split` is not honoured", "from `metadata`"),
        (("doc_to_text: ", "process_docs: f\ndoc_to_text: "), 3, "`process_docs` is not honoured", "honoured: task"),
        (("doc_to_text: ", "target_delimeter: x\ndoc_to_text: "), 3, "`target_delimeter` is not", "`target_delimiter`"),
        (('target_delimiter: " "', "target_delimiter: 1"), 6, "`target_delimiter` is 1", "in quotes"),
        (("{{text}}", "{{sentence}}"), 3, "`doc_to_text` uses `sentence`, which no row has", "id, text, label"),
        (("{{text}}", "{{text}"), 3, "`doc_to_text` is no template", "mend its braces"),
        (('doc_to_text: "{{text}} ="', "doc_to_text: 1"), 3, "`doc_to_text` is 1", "write a text in quotes"),
        (
            ("text: text", "text: review"),
            12,
            "`text` is `review`, but a row has id, text, label",
            "rows: {text: review}",
        ),
        (("metadata:", "metadata: none\nmeta:"), 9, "`metadata` is 'none'", "write keys and values"),
        (("doc_to_target: label", "doc_to_target: !function f.g"), 4, "a tag, `!function`", "write a plain value"),
    ],
)
def test_bad_task(
    change: tuple[str, str], line: int, message: str, mend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = TASK.partition("\n")[2] if TASK.startswith("#") else TASK
    assert change[0] in body
    task, suite = tmp_path / "task.yaml", tmp_path / "suite.yaml"
    task.write_text(body.replace(*change), encoding="utf-8")
    suite.write_text(SUITE.replace("task: toy-sentiment", "task: task.yaml"), encoding="utf-8")
    code, said = run(capsys, "plan", str(suite))
    assert code == Exit.USAGE
    assert f"{task}:{line}: {message}" in said
    assert mend in said


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
    "too few rows": ("text,label\none,0\ntwo,1\nthree,1\n", 1, "has 3 rows, and the task keeps 3", "to at most 2"),
    "nothing": ("", 1, "not one row", "rows in the table"),
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
    content, line, message, mend = BAD_DATA[name]
    monkeypatch.chdir(tmp_path)
    code, said = run(capsys, verb, str(local_data(tmp_path, content)))
    assert code == Exit.USAGE
    assert "1 mistake in the suite" in said
    assert f"{tmp_path / 'reviews.csv'}:{line}: " in said
    assert message in said
    assert mend in said.partition("mend: ")[2]
    assert not (tmp_path / "results").exists()


def test_a_local_data_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(capsys, "plan", str(local_data(tmp_path, None)))
    assert code == Exit.USAGE
    assert f"{tmp_path / 'task.yaml'}:12: no file for reviews ({tmp_path / 'reviews.csv'})" in said
    assert "mend: correct its path" in said


def test_sound_local_data(tmp_path: Path) -> None:
    assert suites.load(local_data(tmp_path, "text,label\none,0\ntwo,1\nthree,1\nfour,0\n")).entries


def test_mistakes_in_data_come_with_those_of_the_suite(tmp_path: Path) -> None:
    path = local_data(tmp_path, "text,label\none,0\ntwo,5\nthree,x\nfour,x\n,1\n")
    path.write_text(path.read_text(encoding="utf-8").replace("steps: 4", "steps: -4"), encoding="utf-8")
    with pytest.raises(SuiteError) as caught:
        suites.load(path)
    places = [(Path(p.where).name, p.what) for p in caught.value.problems]
    assert [place for place, _ in places] == ["reviews.csv:3", "reviews.csv:4", "reviews.csv:6", "suite.yaml:8"]


def test_of_many_wrong_rows_the_first_are_shown(tmp_path: Path) -> None:
    path = local_data(tmp_path, "text,label\n" + "".join(f"text {n},{n}\n" for n in range(100)))
    with pytest.raises(SuiteError) as caught:
        suites.load(path)
    *shown, rest = caught.value.problems
    assert [p.what.partition(" of")[0] for p in shown] == [f"label {n}" for n in range(2, 7)]
    assert rest.what == "93 more mistakes from here on"
    assert rest.where == f"{tmp_path / 'reviews.csv'}:9"
