"""`fit --batch`: whether a training fits, and what would make it fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from harness.assets import generated
from harness.cli import main
from harness.errors import Exit
from harness.memory_model import isolated_step
from harness.records.record import Cell

pytestmark = [pytest.mark.usefixtures("forks"), pytest.mark.slow]
ROOM = 8 * 2**20


@pytest.fixture
def ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that asks about a small Llama, and returns the exit code, the document and the lines of text."""
    generated.tiny_llama(tmp_path)

    def asked(*words: str, formulas: bool = True) -> tuple[int, dict[str, Any], list[str]]:
        command = ["fit", str(tmp_path), *words, *(["--formulas"] if formulas else [])]
        code = main(command)
        lines = capsys.readouterr().out.splitlines()
        assert main([*command, "--json"]) == code
        return code, json.loads(capsys.readouterr().out), lines

    return asked


def test_the_first_line_says_yes_and_the_free_memory(ask: Any) -> None:
    words = ("--memory", "1GiB", "--rank", "4", "--batch", "2", "--tokens", "16", "--method", "lora", "--base", "none")
    code, document, lines = ask(*words)
    (row,) = document["rows"]
    assert (code, document["answer"], document["batch"], row["batch"], row["fits"]) == (Exit.PASS, "yes", 2, 2, True)
    assert row["needed_B"] + row["free_B"] == document["memory_B"] == 2**30
    assert row["needed_B"] == row["ledger"]["total_B"]
    assert "changes" not in row
    assert lines[0].startswith("yes: batch 2 of 16 tokens: lora r=4 needs ")
    assert lines[0].endswith(" GiB free")


@pytest.mark.parametrize("memory", ["8MiB", "1GiB", "700.5MB", "0.9MiB"])
def test_the_first_line_and_the_table_round_alike(ask: Any, memory: str) -> None:
    words = ("--memory", memory, "--rank", "4", "--batch", "3", "--tokens", "17", "--method", "lora", "--base", "none")
    _, _, lines = ask(*words)
    heads, row = (
        re.split(r"\s{2,}", line.strip()) for line in lines[[line[:8] for line in lines].index("  method") :][:2]
    )
    shown = dict(zip(heads, row, strict=True))
    assert shown["batch"] == "3"
    assert f" needs {shown['needed']} of " in lines[0]
    assert f": {shown['free'].removeprefix('-')} " in lines[0]


def test_the_answer_agrees_with_the_search_for_the_largest_batch(ask: Any) -> None:
    words = ("--memory", "8MiB", "--rank", "4", "--tokens", "16", "--method", "lora", "--base", "none")
    _, found, _ = ask(*words)
    largest = found["rows"][0]["batch"]
    assert largest > 1
    for batch, answer in ((largest, "yes"), (largest + 1, "no")):
        code, document, lines = ask(*words, "--batch", str(batch))
        assert (document["answer"], code) == (answer, Exit.PASS if answer == "yes" else Exit.FAIL)
    assert document["rows"][0]["largest_batch"] == largest
    assert f"at most batch {largest}" in lines[1]


def test_each_change_fits_if_it_is_asked_for(ask: Any) -> None:
    words = ("--rank", "4", "--batch", "64", "--tokens", "16", "--method", "lora")
    _, document, _ = ask(*words, "--base", "none", "--memory", "1GiB")
    words += ("--memory", f"{document['rows'][0]['needed_B'] * 0.7 / 2**20:.3f}MiB")
    code, document, _ = ask(*words, "--base", "none")
    (row,) = document["rows"]
    assert code == Exit.FAIL
    tried = {tuple(change["settings"]) for change in row["changes"]}
    assert tried >= {("checkpointing",), ("base",), ("optimizer",), ("checkpointing", "base", "optimizer")}
    assert {change["fits"] for change in row["changes"]} == {True, False}
    for change in row["changes"]:
        settings = {"base": "none"} | change["settings"]
        options = [
            word for key, value in settings.items() for word in ([f"--{key}"] if value is True else [f"--{key}", value])
        ]
        _, again, _ = ask(*words, *options)
        (one,) = again["rows"]
        assert (one["needed_B"], one["fits"]) == (change["needed_B"], change["fits"])


def test_steps_decide(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The closed forms say that nothing of this fits; the steps need what is written here."""

    def peak(cell: Cell, *_: Any, **__: Any) -> dict[str, Any]:
        share = 0.2 if cell.training.checkpointing else 0.6
        return {"peak_B": int(ROOM * share * cell.training.batch), "peak_by": ""}

    monkeypatch.setattr(isolated_step, "peak", peak)
    words = ("--memory", "8MiB", "--rank", "4", "--tokens", "16", "--method", "lora", "--base", "nf4")
    code, document, lines = ask(*words, "--batch", "2", formulas=False)
    (row,) = document["rows"]
    assert (code, row["fits"], row["needed_B"], row["largest_batch"]) == (Exit.FAIL, False, int(1.2 * ROOM), 1)
    assert row["peak_B"] == row["needed_B"]
    changes = {tuple(one["settings"]): one["fits"] for one in row["changes"]}
    assert changes["checkpointing",]
    assert not changes.get(("optimizer",))
    assert "would fit with at most batch 1 or --checkpointing (3.20 MiB)" in lines[1]
    code, document, lines = ask(*words, "--batch", "1", formulas=False)
    assert (code, document["rows"][0]["needed_B"], lines[0][:4]) == (Exit.PASS, int(0.6 * ROOM), "yes:")


@pytest.mark.parametrize(("share", "answer"), [(0.98, "yes, but close:"), (0.96, "yes:")])
def test_less_free_memory_than_the_prediction_may_be_off_is_said(
    ask: Any, monkeypatch: pytest.MonkeyPatch, share: float, answer: str
) -> None:
    monkeypatch.setattr(isolated_step, "peak", lambda *_, **__: {"peak_B": int(share * ROOM), "peak_by": ""})
    words = ("--memory", "8MiB", "--rank", "4", "--tokens", "16", "--method", "lora", "--base", "nf4", "--batch", "1")
    code, document, lines = ask(*words, formulas=False)
    assert (code, document["answer"], lines[0].partition(" batch")[0]) == (Exit.PASS, "yes", answer)
    assert ("the prediction may be 0.24 MiB off" in lines[0]) == (share > 0.97)


BERT = {
    "model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 64, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000,
}  # fmt: skip
"""Config of a model without a closed form of its activations."""


def test_no_needs_a_prediction_of_every_row(ask: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def peak(cell: Cell, *_: Any, **__: Any) -> dict[str, Any]:
        known = {"peak_B": 9 * ROOM, "peak_by": ""}
        return {"no_peak": "of a test"} if cell.base.quantization == "none" else known

    (tmp_path / "config.json").write_text(json.dumps(BERT))
    monkeypatch.setattr(isolated_step, "peak", peak)
    words = ("--memory", "8MiB", "--rank", "4", "--method", "lora", "--base", "nf4", "--base", "none", "--batch", "2")
    _, document, _ = ask(*words, formulas=False)
    assert sorted(str(row["fits"]) for row in document["rows"]) == ["False", "None"]
    assert document["answer"] == "unknown"


def test_without_a_prediction_the_answer_is_unknown(ask: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    monkeypatch.setattr(isolated_step, "peak", lambda *_, **__: {"no_peak": "of a test"})
    words = ("--memory", "8MiB", "--rank", "4", "--method", "lora", "--base", "none", "--batch", "2")
    code, document, lines = ask(*words, formulas=False)
    assert (code, document["answer"], document["rows"][0]["fits"]) == (Exit.INFRASTRUCTURE, "unknown", None)
    assert lines[0].startswith("unknown: ")


def test_a_question_without_a_rank_or_a_closed_form_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "llama-7b", "--memory", "8GiB", "--batch", "0"]) == Exit.USAGE
    printed = capsys.readouterr().err
    assert "--batch: 0 is not at least 1" in printed
    assert "--batch: the rank is missing" in printed
    facts = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 64,
             "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(facts))
    words = ["--memory", "8MiB", "--rank", "4", "--method", "lora", "--batch", "2", "--formulas"]
    assert main(["fit", str(tmp_path), *words]) == Exit.USAGE
    assert "hint: leave out --formulas" in capsys.readouterr().err
