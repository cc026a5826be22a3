"""Whether a suite fits its models: asked before anything runs, of the models that are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel, BertTokenizerFast, LlamaConfig, LlamaForCausalLM

from harness.assets import fetch, generated, model_folder
from harness.cli import main
from harness.errors import Exit, SuiteError
from harness.process import supervisor
from harness.records.record import Status
from harness.runner import run
from harness.suites import loader, model_checks
from harness.suites.expand import select
from support.sandbox import ForkSandbox

SUITE = """\
suite: fit
title: Does it fit?
sources:
  - {name: bert, kind: encoder, source: folder:bert}
  - {name: tied, kind: causal, source: folder:tied}
  - {name: not-here, kind: causal, source: made:tiny-llama}
matrix:
  - task: toy-sentiment
    method: lora
    training: {steps: 2, batch: 2, lr: 1e-3, max_tokens: 16}
    evaluation: {items: 4, batch: 2}
    cells:
      - {id: causal, model: tied, config: {targets: [q_proj, v_proj]}}
      - id: encoder
        model: bert
        config: {targets: [query]}
        training: {batch: 4}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with tied embeddings and 40 positions, an encoder with 24, each with a tokenizer."""
    here = tmp_path_factory.mktemp("models")
    small = {
        "vocab_size": 64,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    generated.tiny_llama(here / "tied")
    for old in (here / "tied").glob("*.safetensors"):
        old.unlink()
    tied = LlamaConfig(**small, max_position_embeddings=40, tie_word_embeddings=True)
    LlamaForCausalLM(tied).save_pretrained(here / "tied")
    BertModel(BertConfig(**small, max_position_embeddings=24)).save_pretrained(here / "bert")
    (here / "bert" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    BertTokenizerFast(str(here / "bert" / "vocab.txt")).save_pretrained(here / "bert")
    return here


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is built: names of weights must do."""

    def none(*_: object) -> Any:
        raise AssertionError("a child process was started")

    monkeypatch.setattr(supervisor, "python", none)


def refused(folder: Path, old: str = "", new: str = "", expr: str = "") -> list[tuple[int, str, str]]:
    """Return line, message and mend of everything that is refused in the suite with `old` replaced by `new`."""
    path = folder / "fit.yaml"
    assert old in SUITE
    path.write_text(SUITE.replace(old, new, 1) if old else SUITE, encoding="utf-8")
    suite = loader.load(path)
    plan = select(suite.plan, expr) if expr else suite.plan
    try:
        model_checks.check_models(suite, plan)
    except SuiteError as error:
        return [(int(p.where.rpartition(":")[2]), p.what, p.hint) for p in error.problems]
    return []


@pytest.mark.usefixtures("no_child")
def test_what_fits_is_told_by_the_names_of_the_weights(folder: Path) -> None:
    assert refused(folder) == []
    assert refused(folder, "[query]", "[encoder.layer.0.attention.self.query, dense]") == []


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("max_tokens: 16", "max_tokens: 24", []),
        ("max_tokens: 16", "max_tokens: 32", [(10, "bert", 24)]),
        ("max_tokens: 16", "max_tokens: 64", [(10, "tied", 40), (10, "bert", 24)]),
        ("{batch: 4}", "{max_tokens: 25}", [(17, "bert", 24)]),
        ("model: tied", "model: not-here", []),
    ],
)
def test_no_more_tokens_than_positions(
    folder: Path, old: str, new: str, expected: list[tuple[int, str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(folder / "empty"))
    tokens = new.strip("{}").removeprefix("max_tokens: ")
    assert refused(folder, old, new) == [
        (line, f"`max_tokens` is {tokens}, but {model} has {most} positions", f"write at most {most}")
        for line, model, most in expected
    ]


@pytest.mark.usefixtures("no_child")
def test_no_longer_prompt_than_the_model_reads(folder: Path) -> None:
    """The usual 32 tokens are cut to it, as nobody has asked for them; nor has who wants no latencies."""
    prompts = "{batch: 4}\n        prompts: {tokens: 25}"
    assert refused(folder, "{batch: 4}", prompts) == [
        (18, "`prompts` have 25 tokens, but bert has 24 positions", "write at most 24")
    ]
    assert refused(folder, "{batch: 4}", prompts.replace("25", "24")) == []
    assert refused(folder, "{batch: 4}", f"{prompts}\n        latency: never") == []
    causal = "[q_proj, v_proj]}, prompts: {tokens: 33}"
    what = "`prompts` have 33 tokens and 8 decoded ones, but tied has 40 positions"
    assert refused(folder, "[q_proj, v_proj]}", causal) == [(13, what, "write at most 32")]
    assert refused(folder, "[q_proj, v_proj]}", causal.replace("33", "32")) == []


TASK = """\
task: digits
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
metadata: {data: asked, test: 4, shuffle_seed: 0}
"""


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("tokens", [32, 33])
def test_a_prompt_and_its_answer_fit_together(folder: Path, tokens: int) -> None:
    (folder / "task.yaml").write_text(TASK, encoding="utf-8")
    rows = "".join(f'{{"prompt": "{n}", "answer": "{n}"}}\n' for n in range(8))
    (folder / "asked.jsonl").write_text(rows, encoding="utf-8")
    source = (
        "  - {name: asked, kind: data, source: 'file:asked.jsonl', rows: {format: jsonl, holds: answers}}\nmatrix:\n"
    )
    suite = SUITE.partition("      - id: encoder")[0].replace("matrix:\n", source)
    path = folder / "answers.yaml"
    path.write_text(
        suite.replace("toy-sentiment", "task.yaml").replace("max_tokens: 16", f"max_tokens: {tokens}"), encoding="utf-8"
    )
    loaded = loader.load(path)
    if tokens == 32:
        model_checks.check_models(loaded, loaded.plan)
        return
    with pytest.raises(SuiteError, match="a prompt of 33 tokens and an answer of 8 exceed the 40 positions of tied"):
        model_checks.check_models(loaded, loaded.plan)


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_a_target_without_weights_of_its_own_is_looked_for_in_the_model(folder: Path) -> None:
    assert "lm_head" not in model_folder.layers(folder / "tied")
    assert refused(folder, "[q_proj, v_proj]", "[q_proj, lm_head]") == []
    ((line, what, hint),) = refused(folder, "[q_proj, v_proj]", "[q_proj, query]")
    assert (line, hint) == (13, "name layers of tied")
    kinds = "linear, Conv1D, embedding, nn.Conv1d, Conv2d, Conv3d or experts"
    assert what.startswith(f"`targets`: no {kinds} layer is named 'query'; this model has: ")
    assert "q_proj" in what.partition("has: ")[2]
    for typed, meant in (
        ("[qproj]", "q_proj"),
        ("[atention]", "attention"),
        ("[self_atn.q_proj]", "self_attn.q_proj"),
    ):
        ((line, _, hint),) = refused(folder, "[q_proj, v_proj]", typed)
        assert (line, hint) == (13, f"did you mean `{meant}`?")
    # The model has this module, so its name is not misspelt.
    ((_, what, hint),) = refused(folder, "[q_proj, v_proj]", "[mlp]")
    assert ("is a LlamaMLP" in what, hint) == (True, "name layers of tied")


@pytest.mark.usefixtures("no_child")
def test_cells_that_are_left_out_may_be_wrong(folder: Path) -> None:
    assert refused(folder, "[q_proj, v_proj]", "[nothing]", "id=encoder") == []


@pytest.mark.usefixtures("forks")
def test_a_model_that_cannot_be_built_here_is_left_to_its_cells(folder: Path) -> None:
    config = folder / "tied" / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"llama"', '"of the future"'))
    try:
        model_checks._misfits.cache_clear()
        assert refused(folder, "[q_proj, v_proj]", "[nothing]") == []
    finally:
        config.write_text(whole)


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_one_child_builds_every_model_that_must_be_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, start = [], supervisor.python
    monkeypatch.setattr(supervisor, "python", lambda *asked: started.append(asked) or start(*asked))
    model_checks._misfits.cache_clear()
    old = SUITE[SUITE.index("[q_proj, v_proj]") : SUITE.index("[query]") + len("[query]")]
    new = old.replace("[q_proj, v_proj]", "[nothing]").replace("[query]", "[neither]")
    found = refused(folder, old, new)
    assert [(line, hint) for line, _, hint in found] == [(13, "name layers of tied"), (16, "name layers of bert")]
    assert len(started) == 1
    config = folder / "tied" / "config.json"
    whole = config.read_text()
    width = re.search(r'"hidden_size": \d+', whole)
    assert width is not None
    for wrong in (whole.replace('"llama"', '"of the future"'), whole.replace(width[0], '"hidden_size": "wide"')):
        config.write_text(wrong)  # the second ends the child that builds it
        try:
            model_checks._misfits.cache_clear()
            assert refused(folder, old, new) == found[1:]
        finally:
            config.write_text(whole)


def test_what_cannot_be_read_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x00\x01torn")
    (tmp_path / "config.json").write_text('{"n_positions": "many"')
    assert model_folder.layers(tmp_path) == set()
    assert model_folder.positions(tmp_path) is None
    (tmp_path / "config.json").write_text('{"n_positions": 1024}')
    assert model_folder.positions(tmp_path) == 1024


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("verb", [["plan"], ["run", "--out", "run"]])
def test_nothing_runs_before_the_suite_fits(
    verb: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "_fetch", lambda *_: pytest.fail("something was fetched"))
    path = folder / "fit.yaml"
    path.write_text(SUITE.replace("max_tokens: 16", "max_tokens: 25"), encoding="utf-8")
    assert main([verb[0], str(path), *verb[1:]]) == Exit.USAGE
    assert f"{path}:10: `max_tokens` is 25, but bert has 24 positions" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_child")
def test_a_model_that_was_fetched_is_asked_before_the_first_cell(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    here: list[str] = []
    monkeypatch.setattr(fetch, "is_local", lambda source: source.name in here)
    monkeypatch.setattr(run, "_fetch", lambda *_: here.append("bert"))
    path = folder / "fit.yaml"
    path.write_text(SUITE.replace("max_tokens: 16", "max_tokens: 25"), encoding="utf-8")
    assert main(["run", str(path), "--out", "run"]) == Exit.USAGE
    assert "bert has 24 positions" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_only_the_new_head_is_wrong_use(folder: Path, fork_sandbox: ForkSandbox) -> None:
    path = folder / "fit.yaml"
    path.write_text(SUITE.replace("[query]", "[classifier]"), encoding="utf-8")
    assert fork_sandbox.command("run", str(path), "--only", "id=encoder", "--out", "run").code == Exit.INFRASTRUCTURE
    (record,) = fork_sandbox.read().records
    assert record.status is Status.ERROR
    assert record.because.startswith("`targets` name ")
    assert "the head (classifier)" in record.because
    assert "method: frozen" in record.because
