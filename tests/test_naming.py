from __future__ import annotations

from pathlib import Path

import recorded_run as recorded

from harness.analysis import naming, verdict
from harness.records import Cell, Status


def _variants() -> list[Cell]:
    cell = recorded.cells()["reference"]
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
        recorded.cells()["head"],
    ]


def test_no_two_cells_of_a_run_have_the_same_name() -> None:
    cells = _variants()
    assert len(set(naming.full(cells).values())) == len(cells)
    inside = naming.in_group(cells)
    assert len({(c.model, c.task, inside[c.cell_id]) for c in cells}) == len(cells)


def test_cells_that_share_a_label_are_named_by_what_differs_among_them() -> None:
    cells = _variants()
    named = naming.in_group(cells)
    told = "seed=0 steps=90 lr=0.002 evaluation batch=32 dropout=unset"
    assert named[cells[2].cell_id] == f"lora r=8 [reference] {told}"
    # The only Cell of its task needs no more than its label, nor does one whose label nobody shares.
    assert named[cells[-2].cell_id] == "lora r=8 [reference]"
    assert named[cells[-1].cell_id] == "frozen [reference]"


def test_a_name_says_no_more_than_it_must() -> None:
    seeds = [recorded.cells(seed)["fused"] for seed in (0, 1)]
    assert list(naming.in_group(seeds).values()) == ["lora r=8 [fused] seed=0", "lora r=8 [fused] seed=1"]
    quick = list(recorded.cells().values())
    assert naming.full(quick) == {c.cell_id: c.label for c in quick}


def test_a_verdict_names_the_cell_it_means(tmp_path: Path) -> None:
    one, two = (recorded.cells(seed)["fused"] for seed in (0, 1))
    red = recorded.failed(recorded.record("fused", two), Status.NONCONFORMING)
    run = recorded.write_run(
        tmp_path / "r", cells=[one, two], change=lambda *_: None, extra=[recorded.record("fused", one), red]
    )
    reason = verdict.judge(run).verdict.reason
    assert "seed=1" in reason
    assert "seed=0" not in reason
