"""The cache of predictions: what it returns, what makes a new entry, and what it survives."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import RobertaConfig, RobertaModel

from harness.assets import structure
from harness.assets.table import Source
from harness.cell.job import Asset, Job, JobTask
from harness.memory_model import answer_cache, counting, counting_client, dry_step, isolated_step, plan_prediction
from harness.memory_model.cell_prediction import predict
from harness.memory_model.plan_prediction import PlannedMemory
from harness.methods.registry import Registry, discover
from harness.records import environment
from harness.records.record import AssetUse, Cell, Evaluation, Predicted, Training
from harness.report import plan_table
from harness.suites import loader
from harness.suites.schema import SYNTHETIC

CELL = Cell(
    model="tiny", task=SYNTHETIC, method="lora", implementation="reference",
    config={"rank": 4, "targets": ["query", "value"]},
    training=Training(steps=2, batch=2, max_tokens=16), evaluation=Evaluation(items=10),
)  # fmt: skip
ROBERTA = {
    "model_type": "roberta", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1,
}  # fmt: skip


def request(cell: Cell = CELL, config: dict[str, Any] = ROBERTA, checkpoint: str = "") -> Any:
    one = plan_prediction.count_request(cell, config, "encoder", 2, checkpoint)
    return plan_prediction.step_request(cell, one, loss_tokens=1)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Forget what this process knows of its surroundings, which tests change."""
    answer_cache._surroundings.cache_clear()
    yield
    answer_cache._surroundings.cache_clear()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return the folder of an encoder without a classification head."""
    facts = {name: value for name, value in ROBERTA.items() if name != "model_type"}
    RobertaModel(RobertaConfig(**facts)).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def refuse(*_: object, **__: object) -> Any:
    raise AssertionError("counted although the answer was cached")


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_a_suite_that_was_planned_starts_no_process(monkeypatch: pytest.MonkeyPatch, predictions: Path) -> None:
    suite = loader.load("headline-rehearsal")
    chosen = [cell for cell in suite.plan.cells if cell.method in ("lora", "full", "frozen")]
    plan = dataclasses.replace(suite.plan, cells=tuple(chosen))
    first = plan_table.predictions(suite, plan)
    assert all(isinstance(one, PlannedMemory) for one in first.values())
    with monkeypatch.context() as patch:
        patch.setattr(counting_client, "python_module", refuse)
        assert plan_table.predictions(suite, plan) == first
        one = dataclasses.replace(plan, cells=plan.cells[:1])  # a part of the suite was planned with it
        assert plan_table.predictions(suite, one) == {plan.cells[0].cell_id: first[plan.cells[0].cell_id]}
    monkeypatch.setattr(answer_cache, "folder", lambda: predictions / "empty")
    assert plan_table.predictions(suite, plan) == first


@pytest.mark.slow
def test_a_cell_has_the_same_prediction_with_and_without_the_cache(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = AssetUse(name="tiny", source="folder")
    task = JobTask(name=SYNTHETIC, spec={}, labels=2, test=0, shuffle_seed=0, use=use)
    source = Source(name="tiny", kind="encoder", source=f"folder:{checkpoint}")
    work = Job(
        run="r", folder="f", attempt=1, cell=CELL, data=None, task=task, device="cpu", launched=0.0,
        model=Asset(path=str(checkpoint), source=source, use=use),
    )  # fmt: skip
    batches = [*dry_step.longest_batches(CELL, "encoder", 0)] * 2
    random = torch.get_rng_state()
    first = predict(work, batches)
    assert isinstance(first, Predicted)
    assert first.peak_B
    assert torch.equal(torch.get_rng_state(), random)
    asked: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(counting, "answer", refuse)
        patch.setattr(isolated_step, "peak", lambda *facts: asked.append(facts) or {"peak_B": 1})
        again = predict(work, batches)
        assert isinstance(again, Predicted)
        assert again.model_dump_json() == first.model_dump_json()
        batches[0].inputs["input_ids"][0, 0] += 1
        assert predict(work, batches) == first  # other texts of the same shape
        assert not asked
        batches[0].inputs["attention_mask"][0, -1] = 0
        padded = predict(work, batches)
        assert isinstance(padded, Predicted)
        assert (padded.peak_B, len(asked)) == (1 + isolated_step.bytes_of(batches), 1)


@pytest.mark.nightly
def test_the_counting_process_reads_the_checkpoint_of_an_encoder(checkpoint: Path) -> None:
    one = plan_prediction.count_request(CELL, ROBERTA, "encoder", 2, str(checkpoint))
    (counted,) = counting_client.answer_requests([one])
    assert "error" not in counted
    assert counted["methods"]["lora"][0]["trainable"] > 0


def test_counts_of_one_model_share_a_request_and_have_an_entry_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def count(requests: list[Any]) -> list[Any]:
        asked.extend(requests)
        return [
            {"parameters": 1, "methods": {m: [{"rank": c["rank"]} for c in of_m] for m, of_m in one["methods"].items()}}
            for one in requests
        ]

    monkeypatch.setattr(counting_client, "run_requests", count)
    cells = [CELL.model_copy(update={"config": {"rank": rank}}) for rank in (4, 8, 4)]
    requests = [plan_prediction.count_request(cell, ROBERTA, "encoder", 2) for cell in cells]
    answers = counting_client.answer_requests(requests)
    assert [one["methods"] for one in answers] == [{"lora": [{"rank": rank}]} for rank in (4, 8, 4)]
    assert [one["methods"] for one in asked] == [{"lora": [{"rank": 4}, {"rank": 8}]}]
    assert [answer_cache.read(one) for one in requests] == answers


def test_an_answer_that_came_too_late_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    two = [request(), request(CELL.model_copy(update={"config": {"rank": 8}}))]
    monkeypatch.setattr(counting_client, "run_requests", lambda requests: [{"peak_B": 1}][: len(requests)])
    assert counting_client.answer_requests(two) == [{"peak_B": 1}, None]
    monkeypatch.setattr(counting_client, "run_requests", lambda requests: [{"peak_B": 2}][: len(requests)])
    assert counting_client.answer_requests(two) == [{"peak_B": 1}, {"peak_B": 2}]


def test_a_seed_or_a_learning_rate_makes_no_new_entry() -> None:
    answer_cache.write([(request(), {"peak_B": 1})])
    same = CELL.model_copy(update={"seed": 3, "training": CELL.training.model_copy(update={"lr": 0.5})})
    assert answer_cache.read(request(same)) == {"peak_B": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"rank": 8}}, {"dtype": "bfloat16"}, {"optimizer": "adamw-8bit"}, {"method": "dora"},
        {"implementation": "hf-peft"}, {"training": CELL.training.model_copy(update={"batch": 4})},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_recipe_makes_a_new_entry(change: dict[str, Any]) -> None:
    answer_cache.write([(request(), {"peak_B": 1})])
    assert answer_cache.read(request(CELL.model_copy(update=change))) is None


def test_another_model_makes_a_new_entry(checkpoint: Path) -> None:
    answer_cache.write([(request(), {"peak_B": 1}), (request(checkpoint=str(checkpoint)), {"peak_B": 2})])
    assert answer_cache.read(request(config=ROBERTA | {"vocab_size": 257})) is None
    assert answer_cache.read(request(checkpoint=str(checkpoint))) == {"peak_B": 2}
    moved = checkpoint.rename(checkpoint.with_name("moved"))
    assert answer_cache.read(request(checkpoint=str(moved))) == {"peak_B": 2}
    structure_of = structure.build({**ROBERTA, "num_labels": 2}, "encoder", torch.float32)
    structure_of.to_empty(device="cpu").save_pretrained(moved)  # the same config, and a head
    assert answer_cache.read(request(checkpoint=str(moved))) is None


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (environment, "software", lambda: {"torch": "0"}),
        (environment, "code_version", lambda: "0"),
        (environment, "processor", lambda: {"cpu": "another"}),
    ],
    ids=["library", "code", "processor"],
)
def test_other_code_or_another_processor_makes_a_new_entry(
    owner: Any, name: str, value: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_cache.write([(request(), {"peak_B": 1})])
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, value)
        answer_cache._surroundings.cache_clear()
        assert answer_cache.read(request()) is None
        answer_cache.write([(request(), {"peak_B": 2})])
        assert answer_cache.read(request()) == {"peak_B": 2}
    answer_cache._surroundings.cache_clear()
    assert answer_cache.read(request()) == {"peak_B": 1}


def test_an_environment_variable_makes_a_new_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_cache.write([(request(), {"peak_B": 1})])
    monkeypatch.setenv("TRITON_INTERPRET", "1" if os.environ.get("TRITON_INTERPRET") != "1" else "0")
    answer_cache._surroundings.cache_clear()
    assert answer_cache.read(request()) is None


def test_code_that_changes_under_one_version_is_not_cached(monkeypatch: pytest.MonkeyPatch, predictions: Path) -> None:
    own = discover()
    foreign = tuple(dataclasses.replace(one, distribution="another") for one in own.implementations)
    with monkeypatch.context() as patch:
        patch.setattr(answer_cache, "_registry", lambda: Registry(foreign))
        answer_cache.write([(request(), {"peak_B": 1})])
    with monkeypatch.context() as patch:
        patch.setattr(environment, "editable_libraries", lambda: ("peft",))
        answer_cache._surroundings.cache_clear()
        answer_cache.write([(request(), {"peak_B": 1})])
    assert not predictions.exists()


@pytest.mark.parametrize("answer", [{"error": "no model"}, {"no_peak": "too slow", "transient": True}])
def test_an_answer_that_may_change_is_not_cached(answer: dict[str, Any]) -> None:
    answer_cache.write([(request(), answer)])
    assert answer_cache.read(request()) is None


@pytest.mark.usefixtures("forks")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="steps on fake tensors require fork")
def test_a_step_that_took_too_long_is_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated_step, "TIMEOUT_S", 0.0)
    (found,) = counting_client.answer_requests([request()])
    assert "took more than" in found["no_peak"]
    assert answer_cache.read(request()) is None


@pytest.mark.parametrize("broken", ["", "{", "[]", "{}", "3", "other request", "answer"])
def test_a_broken_or_foreign_entry_is_replaced(broken: str, predictions: Path) -> None:
    answer_cache.write([(request(), {"peak_B": 1})])
    (file,) = predictions.iterdir()
    entry = json.loads(file.read_bytes())
    if broken == "other request":
        entry["facts"]["request"]["loss_tokens"] = 2
    file.write_text(
        json.dumps({**entry, "answer": 3})
        if broken == "answer"
        else json.dumps(entry)
        if broken == "other request"
        else broken
    )
    assert answer_cache.read(request()) is None
    answer_cache.write([(request(), {"peak_B": 1})])
    assert answer_cache.read(request()) == {"peak_B": 1}


LARGE = {"tried": {str(n): n for n in range(20_000)}}


def _write_often() -> None:
    for _ in range(30):
        answer_cache.write([(request(), LARGE)])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writers are forks")
def test_a_reader_sees_whole_entries_while_others_write() -> None:
    answer_cache.write([(request(), LARGE)])
    writers = [multiprocessing.get_context("fork").Process(target=_write_often) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert answer_cache.read(request()) == LARGE
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]


def test_the_oldest_entries_are_removed(monkeypatch: pytest.MonkeyPatch, predictions: Path) -> None:
    monkeypatch.setattr(answer_cache, "MOST", 3)
    requests = [request(CELL.model_copy(update={"config": {"rank": rank}})) for rank in range(1, 6)]
    for age, one in enumerate(requests):
        before = {*predictions.iterdir()} if age else set()
        answer_cache.write([(one, {"peak_B": 1})])
        for new in {*predictions.iterdir()} - before:
            os.utime(new, (age, age))
    assert [answer_cache.read(one) is not None for one in requests] == [False, False, True, True, True]


def test_a_cache_that_cannot_be_written_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(answer_cache, "folder", lambda: tmp_path / "file" / "predictions")
    monkeypatch.setattr(counting_client, "run_requests", lambda _: [{"peak_B": 1}])
    assert counting_client.answer_requests([request()]) == [{"peak_B": 1}]
