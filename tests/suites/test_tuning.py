"""`tune:` in a suite: the Cells that it adds, what it refuses, and what the page says of the choice."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import SuiteError
from harness.suites import loader
from harness.suites.expand import Plan, select

SUITE = """suite: small
matrix:
  - model: tiny-llama
    task: toy-sentiment
    seed: [0, 1]
    training: {steps: 4, batch: 2, lr: 1e-3}
    evaluation: {items: 40}
    cells:
      - id: lora
        method: lora
        config: {rank: [2, 4], alpha: 8, targets: [q_proj]}
"""


def _plan(tmp_path: Path, tune: str, suite: str = SUITE) -> Plan:
    path = tmp_path / "suite.yaml"
    path.write_text(f"{suite}        tune: {tune}\n", encoding="utf-8")
    return loader.load(path).plan


def test_a_search_has_its_own_seed_and_items_and_may_speak_for_other_ranks(tmp_path: Path) -> None:
    plan = _plan(tmp_path, "{lr: [1e-4, 1e-3, 1e-2], items: 24, seed: 7, config: {rank: 4}}")
    (tuning,) = plan.tuning
    swept = [c for c in plan.cells if c.cell_id in tuning.sweep]
    ranked = [c for c in plan.cells if c.cell_id not in tuning.sweep]
    assert [c.training.lr for c in swept] == [1e-4, 1e-3, 1e-2]
    assert {(c.seed, c.config["rank"], c.evaluation.skip, c.evaluation.items) for c in swept} == {(7, 4, 40, 24)}
    assert tuning.cells == [c.cell_id for c in ranked]
    assert {c.config["rank"] for c in ranked} == {2, 4}
    assert select(plan, "tune=true").cells == tuple(swept)
    assert select(plan, "tune=false").cells == tuple(ranked)


def test_without_a_config_each_rank_has_its_own_search(tmp_path: Path) -> None:
    plan = _plan(tmp_path, "{lr: [1e-4, 1e-3], items: 24}")
    assert [len(t.sweep) for t in plan.tuning] == [2, 2]
    assert len({i for t in plan.tuning for i in t.sweep}) == 4


def test_an_item_that_chooses_a_rate_never_ranks() -> None:
    """`skip` is part of the Cell, so the items of the search lie after those of the ranking, and its id tells it."""
    suite = loader.load("smoke")
    cell = suite.plan.cells[0]
    other = cell.model_copy(update={"evaluation": cell.evaluation.model_copy(update={"skip": 5})})
    assert other.cell_id != cell.cell_id


def test_only_names_a_knob_that_stands_in_no_cell_at_its_default(tmp_path: Path) -> None:
    suite = SUITE.replace("[q_proj]", "[q_proj], init: [kaiming, gaussian]")
    plan = _plan(tmp_path, "{lr: [1e-3, 1e-2], items: 4}", suite)
    assert {cell.config.get("init") for cell in select(plan, "init=kaiming").cells} == {None}
    assert {cell.config.get("init") for cell in select(plan, "init=gaussian").cells} == {"gaussian"}


@pytest.mark.parametrize(
    ("own", "tuned", "found"),
    [
        ("", "gaussian", "gaussian"),
        (", init: orthogonal", "kaiming", None),
        (", init: gaussian", "gaussian", "gaussian"),
    ],
)
def test_a_knob_that_stands_in_no_cell_at_its_default_may_be_searched(
    tmp_path: Path, own: str, tuned: str, found: str | None
) -> None:
    suite = SUITE.replace("[q_proj]", f"[q_proj]{own}")
    plan = _plan(tmp_path, f"{{lr: [1e-3, 1e-2], items: 4, config: {{init: {tuned}}}}}", suite)
    swept = select(plan, "tune=true").cells
    assert len(swept) == 4
    assert all(cell.config.get("init", "none") == (found or "none") for cell in swept)


def test_a_search_in_a_schedule_of_another_length_is_refused(tmp_path: Path) -> None:
    sound = "method: adalora\n        config: {target_rank: 2, total_steps: 4, tinit: 1, tfinal: 1, "
    suite = SUITE.replace("method: lora\n        config: {", sound)
    with pytest.raises(SuiteError, match="`total_steps` of adalora is 9, but the training has 4 steps"):
        _plan(tmp_path, "{lr: [1e-3, 1e-2], items: 4, config: {total_steps: 9}}", suite)


@pytest.mark.parametrize(
    ("tune", "complaint"),
    [
        ("{lr: [1e-3], items: 4}", "tries fewer than two"),
        ("{lr: [1e-4, 1e-2], items: 4}", "`lr` is 0.001, but `tune` does not try it"),
        ("{lr: [1e-3, 1e-2], items: 4, seed: 1}", "a seed of the entry's Cells"),
        ("{lr: [1e-3, 1e-2], items: 30}", "has 64 test items, and 40 of them score"),
        ("{lr: [1e-3, 1e-2]}", "`tune` has no `items`"),
        ("{lr: [1e-3, 1e-2], items: 4, config: {rang: 4}}", "no method here has the `rang`"),
        ("{lr: [1e-3, 1e-2], items: 4, config: {rank: 0}}", "`rank` of lora"),
        ("{lr: [1e-3, 1e-2], items: 4, config: {rank: 3, init: orthogonal}}", "divides the rank into halves"),
        ("{lr: [1e-3, 1e-2], items: 4, config: {adapter_config: ./here}}", "is a method of its own"),
        ("{rates: [1e-3, 1e-2], items: 4}", "unknown key `rates`"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path: Path, tune: str, complaint: str) -> None:
    with pytest.raises(SuiteError, match=r"suite\.yaml:12") as error:
        _plan(tmp_path, tune)
    assert complaint in str(error.value)
    assert len(error.value.problems) == 1


def test_all_mistakes_of_a_search_at_once(tmp_path: Path) -> None:
    with pytest.raises(SuiteError) as error:
        _plan(tmp_path, "{lr: [1e-4, 1e-2], items: 30, seed: 1}")
    assert len(error.value.problems) == 3


def test_what_does_not_train_cannot_be_tuned(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="nothing is trained in 0 steps"):
        _plan(tmp_path, "{lr: [1e-3, 1e-2], items: 4}", SUITE.replace("steps: 4", "steps: 0"))
