from __future__ import annotations

from pathlib import Path

import pytest

from harness.analysis import run_verdict
from harness.errors import UsageError
from harness.records import naming
from harness.records.record import Cell, Status
from harness.report import plan_table
from harness.runner.progress import Progress
from harness.suites import loader
from harness.suites.expand import Plan, select
from harness.suites.suite import Suite
from support import recorded_run


def _variants() -> list[Cell]:
    cell = recorded_run.cells()["reference"]
    longer = cell.training.model_copy(update={"steps": 90})
    faster = cell.training.model_copy(update={"lr": 1e-2})
    return [
        cell,
        cell.model_copy(update={"seed": 1}),
        cell.model_copy(update={"training": longer}),
        cell.model_copy(update={"training": faster}),
        cell.model_copy(update={"config": cell.config | {"dropout": 0.1}}),
        cell.model_copy(update={"evaluation": cell.evaluation.model_copy(update={"batch": 4})}),
        cell.model_copy(update={"task": "other-task"}),
        recorded_run.cells()["head"],
    ]


def test_no_two_cells_of_a_run_have_the_same_name() -> None:
    cells = _variants()
    assert len(set(naming.full(cells).values())) == len(cells)
    inside = naming.in_group(cells)
    assert len({(c.model, c.task, inside[c.cell_id]) for c in cells}) == len(cells)


def test_cells_that_share_a_label_are_named_by_what_differs_among_them() -> None:
    cells = _variants()
    named = naming.in_group(cells)
    told = "seed=0 steps=90 lr=0.002 evaluation batch=32"
    assert named[cells[2].cell_id] == f"lora r=8 [reference] {told}"
    # The only Cell of its task needs no more than its label, nor does one whose label nobody shares.
    assert named[cells[-2].cell_id] == "lora r=8 [reference]"
    assert named[cells[-1].cell_id] == "frozen [reference]"


def test_a_knob_at_its_default_is_not_named_unless_names_would_be_the_same() -> None:
    cell = recorded_run.cells()["reference"]
    started = cell.model_copy(update={"config": cell.config | {"init": "orthogonal"}})
    assert list(naming.in_group([cell, started]).values()) == [
        "lora r=8 [reference]", "lora r=8 [reference] init=orthogonal"
    ]  # fmt: skip
    left, right = (cell.model_copy(update={"config": cell.config | {side: {"rate": 0.1}}}) for side in ("a", "b"))
    assert list(naming.in_group([left, right]).values()) == [
        "lora r=8 [reference] rate=0.1 rate=unset", "lora r=8 [reference] rate=unset rate=0.1"
    ]  # fmt: skip


def test_a_name_says_no_more_than_it_must() -> None:
    seeds = [recorded_run.cells(seed)["fused"] for seed in (0, 1)]
    assert list(naming.in_group(seeds).values()) == ["lora r=8 [fused] seed=0", "lora r=8 [fused] seed=1"]
    quick = list(recorded_run.cells().values())
    assert naming.full(quick) == {c.cell_id: c.label for c in quick}


def _two_seeds(tmp_path: Path) -> tuple[Suite, Plan]:
    path = tmp_path / "seeds.yaml"
    text = loader.find("smoke").read_text(encoding="utf-8").partition("comparisons:")[0]
    path.write_text(text.replace("    task:", "    seed: [1, 2]\n    task:"), encoding="utf-8")
    suite = loader.load(path)
    return suite, select(suite.plan, "id=lora,implementation=fused")


def test_plan_and_only_call_no_two_cells_the_same(tmp_path: Path) -> None:
    suite, plan = _two_seeds(tmp_path)
    document = plan_table.planning(suite, plan, tmp_path)
    names = [c["name"] for c in document["cells"]]
    assert names == ["tiny-llama lora r=4 [fused] seed=1", "tiny-llama lora r=4 [fused] seed=2"]
    assert all(name in "\n".join(plan_table.lines(document)) for name in names)
    assert select(plan, "seed=2").cells == select(plan, " seed=2").cells == plan.cells[1:]
    with pytest.raises(UsageError) as caught:
        select(plan, "nothing")
    assert all(name in str(caught.value) for name in names)


def test_progress_calls_no_two_cells_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, plan = _two_seeds(tmp_path)
    progress = Progress(plan.cells)
    first, second = plan.cells
    progress.resumed(first)
    progress.begin(second)
    progress.end(recorded_run.record("fused", second))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "1/2  resumed       tiny-llama lora r=4 [fused] seed=1  has an ok Record"
    assert lines[1].startswith("2/2  ok            tiny-llama lora r=4 [fused] seed=2  accuracy ")


def test_a_verdict_names_the_cell_it_means(tmp_path: Path) -> None:
    one, two = (recorded_run.cells(seed)["fused"] for seed in (0, 1))
    red = recorded_run.failed(recorded_run.record("fused", two), Status.NONCONFORMING)
    run = recorded_run.write_run(
        tmp_path / "r", cells=[one, two], change=lambda *_: None, extra=[recorded_run.record("fused", one), red]
    )
    reason = run_verdict.judge(run).verdict.reason
    assert "seed=1" in reason
    assert "seed=0" not in reason


def test_a_server_makes_another_cell_and_none_leaves_the_id_as_it_was() -> None:
    cell = recorded_run.cells()["fused"]
    served = cell.model_copy(update={"serve": "vllm"})
    known = cell.model_dump(mode="json", exclude={"serve", "environment"})
    assert Cell.model_validate(known).cell_id == cell.cell_id
    assert served.cell_id != cell.cell_id
    assert list(naming.full([cell, served]).values())[1].endswith("[fused] served by vllm")
