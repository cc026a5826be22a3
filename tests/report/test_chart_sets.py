"""Charts of a run: what is drawn, what a tooltip says, and the files of `report --svg`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from harness.analysis import measurements
from harness.analysis.run_facts import RunFacts, analyse
from harness.cli import main
from harness.records.manifest import Tuning
from harness.records.record import Cell, Record
from harness.report import chart_files, chart_sets
from support import recorded_run

Drawing = dict[str, Any]
CELLS = recorded_run.cells()


def ranked(rank: int, accuracy: float, method: str = "lora", **changes: Any) -> Record:
    """Return a Record of LoRA or of a method with another name at some rank, with some accuracy."""
    cell = CELLS["reference"].model_copy(update={"method": method, "config": {"rank": rank}, **changes})
    lora = recorded_run.record("reference", cell.model_copy(update={"method": "lora"}))
    made = recorded_run.with_accuracy(lora, accuracy)
    return made.model_copy(update={"cell": cell, "cell_id": cell.cell_id})


def facts(folder: Path, records: Sequence[Record], **manifest: Any) -> RunFacts:
    cells = [record.cell for record in records]
    run = recorded_run.write_run(folder, cells=cells, extra=records, change=lambda *_: None, comparisons=[], **manifest)
    return analyse(run)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> RunFacts:
    """Two methods, one with three ranks that the manifest has in another order."""
    records = [ranked(32, 0.80), ranked(2, 0.70), ranked(8, 0.82), ranked(4, 0.6, "dora")]
    return facts(tmp_path_factory.mktemp("swept") / "run", records)


def figure(charts: Drawing, choice: str) -> Drawing:
    (found,) = [f for f in charts["figures"] if f["choice"] == choice]
    return found


def dots(drawing: Drawing, series: int | None = None) -> list[Drawing]:
    found = [m for m in drawing["marks"] if "dot" in m["attributes"]["class"].split()]
    return [m for m in found if series in (None, m["attributes"]["data-series"])]


def one_set(f: RunFacts) -> Drawing:
    found = chart_sets.accuracy(f, f.groups[0])
    assert found is not None
    return found


def test_the_axes_are_the_costs_that_were_measured_and_the_rank(swept: RunFacts) -> None:
    costs = one_set(swept)
    assert [f["choice"] for f in costs["figures"]] == [
        "training memory", "trainable parameters", "step time", "latency", "rank"
    ]  # fmt: skip
    assert all(len(dots(f)) == 4 for f in costs["figures"][:-1])


def test_a_method_is_one_series_whose_line_goes_from_rank_to_rank(swept: RunFacts) -> None:
    costs = one_set(swept)
    assert [entry["name"] for entry in costs["legend"]] == ["lora", "dora"]
    for drawing in (figure(costs, "latency"), figure(costs, "rank")):
        assert [d["tip"].partition(":")[0] for d in dots(drawing, 0)] == ["lora r=2", "lora r=8", "lora r=32"]
    assert dots(figure(costs, "rank"), 1) == []  # dora has one rank
    assert "rank 32" in dots(figure(costs, "rank"), 0)[-1]["tip"]


def test_a_point_tells_its_numbers_and_links_to_its_row(swept: RunFacts) -> None:
    dot = dots(figure(one_set(swept), "training memory"), 0)[1]
    record = next(r for r in swept.latest.values() if r.cell.config["rank"] == 8)
    assert dot["href"] == f"#cell-{record.cell_id}"
    assert dot["tip"].startswith("lora r=8: 82.0 % [")
    peak = measurements.training_peak(record)
    assert peak is not None
    memory = f"{(peak - record.measurements.memory.baseline_B) / 2**20:.0f} MiB" if record.measurements else ""
    assert dot["tip"].endswith(f"training memory {memory}.")


def test_the_notes_name_the_front_and_what_has_no_value(tmp_path: Path) -> None:
    untimed = ranked(2, 0.7)
    assert untimed.measurements is not None
    untimed = untimed.model_copy(update={"measurements": untimed.measurements.model_copy(update={"latency": []})})
    costs = one_set(facts(tmp_path / "run", [untimed, ranked(8, 0.8), ranked(32, 0.75)]))
    notes = figure(costs, "latency")["notes"]
    assert any(note.endswith("Without a value: lora r=2.") for note in notes)
    (front,) = [note for note in notes if "front" in note]
    assert "lora r=8" in front


def test_a_time_of_a_busy_machine_is_marked_in_charts_of_time_alone(tmp_path: Path) -> None:
    waited = ranked(2, 0.7)
    assert waited.measurements is not None
    assert waited.training is not None
    training = waited.training.model_copy(update={"cpu_seconds": 0.1})
    waited = waited.model_copy(update={"measurements": waited.measurements.model_copy(update={"training": training})})
    costs = one_set(facts(tmp_path / "run", [waited, ranked(8, 0.8)]))
    for choice, rings in (("step time", 1), ("latency", 1), ("training memory", 0), ("rank", 0)):
        drawing = figure(costs, choice)
        assert len([m for m in drawing["marks"] if m["attributes"]["class"] == "ring"]) == rings, choice
        assert ("! may be too high" in dots(drawing)[0]["tip"]) == bool(rings)
        assert any(note.startswith("! Dashed ring, 1 of 2:") for note in drawing["notes"]) == bool(rings)


def test_a_method_has_one_colour_in_all_charts(swept: RunFacts) -> None:
    def hue(charts: Drawing, name: str) -> str:
        (entry,) = [e for e in charts["legend"] if e["name"].startswith(name)][:1]
        return str(entry["sample"]["marks"][0]["attributes"]["class"].split()[1])

    (losses,) = chart_sets.curves(swept)
    costs = one_set(swept)
    assert {hue(costs, "lora"), hue(losses, "lora")} == {hue(costs, "lora")}
    assert hue(costs, "dora") == hue(losses, "dora") != hue(costs, "lora")


def test_curves_show_the_best_recipe_of_each_method_at_first(swept: RunFacts) -> None:
    (losses,) = chart_sets.curves(swept)
    assert [e["name"] for e in losses["legend"] if e["shown"]] == ["lora r=8", "dora r=4"]
    assert len(losses["legend"]) == 4


def test_a_diverging_curve_is_cut_and_named_with_its_highest_loss(tmp_path: Path) -> None:
    wild = recorded_run.with_losses(ranked(2, 0.7), [0.7, 0.7, *[0.9] * 3, 35.0, *[20.0] * 10])
    calm = recorded_run.with_losses(ranked(8, 0.8), [0.7, *[0.6] * 15])
    (losses,) = chart_sets.curves(facts(tmp_path / "run", [wild, calm]))
    (drawing,) = losses["figures"]
    note = drawing["notes"][-1]
    assert note.startswith("Drawn up to 0.875, 1.25 times the highest first loss:")
    assert "lora r=2 reaches 35 at step 5" in note
    assert "lora r=8" not in note
    ticks = [m["text"] for m in drawing["marks"] if m["attributes"].get("text-anchor") == "end"]
    assert max(map(float, ticks)) < 1
    curve = next(m for m in drawing["marks"] if m["tip"] == "lora r=2")
    assert "|12: 20|" in curve["attributes"]["data-at"]  # the text has the loss itself


def test_losses_that_range_wide_have_a_logarithmic_axis(tmp_path: Path) -> None:
    falling = recorded_run.with_losses(ranked(2, 0.7), [5.0 * 0.6**t for t in range(16)])
    (losses,) = chart_sets.curves(facts(tmp_path / "run", [falling, ranked(8, 0.8)]))
    texts = [m["text"] for m in losses["figures"][0]["marks"]]
    assert "training loss, nats (logarithmic)" in texts


def test_a_search_is_a_line_over_its_rates_with_the_chosen_one_filled(tmp_path: Path) -> None:
    def tried(lr: float) -> Cell:
        cell = CELLS["reference"]
        evaluation = cell.evaluation.model_copy(update={"skip": 500})
        return cell.model_copy(
            update={"evaluation": evaluation, "training": cell.training.model_copy(update={"lr": lr})}
        )

    final = recorded_run.record("reference", CELLS["reference"])
    records = [recorded_run.record("reference", tried(lr)) for lr in (1e-2, 2e-3, 1e-3)]
    search = Tuning(entry="lora", cells=[final.cell_id], sweep=[r.cell_id for r in records])
    run = facts(tmp_path / "run", [final, *records], tuning=[search])
    (rates,) = chart_sets.rates(run)
    (drawing,) = rates["figures"]
    assert ["hollow" in d["attributes"]["class"] for d in dots(drawing)] == [True, False, True]
    assert [d["tip"].rpartition("lr=")[2] for d in dots(drawing)] == ["0.001", "0.002, the chosen rate", "0.01"]
    (losses,) = chart_sets.curves(run)
    assert [e["name"] for e in losses["legend"] if e["shown"]] == ["lora r=8"]
    assert chart_sets.rates(analyse(recorded_run.write_run(tmp_path / "other"))) == []


def test_many_cells_share_the_bars_of_their_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [ranked(2, 0.7), ranked(8, 0.8), ranked(4, 0.6, "dora")]
    few = chart_sets.time(facts(tmp_path / "run", records))
    assert few[0]["figures"][0]["title"] == "Time of each Cell by phase"
    monkeypatch.setattr(chart_sets, "_BARS", 2)
    (many,) = chart_sets.time(facts(tmp_path / "more", records))
    (drawing,) = many["figures"]
    assert drawing["height"] < few[0]["figures"][0]["height"]
    assert "3 Cells in total" in many["note"]
    assert {m["text"] for m in drawing["marks"]} >= {"lora [reference]", "dora [reference]"}


# ---- files


@pytest.mark.slow
def test_every_chart_is_a_light_and_a_dark_file_without_variables(swept: RunFacts, tmp_path: Path) -> None:
    written = chart_files.write_charts([swept], tmp_path / "new" / "charts")
    names = {path.name for path in (tmp_path / "new" / "charts").iterdir()}
    assert names == {path.name for path in written}
    assert {
        "minilm-l6-movie-sentiment-accuracy-against-training-memory-light.svg",
        "minilm-l6-movie-sentiment-accuracy-against-rank-dark.svg",
        "minilm-l6-movie-sentiment-training-loss-dark.svg",
    } <= names
    for path in written:
        text = path.read_text(encoding="utf-8")
        assert ET.fromstring(text).tag.endswith("svg")
        assert "var(" not in text
        assert "<script" not in text
        assert " href=" not in text
        assert ("#14171b" in text) == path.name.endswith("-dark.svg")
    losses = ET.fromstring(
        (tmp_path / "new" / "charts" / "minilm-l6-movie-sentiment-training-loss-light.svg").read_text()
    )
    shown = {text.text for text in losses.iter("{http://www.w3.org/2000/svg}text")}
    assert {"lora r=8", "dora r=4"} <= shown  # the legend
    assert len([p for p in losses.iter("{http://www.w3.org/2000/svg}path") if p.get("data-at")]) == 2


def test_hostile_names_make_no_other_file_and_no_broken_one(tmp_path: Path) -> None:
    run = analyse(recorded_run.write_hostile_run(tmp_path / "run"))
    for path in chart_files.write_charts([run, run], tmp_path / "svg"):
        assert path.parent == tmp_path / "svg"
        assert path.name.replace("-", "").replace(".", "").isalnum()
        assert len(path.name) < 200
        ET.fromstring(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_report_svg_says_where_the_files_are(
    swept: RunFacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "page.html")]
    assert main(["report", str(swept.run.path), *out, "--svg", str(tmp_path / "svg")]) == 0
    count = len(list((tmp_path / "svg").iterdir()))
    assert count > 10
    assert f"charts: {count} files in {tmp_path / 'svg'}" in capsys.readouterr().out
    for bad in (tmp_path / "page.html", tmp_path / "page.html" / "inside"):
        assert main(["report", str(swept.run.path), *out, "--svg", str(bad)]) == 2
        assert "hint:" in capsys.readouterr().err
