"""Predicted memory: in a plan without a run, and in the report beside what was measured."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.analysis.run_facts import analyse
from harness.cli import main
from harness.errors import Exit
from harness.memory_model import counting_client, plan_prediction
from harness.process.supervisor import python
from harness.records.files import whole_lines
from harness.records.record import Evaluation, Predicted, Record
from harness.report import plan_table, tables
from harness.suites import loader
from harness.suites.tasks import Answers
from support import recorded_run
from support.processes import eventually
from support.report_page import row
from support.sandbox import Sandbox


@pytest.fixture
def _no_steps(forks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the steps without data out, a second each: only what the formulas say is looked at."""
    counted = counting_client.run_requests

    def formulas(requests: list[Any]) -> Any:
        of_models = [request for request in requests if "cell" not in request]
        return [*counted(of_models), *({} for _ in requests[len(of_models) :])]

    monkeypatch.setattr(counting_client, "run_requests", formulas)


@pytest.mark.nightly
@pytest.mark.usefixtures("_no_steps")
def test_the_headline_suite_is_predicted_and_fits() -> None:
    suite = loader.load("headline-gpu")
    plan = suite.plan
    predicted = plan_table.predictions(suite, plan)
    document = plan_table.planning(suite, plan, Path("nowhere"), predicted)
    sizes = {row["id"]: row["predicted"]["total_B"] for row in document["cells"]}
    assert sizes["qlora-65b"] < 48 * 2**30
    assert sizes["qlora-33b"] < 24 * 2**30
    assert sizes["lora-7b"] < sizes["galore-7b"] < sizes["full-7b"]
    assert max(sizes.values()) < 80e9
    # In bfloat16 the masters' float32 gradients are all there while AdamW steps: the suite's comment has this number.
    (full,) = (cell for cell in plan.cells if plan.ids[cell.cell_id] == "full-7b")
    half = full.model_copy(update={"dtype": "bfloat16"})
    (found,) = plan_table.predictions(suite, dataclasses.replace(plan, cells=(half,))).values()
    assert isinstance(found, Predicted)
    assert found.step_B == 2 * found.gradients_B
    assert round(found.total_B / 2**30) == 88
    assert f"{len(plan.cells)} Cells; largest predicted memory " in "\n".join(plan_table.lines(document))


@pytest.mark.slow
@pytest.mark.usefixtures("_no_steps")
def test_logits_are_predicted_where_every_token_has_a_loss() -> None:
    suite = loader.load("headline-gpu")
    plan = suite.plan
    (lora,) = (cell for cell in plan.cells if plan.ids[cell.cell_id] == "lora-7b")
    scored = lora.model_copy(update={"evaluation": Evaluation(items=10)})
    found = {}
    for loss in ("answer", "all"):
        task = suite.tasks[lora.task].model_copy(update={"answers": Answers(loss=loss)})
        of_task = dataclasses.replace(suite, tasks={lora.task: task})
        (found[loss],) = plan_table.predictions(of_task, dataclasses.replace(plan, cells=(scored,))).values()
    assert isinstance(found["all"], Predicted)
    assert isinstance(found["answer"], Predicted)
    assert found["answer"].logits_B is None
    assert found["all"].logits_B == 256 * 32000 * (2 + 2 * 4)


def test_what_a_step_took_is_the_total_where_it_is_more_than_the_formulas_know() -> None:
    plan = loader.load("smoke").plan
    first, second, *_ = (cell.cell_id for cell in plan.cells)
    of_weights = plan_prediction.PlannedMemory(
        weights_B=700 * recorded_run.MIB, adapter_B=0, gradients_B=0, optimizer_B=0, trainable=1_340_000
    )
    known = {
        first: of_weights,
        second: of_weights.model_copy(
            update={
                "peak_B": 9000 * recorded_run.MIB,
                "optimizer_host_B": 1000 * recorded_run.MIB,
                "peak_by": "the reference",
            }
        ),
    }
    document = plan_table.planning(loader.load("smoke"), plan, Path("nowhere"), known)
    sizes = {row["cell_id"]: row["predicted"]["total_B"] for row in document["cells"] if row["predicted"]}
    assert sizes == {
        first: 700 * recorded_run.MIB,
        second: 8000 * recorded_run.MIB,
    }  # what is paged is not on the device
    assert document["estimate"]["predicted_B"] == 8000 * recorded_run.MIB
    said = "\n".join(plan_table.lines(document))
    assert "largest predicted memory 8,000 MiB" in said
    assert any(line.split()[-4:-1] == ["1.34", "M", "8,000"] for line in said.splitlines())
    assert "memory of 1 Cell: predicted with the reference" in said


def test_a_model_that_is_not_here_is_not_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path))
    suite = loader.load("smoke")
    plan = suite.plan
    found = plan_table.predictions(suite, plan)
    assert set(found.values()) == {"tiny-llama is not on this machine yet"}
    said = "\n".join(plan_table.lines(plan_table.planning(suite, plan, tmp_path, found)))
    assert f"no prediction for {len(plan.cells)} Cells: tiny-llama is not on this machine yet" in said


SMALL = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 64,
}  # fmt: skip
REFUSED = """\
suite: refused
sources: [{name: small, kind: causal, source: "shape:./config.json"}]
matrix:
  - model: small
    task: synthetic
    implementation: reference
    training: {steps: 2, batch: 2, lr: 1e-3, max_tokens: 16}
    config: {targets: [q_proj]}
    cells:
      - {id: fits, method: pissa, config: {rank: 8}}
      - {id: large, method: pissa, config: {rank: 16}}
"""


@pytest.mark.usefixtures("_no_steps")
def test_a_cell_that_its_method_refuses_is_shown_with_the_line_of_its_entry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}), encoding="utf-8")
    (tmp_path / "suite.yaml").write_text(REFUSED, encoding="utf-8")
    assert main(["plan", str(tmp_path / "suite.yaml")]) == Exit.PASS
    said = capsys.readouterr().out
    assert f"{tmp_path / 'suite.yaml'}:11: 1 Cell cannot run: rank 16: " in said
    assert "suite.yaml:10" not in said
    assert "no prediction" not in said
    assert main(["plan", str(tmp_path / "suite.yaml"), "--json"]) == Exit.PASS
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [(cell["id"], cell["refused"], cell["where"].rpartition(":")[2]) for cell in cells] == [
        ("fits", False, "10"), ("large", True, "11"),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_library_finds_the_packages_that_it_needs_in_the_process_that_predicts(sandbox: Sandbox) -> None:
    """peft needs accelerate, which a count of a reference does without."""
    (sandbox.folder / "config.json").write_text(json.dumps(SMALL), encoding="utf-8")
    text = REFUSED.replace("implementation: reference", "implementation: hf-peft").replace("pissa", "lora")
    (sandbox.folder / "suite.yaml").write_text(text, encoding="utf-8")
    cells = json.loads(sandbox.command("plan", "suite.yaml", "--only", "fits", "--json").out)["cells"]
    assert [(cell["predicted"]["peak_by"], cell["predicted"]["no_peak"]) for cell in cells] == [("", "")]


def beside(change: int, why: str = "") -> Record:
    """Return a Record whose weights were predicted with so many bytes more than were counted; or not at all, and why."""
    good = recorded_run.record("fused", recorded_run.cells()["fused"])
    assert good.measurements is not None
    memory = good.measurements.memory
    parts = {name: getattr(memory, name) for name in ("weights_B", "adapter_B", "gradients_B", "optimizer_B")}
    parts["weights_B"] += change
    predicted = None if why else Predicted(**parts, activations_B=3 * recorded_run.MIB)
    memory = memory.model_copy(update={"predicted": predicted, "not_predicted": why})
    return good.model_copy(update={"measurements": good.measurements.model_copy(update={"memory": memory})})


def ledger(record: Record, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the record's row of the report's memory table, by the names of its columns."""
    run = recorded_run.write_run(folder / "run", change=lambda _, old: record, only=["fused"])
    return row(tables.memory(analyse(run)), record)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        (0, ""),
        (recorded_run.MIB // 2, ""),
        (2 * recorded_run.MIB, ""),
        (9 * recorded_run.MIB, "not as predicted"),
        (-9 * recorded_run.MIB, "not as predicted"),
    ],
)
def test_the_ledger_warns_where_prediction_and_count_part(change: int, flag: str, tmp_path: Path) -> None:
    figures = ledger(beside(change), tmp_path)
    assert figures["Weights, MiB"]["flag"] == flag
    assert figures["Weights, MiB"]["small"].startswith("≈ ")
    assert [figures[name]["flag"] for name in ("Adapter, MiB", "Gradients, MiB", "Optimizer, MiB")] == [""] * 3
    assert figures["Other in training, MiB"]["small"] == "≈ 3.00"


def test_what_an_optimizer_keeps_on_the_host_is_said_beside_it(tmp_path: Path) -> None:
    good = beside(0)
    assert good.measurements is not None
    memory = good.measurements.memory
    assert memory.predicted is not None
    expected = memory.predicted.model_copy(update={"optimizer_host_B": 2 * recorded_run.MIB})
    for predicted, small, why in (
        (expected, ", + 3.00 on the host", "; 3,145,728 B more in the host's memory, predicted 2,097,152 B"),
        (None, "+ 3.00 on the host", "3,145,728 B more in the host's memory"),
    ):
        paged = memory.model_copy(update={"predicted": predicted, "optimizer_host_B": 3 * recorded_run.MIB})
        changed = good.model_copy(update={"measurements": good.measurements.model_copy(update={"memory": paged})})
        shown = ledger(changed, tmp_path / str(predicted is None))["Optimizer, MiB"]
        assert shown["small"].endswith(small)
        assert shown["why"].endswith(why)
    assert "host" not in ledger(good, tmp_path / "none")["Optimizer, MiB"]["small"]


def test_of_activations_and_the_optimizers_step_the_larger_is_shown(tmp_path: Path) -> None:
    good = beside(0)
    assert good.measurements is not None
    assert good.measurements.memory.predicted is not None
    expected = good.measurements.memory.predicted.model_copy(update={"step_B": 5 * recorded_run.MIB})
    memory = good.measurements.memory.model_copy(update={"predicted": expected})
    changed = good.model_copy(update={"measurements": good.measurements.model_copy(update={"memory": memory})})
    assert ledger(changed, tmp_path)["Other in training, MiB"]["small"] == "≈ 5.00"


def test_what_tensors_took_in_a_step_is_shown_where_it_was_counted(tmp_path: Path) -> None:
    good = beside(0)
    assert good.measurements is not None
    assert ledger(good, tmp_path / "none")["Tensors in a step, MiB"]["why"] == "not trained, or not counted"
    memory = good.measurements.memory.model_copy(update={"counted_peak_B": 5 * recorded_run.MIB})
    counted = good.model_copy(update={"measurements": good.measurements.model_copy(update={"memory": memory})})
    assert ledger(counted, tmp_path / "counted")["Tensors in a step, MiB"]["text"] == "5.00"


def test_the_peak_of_a_step_is_shown_beside_the_count(tmp_path: Path) -> None:
    good = beside(0)
    assert good.measurements is not None
    assert good.measurements.memory.predicted is not None
    for change, small, flag, why in (
        ({"peak_B": 99 * recorded_run.MIB}, "≈ 99", "", "predicted 103,809,024 B, counted 104,857,600 B"),
        (
            {"peak_B": 90 * recorded_run.MIB, "peak_by": "the reference"},
            "≈ 90",
            "not as predicted",
            ", by the reference",
        ),
        ({"no_peak": "it needs data"}, "", "", "not predicted: it needs data"),
    ):
        expected = good.measurements.memory.predicted.model_copy(update=change)
        memory = good.measurements.memory.model_copy(
            update={"predicted": expected, "counted_peak_B": 100 * recorded_run.MIB}
        )
        changed = good.model_copy(update={"measurements": good.measurements.model_copy(update={"memory": memory})})
        shown = ledger(changed, tmp_path / str(len(why)))["Tensors in a step, MiB"]
        assert (shown["text"], shown["small"], shown["flag"]) == ("100", small, flag)
        assert shown["why"].endswith(why)


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_cells_that_differ_in_seed_or_learning_rate_share_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = loader.load("headline-rehearsal")
    plan = suite.plan
    one = next(cell for cell in plan.cells if cell.method == "lora" and cell.training.steps)
    other = one.model_copy(update={"seed": 7, "training": one.training.model_copy(update={"lr": 0.5})})
    longer = one.model_copy(update={"training": one.training.model_copy(update={"max_tokens": 96})})
    asked: list[Any] = []
    counted = counting_client.run_requests

    def spy(requests: list[Any]) -> Any:
        asked.extend(request for request in requests if "cell" in request)
        return counted(requests)

    monkeypatch.setattr(counting_client, "run_requests", spy)
    found = plan_table.predictions(suite, dataclasses.replace(plan, cells=(one, other, longer)))
    assert len(asked) == 2
    peaks = [p.peak_B for c in (one, other, longer) if isinstance(p := found[c.cell_id], Predicted)]
    assert peaks[0] is not None
    assert peaks[0] == peaks[1] != peaks[2]


def test_the_ledger_says_why_nothing_was_predicted(tmp_path: Path) -> None:
    figures = ledger(beside(0, "nobody counted"), tmp_path)
    assert (figures["Weights, MiB"]["small"], figures["Weights, MiB"]["why"]) == ("", "not predicted: nobody counted")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork, which a tie to the parent needs")
def test_who_counts_ends_with_a_command_that_is_killed(sandbox: Sandbox) -> None:
    planned = sandbox.start("fit", "llama-7b", "--memory", "24GiB")
    counting = f"{plan_prediction.__name__.rpartition('.')[0]}.counting_worker"
    found: list[psutil.Process] = []

    def counts() -> bool:
        found[:] = [c for c in psutil.Process(planned.pid).children(recursive=True) if counting in c.cmdline()]
        return bool(found)

    eventually(counts, "somebody counts")
    planned.kill()
    planned.communicate()
    eventually(lambda: not any(c.is_running() and c.status() != "zombie" for c in found), "nobody counts any more")


def test_answers_are_told_from_output_and_a_torn_one_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import pathlib, sys, time; print('{}\\n' * 2000, flush=True); "
        """pathlib.Path(sys.argv[3]).write_text('{"peak_B": 1}\\n{"peak_B": 2}\\n{"pea'); time.sleep(600)"""
    )

    @contextlib.contextmanager
    def late(module: str, words: list[str], environment: dict[str, str]) -> Iterator[Any]:
        with python(["-c", code], environment, words, lifeline=True) as child:
            eventually(lambda: len(whole_lines(Path(words[1]))) == 2, "two are answered")
            yield child

    monkeypatch.setattr(counting_client, "python_module", late)
    monkeypatch.setattr(counting_client, "TIMEOUT_S", 0.01)
    assert counting_client.run_requests([{"cell": n} for n in range(3)]) == [{"peak_B": 1}, {"peak_B": 2}]


@pytest.mark.nightly
def test_steps_that_take_too_long_take_no_formula_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child is ended while it takes the first step; the counts of models were there before."""
    monkeypatch.setattr(counting_client, "TIMEOUT_S", 60.0)
    start = counting_client.python_module

    @contextlib.contextmanager
    def ended(*words: Any) -> Iterator[Any]:
        with start(*words) as child:
            eventually(lambda: bool(whole_lines(Path(words[1][1]))), "the models are counted")
            wait = child.wait
            brief = {60.0: 0.01}
            monkeypatch.setattr(child, "wait", lambda limit=None: wait(brief.get(limit, limit)))
            yield child

    monkeypatch.setattr(counting_client, "python_module", ended)
    suite = loader.load("headline-gpu")
    plan = suite.plan
    lora = tuple(cell for cell in plan.cells if plan.ids[cell.cell_id] == "lora-7b")
    (found,) = plan_table.predictions(suite, dataclasses.replace(plan, cells=lora)).values()
    assert isinstance(found, Predicted)
    assert found.weights_B > 7e9
    assert (found.peak_B, found.no_peak) == (None, "the steps before it took 60 s")
