"""`report --format`: the recipes as Markdown, CSV and JSON, and the page of several runs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from harness.cli import main
from harness.errors import Exit
from support import recorded_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return recorded_run.write_run(tmp_path / "r").path


def _printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(["report", *words])
    return capsys.readouterr().out


def test_csv_has_the_values_in_the_units_of_its_header(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = list(csv.DictReader(io.StringIO(_printed(capsys, str(run), "--format", "csv"))))
    fused = next(row for row in found if row["recipe"] == "lora r=8 [fused]")
    assert [fused["accuracy, %"], fused["trainable parameters"], fused["standing"]] == ["81.0", "369410", "tied"]
    assert float(fused["peak memory, MiB"]) == 396  # 806 less 410 of the imports
    assert 80 < float(fused["step, ms"]) < 90  # around 82, in ms and not in seconds
    assert float(fused["lower bound, %"]) < 81 < float(fused["upper bound, %"])
    assert 0.4 < float(fused["target loss"]) < 0.7
    assert 0 < float(fused["time to the target loss, s"]) < 60 * 0.1  # less than all 60 steps, in seconds
    assert float(fused["learning rate"]) == 0.002


def test_json_has_base_units(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (only,) = json.loads(_printed(capsys, str(run), "--format", "json"))["runs"]
    recipes = {one["name"]: one for group in only["groups"] for one in group["recipes"]}
    assert recipes["lora r=8 [fused]"]["peak_B"] == 396 * 2**20
    assert 0 < recipes["lora r=8 [fused]"]["to_target_s"] < 6
    assert [card["question"] for card in only["groups"][0]["cards"]] == [
        "Which method?", "At what cost?", "Can I trust it?",
    ]  # fmt: skip


def test_markdown_is_one_table_per_model_and_task(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = _printed(capsys, str(run), "--format", "markdown").splitlines()
    assert [line for line in lines if line.startswith("## ")] == [
        "## minilm-l6 · movie-sentiment", "## smollm2-135m-instruct · movie-sentiment",
    ]  # fmt: skip
    table = [line for line in lines if line.startswith("|")]
    assert {line.count(" | ") for line in table} == {7}
    assert any(line.startswith("To loss: training until the mean loss of 6 steps was 0.") for line in lines)
    assert any(line.startswith("| lora r=8 \\[fused\\] | 81.0 % |") for line in table)


def test_seeds_that_missed_the_target_loss_are_in_every_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {0: [0.1] * 60, 1: [0.1] * 60, 2: [9.0] * 60}
    cells = [recorded_run.cells(seed)["fused"] for seed in losses]
    made = [recorded_run.with_losses(recorded_run.record("fused", cell), losses[cell.seed]) for cell in cells]
    run = recorded_run.write_run(tmp_path / "r", only=["head"], cells=cells, change=lambda *_: None, extra=made)
    assert "(2 of 3 seeds) |" in _printed(capsys, str(run.path), "--format", "markdown")
    (row,) = csv.DictReader(io.StringIO(_printed(capsys, str(run.path), "--format", "csv")))
    assert row["seeds that reached it"] == "2"


def test_a_title_can_be_neither_markup_nor_a_line_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recorded_run.write_run(tmp_path / "r", only=["full", "head"], title="=1+1 | <b>\n## forged")
    lines = _printed(capsys, str(run.path), "--format", "markdown").splitlines()
    assert lines[0] == "# =1+1 \\| \\<b\\> \\#\\# forged"


def test_a_name_is_no_formula_in_a_spreadsheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded_run.write_run(tmp_path / "r", run="=cmd()", only=["full", "head"])
    found = list(csv.DictReader(io.StringIO(_printed(capsys, str(run.path), "--format", "csv"))))
    assert {row["run"] for row in found} == {"'=cmd()"}


def test_out_names_the_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "recipes.csv"
    assert _printed(capsys, str(run), "--format", "csv", "--out", str(out)) == ""
    assert out.read_text().startswith("run,model and task,recipe,")


@pytest.mark.slow
def test_the_page_of_two_runs_does_not_replace_the_page_of_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (recorded_run.write_run(tmp_path / name).path for name in "ab")
    assert main(["report", str(first)]) in (Exit.PASS, Exit.FAIL, Exit.INCONCLUSIVE, Exit.INFRASTRUCTURE)
    before = (first / "report.html").read_bytes()
    main(["report", str(first), str(second)])
    (page,) = first.glob("report-with-*.html")
    assert (first / "report.html").read_bytes() == before
    assert capsys.readouterr().out.rstrip().endswith(page.name)
