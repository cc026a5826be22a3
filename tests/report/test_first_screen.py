"""First screen of the report: which recipe it recommends, at what cost, and what makes the numbers trustworthy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.analysis import choice, ranking, run_facts
from harness.analysis.choice import Choice
from harness.cli import main
from harness.errors import Exit
from harness.records.imported import Imported
from harness.records.record import Outcome, Record, Status
from harness.report import first_screen, html, terminal, view
from harness.report.table_model import by_key
from support import recorded_run
from support.report_page import Page

Change = Callable[[str, Record], Record | None]


def _chosen(folder: Path, only: list[str], change: Change | None = None) -> tuple[Choice, dict[str, Any]]:
    """Return the choice among Cells of the recorded run, and what the first screen shows of it."""
    run = recorded_run.write_run(folder, only=only, **({"change": change} if change else {}))
    facts = run_facts.analyse(run)
    found = choice.choose(facts.groups[0])
    assert found is not None
    return found, first_screen.answers(facts)[0]


def _method(entry: Any) -> tuple[str, str]:
    return entry.record.cell.method, entry.record.cell.implementation


def _card(answer: dict[str, Any], question: str) -> dict[str, Any]:
    return next(card for card in answer["cards"] if card["question"] == question)


def _rows(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Map the name of each recipe to its fields by column."""
    table = answer["table"]
    return {row["name"]: by_key(table["columns"], row["fields"]) for g in table["groups"] for row in g["rows"]}


def test_a_winner_is_named_only_if_every_other_recipe_is_told_apart(tmp_path: Path) -> None:
    found, answer = _chosen(tmp_path / "a", ["reference", "lora-r1"])
    assert found.winner
    assert found.pick is found.highest
    assert _card(answer, "Which method?")["headline"].startswith("lora r=8: 81")
    assert _card(answer, "Can I trust it?")["headline"] == "Code: yes. Ranking: yes."

    found, answer = _chosen(tmp_path / "b", ["full", "reference", "head"])
    assert not found.winner
    assert found.undecided == 1
    assert _card(answer, "Which method?")["headline"].startswith("No proven winner.")


def test_a_comparison_with_lost_cells_has_no_winner(tmp_path: Path) -> None:
    """With fewer results, fewer tests would be corrected for each other, and more recipes would be told apart."""
    found, answer = _chosen(
        tmp_path / "r", ["reference", "lora-r1", "full"], lambda name, record: None if name == "full" else record
    )
    assert found.winner
    assert _card(answer, "Which method?")["headline"].startswith("Not decided. Highest so far: lora r=8, 81")
    trust = _card(answer, "Can I trust it?")
    assert trust["headline"] == "Code: yes. Ranking: no."
    assert trust["details"][-1].startswith("1 planned Cell has no result that counts: 1 without")


@pytest.mark.parametrize("form", ["markdown", "json", "csv"])
def test_every_format_says_which_records_do_not_count(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recorded_run.write_run(tmp_path / "r", only=["reference", "lora-r1", "full"])
    changed, unreadable, removed = sorted((run.path / "cells").glob("*.json"))
    changed.write_text(changed.read_text(encoding="utf-8") + " ", encoding="utf-8")
    unreadable.write_text("{", encoding="utf-8")
    removed.unlink()
    assert main(["report", str(run.path), "--format", form]) != Exit.PASS
    out, err = capsys.readouterr()
    for text in (err,) if form == "csv" else (out, err):
        assert all(path.stem in text for path in (changed, unreadable, removed))


def test_an_untrained_recipe_is_shown_with_its_test(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "r", only=["smollm-lora", "zero-shot"])
    facts = run_facts.analyse(run)
    gap = _rows(first_screen.answers(facts)[0])["zero-shot"]["difference"]
    assert gap["small"] == "not trained"
    assert "p < 0.001" in gap["why"]
    # The section with the charts tells the same.
    (group,) = view.build([facts])["runs"][0]["groups"]
    assert any("without training: zero-shot" in text and "p < 0.001" in text for text in group["sentences"])


def test_without_a_winner_the_cheapest_recipe_near_the_top_is_recommended(tmp_path: Path) -> None:
    found, answer = _chosen(tmp_path / "r", ["full", "reference", "fused", "hf-peft", "lora-r1", "head"])
    # Nothing checks the Cells of `full` and `head` in this run.
    assert _method(found.highest) == ("full", "reference")
    assert [_method(e) for e in found.near] == [
        ("full", "reference"), ("lora", "hf-peft"), ("lora", "reference"), ("lora", "fused"),
    ]  # fmt: skip
    # `head` needs less memory than all of these, but tests tell it apart from the highest.
    assert _method(found.pick) == ("lora", "fused")
    headline = _card(answer, "Which method?")["headline"]
    below = abs(100 * found.pick.difference)
    cheapest = f"Cheapest near the top: lora r=8 [fused], {below:.1f} points below the highest."
    assert headline == f"No proven winner. {cheapest}"
    assert "instead of" in _card(answer, "At what cost?")["headline"]
    assert _card(answer, "At what cost?")["details"][0] == "lora r=8 [fused] against full."
    assert _card(answer, "Can I trust it?")["headline"] == "Code: partly checked. Ranking: no."


@pytest.mark.parametrize(("below", "cheapest"), [(choice.MARGIN - 0.001, "lora"), (choice.MARGIN + 0.001, "full")])
def test_near_the_top_is_a_matter_of_points(tmp_path: Path, below: float, cheapest: str) -> None:
    (group,) = ranking.groups(recorded_run.write_run(tmp_path / "r", only=["full", "reference"]))
    highest, second = group.ranked
    score = replace(second.score, value=highest.score.value - below)
    found = choice.choose(replace(group, ranked=(highest, replace(second, score=score, standing="tied"))))
    assert found is not None
    assert found.undecided == 1
    assert found.pick.record.cell.method == cheapest


def test_a_failed_check_is_said_on_the_first_screen(tmp_path: Path) -> None:
    def fail(name: str, record: Record) -> Record:
        if name != "reference":
            return record
        first, *rest = record.checks
        return record.model_copy(update={"checks": [first.model_copy(update={"outcome": Outcome.FAIL}), *rest]})

    _, answer = _chosen(tmp_path / "r", ["reference", "lora-r1"], fail)
    card = _card(answer, "Can I trust it?")
    assert card["headline"].startswith("Code: no.")
    assert card["tone"] == "bad"


@pytest.mark.parametrize("busy", [False, True])
def test_busy_times_are_flagged_in_the_row_and_on_the_cards(tmp_path: Path, busy: bool) -> None:
    def wait(_: str, record: Record) -> Record:
        assert record.measurements is not None
        training = record.training
        assert training is not None
        used = sum(training.step_seconds) * (0.5 if busy else 1.9)
        changed = training.model_copy(update={"cpu_seconds": used})
        return record.model_copy(update={"measurements": record.measurements.model_copy(update={"training": changed})})

    _, answer = _chosen(tmp_path / "r", ["full", "reference"], wait)
    for key in ("step_s", "to_target_s", "tokens_per_s"):
        assert [fields[key]["flag"] for fields in _rows(answer).values()] == (["busy 1 of 1"] * 2 if busy else ["", ""])
    said = " ".join(text for card in answer["cards"] for text in card["details"])
    assert ("busy machine" in said) is busy
    assert ("Other programs used the CPU" in said) is busy


def test_the_warnings_of_the_cards_are_in_the_terminal(tmp_path: Path) -> None:
    def wait(_: str, record: Record) -> Record:
        assert record.measurements is not None
        training = record.training.model_copy(update={"cpu_seconds": 0.1})  # type: ignore[union-attr]
        return record.model_copy(update={"measurements": record.measurements.model_copy(update={"training": training})})

    run = recorded_run.write_run(tmp_path / "r", only=["full", "reference"], change=wait)
    lines = terminal.summary(run_facts.analyse(run))
    (line,) = [line for line in lines if "! Other programs used the CPU while" in line]
    assert lines[lines.index(line) - 1].strip().startswith("At what cost?")


def test_a_recipe_has_more_columns_to_choose(tmp_path: Path) -> None:
    _, answer = _chosen(tmp_path / "r", ["full", "reference"])
    shown = {c["key"] for c in answer["table"]["columns"] if c["shown"]}
    assert {"accuracy", "trainable", "peak_B", "step_s", "to_target_s"} <= shown
    lora = _rows(answer)["lora r=8"]
    assert shown.isdisjoint({"tokens_per_s", "adapter_file_B", "unmerged_s", "merged_s", "lr", "seeds"})
    assert (lora["lr"]["text"], lora["seeds"]["text"]) == ("0.002", "1")
    assert 1.2 < lora["unmerged_s"]["value"] / lora["merged_s"]["value"] < 1.5  # 1.35 / 1.01 in the recorded run
    assert _rows(answer)["full"]["unmerged_s"]["why"] == "not measured, or no adapter"


def test_the_cost_card_says_what_merging_saves(tmp_path: Path) -> None:
    _, answer = _chosen(tmp_path / "r", ["reference", "lora-r1"])
    said = _card(answer, "At what cost?")["details"][-1]
    words = re.sub(r"[\d.]+ ms", "N ms", said)
    assert words == "A pass takes N ms with the adapter, N ms merged and N ms without an adapter."
    attached, merged, base = map(float, re.findall(r"([\d.]+) ms", said))
    assert base < merged < attached


def test_cells_without_a_score_are_named_beside_the_recipes_with_the_reason(tmp_path: Path) -> None:
    stop = lambda n, r: recorded_run.failed(r, Status.OOM, because="no room") if n == "full" else r  # noqa: E731
    page = Page(html.render([run_facts.analyse(recorded_run.write_run(tmp_path / "r", change=stop))]))
    answer = page.text.partition("Can I trust it?")[2].partition("exit code")[0]
    assert "These Cells have no score, so they have no row:" in answer
    assert "full [reference] : oom: no room" in answer


def test_an_imported_recipe_has_a_flag_and_its_costs_are_not_measured(tmp_path: Path) -> None:
    def imported(name: str, record: Record) -> Record:
        if name != "lora-r1" or record.measurements is None:
            return record
        origin = Imported(folder="run", adapter_sha256="0" * 64, config_sha256="0" * 64)
        without = {"measurements": record.measurements.model_copy(update={"training": None}), "phases": []}
        return record.model_copy(update={"imported": origin, **without})

    _, answer = _chosen(tmp_path / "r", ["reference", "lora-r1"], imported)
    fields = _rows(answer)["lora r=1"]
    assert fields["accuracy"]["flag"] == "imported"
    reasons = {fields[key]["why"].partition(":")[0] for key in ("peak_B", "step_s", "to_target_s", "tokens_per_s")}
    assert reasons == {"not known of the imported training"}
    assert _rows(answer)["lora r=8"]["accuracy"]["flag"] == ""


def test_the_recommended_recipe_comes_as_an_adapter_config(tmp_path: Path) -> None:
    cell = recorded_run.cells()["fused"]
    cell = cell.model_copy(update={"config": {**cell.config, "targets": ["query", "value"]}})
    made = recorded_run.record("fused", cell)
    run = recorded_run.write_run(tmp_path / "r", only=["head"], cells=[cell], change=lambda *_: None, extra=[made])
    (answer,) = first_screen.answers(run_facts.analyse(run))
    keys = json.loads(answer["adapter"]["text"])
    assert [keys["peft_type"], keys["r"], keys["lora_alpha"]] == ["LORA", 8, 16]
    assert keys["target_modules"] == ["query", "value"]

    _, answer = _chosen(tmp_path / "full", ["full", "head"])
    assert answer["adapter"] == {
        "text": "",
        "remark": "There is no adapter_config.json for full: peft has no such Method.",
    }


def test_names_show_an_implementation_only_where_a_method_has_several(tmp_path: Path) -> None:
    _, answer = _chosen(tmp_path / "r", ["full", "reference", "fused"])
    assert set(_rows(answer)) == {"full", "lora r=8 [reference]", "lora r=8 [fused]"}


def test_the_cards_stand_before_everything_else_on_the_page(tmp_path: Path) -> None:
    facts = run_facts.analyse_all([recorded_run.write_run(tmp_path / "r")])
    page = html.render(facts)
    places = [page.index(text) for text in ("Which method?", "At what cost?", "Can I trust it?", 'class="verdict')]
    assert places == sorted(places)
    assert page.index("Can I trust it?") < page.index("<nav")


def test_items_that_only_one_recipe_answers_right_are_named(tmp_path: Path) -> None:
    def answer(name: str, record: Record) -> Record:
        """Let `reference` lose the first two items of `full`, and gain the third."""
        assert record.measurements is not None
        assert record.measurements.accuracy is not None
        a = record.measurements.accuracy
        first = {"full": (1, 1, 0), "reference": (0, 0, 1)}[name]
        items = [item.model_copy(update={"correct": right}) for item, right in zip(a.items, first, strict=False)]
        items += [item.model_copy(update={"correct": int(i % 5 > 0)}) for i, item in enumerate(a.items[3:])]
        changed = a.model_copy(update={"items": items, "value": sum(i.correct for i in items) / len(items)})
        return record.model_copy(update={"measurements": record.measurements.model_copy(update={"accuracy": changed})})

    run = recorded_run.write_run(tmp_path / "r", only=["full", "reference"], change=answer)
    facts = run_facts.analyse(run)
    (row,) = first_screen.answers(facts)[0]["items"]
    items = [item.id for item in next(r for r in facts.latest.values() if r.accuracy).accuracy.items]  # type: ignore[union-attr]
    assert [row["name"], row["lost"], row["gained"]] == ["lora r=8", 2, 1]
    assert [row["lost_ids"], row["gained_ids"]] == [", ".join(items[:2]), items[2]]
