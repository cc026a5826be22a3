from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harness import resources
from harness.analysis.run_facts import analyse, analyse_all
from harness.errors import StoreError
from harness.records import store
from harness.records.record import Outcome, Record, Status
from harness.report import html, sections, terminal, view
from harness.report.formatting import DASH, field, unmeasured
from harness.report.table_model import column, condensed, grouped
from support import recorded_run
from support.recorded_run import EVIL
from support.report_page import Page, row


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    return recorded_run.write_run(tmp_path_factory.mktemp("good") / "run")


# ---- the page is inert, whole and offline


def test_hostile_names_and_messages_are_inert(tmp_path: Path) -> None:
    page = Page(html.render([analyse(recorded_run.write_hostile_run(tmp_path / "r"))]))
    assert not [tag for tag, _ in page.tags if tag in ("img", "iframe", "object", "embed", "link", "base", "form")]
    assert len(page.raw["script"]) == 2
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]
    assert page.text.count(EVIL) > 10
    (cell, _) = json.loads(page.raw["script"][0])[0]["cells"]
    assert cell["cell"]["model"] == EVIL


def test_the_policy_allows_exactly_the_inline_style_and_script(good: store.Run) -> None:
    page = Page(html.render([analyse(good)]))
    (policy,) = [
        a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(part.strip().split(" ", 1) for part in policy.split(";"))

    def hashed(source: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"

    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == hashed(page.raw["script"][1])
    (style,) = page.raw["style"]
    assert rules["style-src"] == hashed(style)
    assert "unsafe" not in policy


def test_the_page_needs_no_network(good: store.Run) -> None:
    page = Page(html.render([analyse(good)]))
    assert not page.attributes("src")
    assert all(link.startswith("#") for link in page.attributes("href"))
    assert "eval(" not in page.raw["script"][1]
    assert "url(" not in page.raw["style"][0]
    assert "@import" not in page.raw["style"][0]


@pytest.mark.slow
def test_every_link_has_a_target_and_every_id_is_its_own(good: store.Run, tmp_path: Path) -> None:
    page = Page(html.render(analyse_all([good, recorded_run.write_run(tmp_path / "again", run="again")])))
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.attributes("href")} <= set(ids)
    assert {i for labelled in page.attributes("aria-labelledby") for i in labelled.split()} <= set(ids)
    for cell in good.manifest.cells:
        assert f"cell-{cell.cell_id}" in ids
        assert f"run1-cell-{cell.cell_id}" in ids


def test_templates_do_no_arithmetic() -> None:
    for template in resources.data_folder("report_templates").glob("*.j2"):
        source = re.sub(r'"[^"]*"|\{#.*?#\}', "", template.read_text(), flags=re.DOTALL)
        for expression in re.findall(r"\{\{(.*?)\}\}|\{%-?(.*?)-?%\}", source):
            code = "".join(expression).replace("t.columns|length + 1", "").strip(" -")
            assert not re.search(r"[*/%]|\s[-+]\s|\|\s*(sum|round|sort|max|min)\b", code), (template.name, code)


def test_write_report_is_whole_or_absent(good: store.Run, tmp_path: Path) -> None:
    html.write_report([analyse(good)], tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(StoreError):
        html.write_report([analyse(good)], tmp_path / "no such folder" / "report.html")


@pytest.mark.slow
def test_reports_are_made_without_torch(good: store.Run, tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from harness.analysis.comparison import reproducibility
from harness.analysis.run_facts import analyse_all
from harness.records import store
from harness.report import html, terminal
run = store.read_run(Path(sys.argv[1]))
facts = analyse_all([run, run])
html.write_report(facts, Path(sys.argv[2]), reproducibility.reruns([run, run]))
terminal.summary(facts[0])
heavy = {"torch", "numpy", "scipy", "pandas", "transformers", "rich"} & set(sys.modules)
print(sorted(heavy))
"""
    out = tmp_path / "report.html"
    command = [sys.executable, "-c", script, str(good.path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert out.is_file()


# ---- what must be visible


def test_missing_torn_and_unfinished_are_at_the_top(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    recorded_run.write_run(folder, footer=False, change=lambda n, r: None if n == "full" else r)
    (folder / "cells" / "0123456789abcdef.1.json").write_text('{"schema": 1, "run"')
    run = store.read_run(folder)
    missing = recorded_run.cells()["full"]
    alerts = view.build([analyse(run)])["runs"][0]["alerts"]
    assert [a["text"].split()[0] for a in alerts] == ["This", "1", "1"]
    assert alerts[1]["items"] == [f"{missing.label} ({missing.cell_id})"]
    assert alerts[2]["items"][0].startswith("0123456789abcdef.1.json: ")
    words = Page(html.render([analyse(run)])).text
    assert 0 < words.index("0123456789abcdef.1.json") < words.index("Questions of the suite")
    assert any(line.startswith("missing: ") for line in terminal.summary(analyse(run)))
    assert any("0123456789abcdef.1.json" in line for line in terminal.summary(analyse(run)))


def test_a_whole_run_raises_no_alert(good: store.Run) -> None:
    assert view.build([analyse(good)])["runs"][0]["alerts"] == []


def test_a_record_from_elsewhere_is_pointed_out(tmp_path: Path) -> None:
    elsewhere = recorded_run.environment(id="elsewhere", threads=8)
    move = lambda n, r: r.model_copy(update={"environment": elsewhere}) if n == "fused" else r  # noqa: E731
    run = view.build([analyse(recorded_run.write_run(tmp_path / "r", change=move))])["runs"][0]
    assert [a["items"] for a in run["alerts"]] == [["1 Cell: threads: 2, 8"]]
    (stranger,) = run["environment"]["strangers"]
    assert stranger["differences"] == "threads: 2, 8"
    assert [c["title"] for c in stranger["cells"]] == ["minilm-l6 lora r=8 [fused]"]


def test_cells_of_a_cluster_are_compared_with_each_other_and_not_with_the_runner(tmp_path: Path) -> None:
    def on_a_node(name: str, made: Record) -> Record:
        node = "b" if name in ("fused", "full", "nf4") else "a"
        there = recorded_run.environment(id=node, machine={"cpu": f"CPU {node}"}, threads=4)
        at = made.model_copy(update={"environment": there})
        # The runner wrote the Record of the lost Cell.
        return recorded_run.failed(made, Status.LOST) if name == "lora-r1" else at

    run = recorded_run.write_run(tmp_path / "r", change=on_a_node)
    built = view.build([analyse(run)])["runs"][0]
    assert [a["items"] for a in built["alerts"]] == [["3 Cells: machine cpu: CPU a, CPU b"]]
    assert built["environment"]["blocks"]["Machine"] == {"cpu": "CPU a", "threads": "4"}
    (stranger,) = built["environment"]["strangers"]
    words = Page(html.render([analyse(run)])).text
    assert all(words.count(f"CPU a, CPU b: {c['title']}") == 1 for c in stranger["cells"][:1])
    assert len(stranger["cells"]) == 3
    # Where all share a machine, other than the runner's, there is nothing to warn of.
    alone = recorded_run.write_run(tmp_path / "s", change=lambda _, r: on_a_node("reference", r))
    assert view.build([analyse(alone)])["runs"][0]["alerts"] == []


def test_the_number_of_cut_test_items_is_shown_with_the_limit(good: store.Run, tmp_path: Path) -> None:
    def cut(name: str, made: Record) -> Record:
        assert made.measurements is not None
        items = 312 if made.cell.model == "minilm-l6" else 0
        counted = made.measurements.accuracy.model_copy(update={"cut_items": items})
        return made.model_copy(update={"measurements": made.measurements.model_copy(update={"accuracy": counted})})

    run = recorded_run.write_run(tmp_path / "r", change=cut)
    built = view.build([analyse(run)])["runs"][0]
    texts = {group["budget"].partition(" test items")[2].partition(",")[0] for group in built["groups"]}
    assert texts == {" (312 of them truncated)", ""}
    fused = row(built["comparison"], run.latest()[recorded_run.cells()["fused"].cell_id])
    assert fused["Accuracy, %"]["why"].endswith("; 312 of 1,000 items were truncated to 40 tokens")
    assert "truncated" not in "".join(group["budget"] for group in view.build([analyse(good)])["runs"][0]["groups"])


def test_a_run_in_which_every_cell_failed(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "r", change=lambda _, r: recorded_run.failed(r))
    built = view.build([analyse(run)])["runs"][0]
    assert built["verdict"]["word"] == "inconclusive"
    assert (built["groups"], built["curves"]) == ([], [])
    assert len(built["failures"]) == 10
    assert built["failures"][0]["log"] == f"logs/{run.records[0].id}.txt"
    words = Page(html.render([analyse(run)])).text
    assert "mat1 and mat2 shapes cannot be multiplied" in words
    assert words.count("RuntimeError: ...") == 10
    assert terminal.summary(analyse(run))[-1].startswith("? inconclusive: 10 Cells not measured")


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "r", change=lambda *_: None, footer=False)
    assert view.build([analyse(run)])["runs"][0]["time"]["charts"] == []
    assert "10 expected Cells have no Record" in Page(html.render([analyse(run)])).text


def test_every_table_has_the_same_peak(good: store.Run) -> None:
    built = view.build([analyse(good)])["runs"][0]
    record = good.latest()[recorded_run.cells()["fused"].cell_id]
    memory, recipe = row(built["memory"], record), row(built["answers"][0]["table"], record)
    peaks = (memory["Peak: train, MiB"], recipe["Peak, MiB"], row(built["comparison"], record)["Peak, MiB"])
    assert {peak["text"] for peak in peaks} == {"396"}
    parts = ("Weights, MiB", "Adapter, MiB", "Gradients, MiB", "Optimizer, MiB", "Other in training, MiB")
    assert sum(memory[part]["value"] for part in parts) == memory["Peak: train, MiB"]["value"]


def test_columns_and_rows_without_a_number_are_left_out_with_the_reason(good: store.Run) -> None:
    def fields(*values: int | None) -> list[dict[str, object]]:
        return [unmeasured("no counter") if value is None else field(str(value), value) for value in values]

    rows = [{"name": str(i), "fields": fields(4, *values)} for i, values in enumerate([(1, None), (None, None)])]
    made = grouped("t", "T", [column("Batch"), column("Step, ms"), column("Energy, J")], [("", rows)], file="t")
    condensed_rows = condensed(made, fixed=1)
    assert [c["label"] for c in condensed_rows["columns"]] == ["Batch", "Step, ms"]
    assert [[f["text"] for f in r["fields"]] for r in condensed_rows["groups"][0]["rows"]] == [["4", "1"]]
    assert condensed_rows["remarks"] == [
        "Energy: no counter.",
        "Left out, as they have no numbers: 1 row (no counter).",
    ]
    assert [c["label"] for c in condensed(made)["columns"]] == ["Batch", "Step, ms"]
    assert len(condensed(made)["groups"][0]["rows"]) == 2
    made = grouped("t", "T", [column("Batch"), column("One, ms"), column("Each / all")], [("", rows[1:])], file="t")
    assert condensed(made, fixed=1) == made  # a table of reasons alone is not an empty table
    each = [{"name": "a", "fields": [*fields(4, 1), unmeasured("no ratio")]}]
    assert condensed(grouped("t", "T", made["columns"], [("", each)], file="t"))["remarks"] == ["Each / all: no ratio."]
    costs = view.build([analyse(good)])["runs"][0]["costs"]
    assert all(remark in Page(html.render([analyse(good)])).text for remark in costs["remarks"])


def test_text_between_backticks_is_code_and_stays_escaped(good: store.Run) -> None:
    def page(about: str) -> str:
        return html.render([analyse(replace(good, manifest=good.manifest.model_copy(update={"about": about})))])

    assert "Run with <code>--jobs &lt;2&gt;</code> &amp; wait" in page("Run with `--jobs <2>` & wait")
    assert "a lone ` &lt;b&gt;" in page("a lone ` <b>")


def test_a_missing_value_is_a_dash_with_its_reason(tmp_path: Path) -> None:
    stop = lambda n, r: recorded_run.failed(r, Status.OOM, because="no room") if n == "full" else r  # noqa: E731
    run = recorded_run.write_run(tmp_path / "r", change=stop)
    built = view.build([analyse(run)])["runs"][0]
    by_name = {n: run.latest()[c.cell_id] for n, c in recorded_run.cells().items()}
    for record, heading, why in (
        (by_name["full"], "Accuracy, %", "oom: no room"),
        (by_name["zero-shot"], "Peak, MiB", "not trained"),
        (by_name["zero-shot"], "Tokens/s", "not trained"),
        (
            by_name["float64"],
            "To the highest, points",
            "no other recipe has this budget, these seeds and this number of learning rates tried",
        ),
    ):
        shown = row(built["comparison"], record)[heading]
        assert (shown["text"], shown["value"], shown["why"]) == (DASH, None, why)
    assert row(built["comparison"], by_name["zero-shot"])["Trainable"]["text"] == "0"
    merged = row(built["latency"], by_name["nf4"])["Merged, ms"]
    assert (merged["text"], merged["why"]) == (DASH, "cannot merge into a 4-bit weight")
    assert "oom: no room" in built["answers"][0]["unscored"]["cells"][0]["why"]


def test_the_numbers_are_those_of_the_records(good: store.Run) -> None:
    record = good.latest()[recorded_run.cells()["fused"].cell_id]
    assert record.measurements is not None
    training, accuracy = record.measurements.training, record.measurements.accuracy
    assert training is not None
    assert accuracy is not None
    built = view.build([analyse(good)])
    shown = row(built["runs"][0]["comparison"], record)
    assert shown["Trainable"]["value"] == record.measurements.parameters.trainable
    assert shown["Accuracy, %"]["text"] == "81.0 %"
    assert shown["Peak, MiB"]["text"] == "396"  # 806 less 410 of the imports
    steady = slice(training.timing_warmup, None)
    assert shown["Tokens/s"]["value"] == sum(training.tokens[steady]) / sum(training.step_seconds[steady])
    (raw,) = [c for c in built["data"][0]["cells"] if c["record"] == record.id]
    assert (raw["accuracy_low"], raw["accuracy_high"]) == (accuracy.low, accuracy.high)


def test_the_ranking_states_its_limits(good: store.Run) -> None:
    first, second = view.build([analyse(good)])["runs"][0]["groups"]
    sentences = " ".join(first["sentences"])
    assert "Highest accuracy: full [reference]" in sentences
    assert "No test tells these apart from it: lora r=8 [hf-peft]" in sentences
    assert "One training run per Cell (seed 0)" in sentences
    assert "Smallest difference" in sentences
    assert "without training: zero-shot" in " ".join(second["sentences"])


def test_a_ranking_of_two_optimizers_names_them(good: store.Run, tmp_path: Path) -> None:
    cell = recorded_run.cells()["fused"].model_copy(update={"optimizer": "adamw-8bit"})
    other = recorded_run.record("fused", cell)
    cells = [*recorded_run.cells().values(), cell]
    run = recorded_run.write_run(tmp_path / "run", cells=cells, extra=[other])
    sentences, before = (
        " ".join(view.build([analyse(one)])["runs"][0]["groups"][0]["sentences"]) for one in (run, good)
    )
    assert "The optimizers differ (adamw, adamw-8bit)" in sentences.replace("adamw-8bit, adamw", "adamw, adamw-8bit")
    assert "lora r=8 [fused] adamw-8bit" in sentences
    assert "optimizers" not in before


def test_the_same_losses_are_reported_step_by_step(good: store.Run) -> None:
    (section,) = view.build([analyse(good)])["runs"][0]["same_losses"]
    assert section["word"] == "pass"
    assert [row["word"] for row in section["rows"]] == ["pass"] * 3
    names = {entry["name"] for entry in section["chart"]["legend"]}
    assert {"allowed", "lora r=8 [fused]", "lora r=8 [hf-peft]"} <= names


def test_time_outside_the_cells_has_its_share(good: store.Run) -> None:
    time = view.build([analyse(good)])["runs"][0]["time"]
    assert time["tone"] == "quiet"  # a figure for developers, unless it is too high
    assert re.search(r"Outside the Cells: 9\.0 s of .*, 3\.\d %\.", time["sentence"])
    assert [part["name"] for part in time["outside"]] == ["fetch", "startup", "scheduling", "report", "other"]


def test_rerun_gives_the_exact_commands(tmp_path: Path) -> None:
    run = recorded_run.write_run(
        tmp_path / "r", argv=["peft-harness", "run", "my suite.yaml"], suite_file="my suite.yaml"
    )
    section = view.build([analyse(run)])["runs"][0]["rerun"]
    assert section["command"] == "peft-harness run 'my suite.yaml'"
    cell = run.manifest.cells[0].cell_id
    assert section["cells"][0]["command"] == f"peft-harness run 'my suite.yaml' --only {cell}"


@pytest.mark.parametrize("given", ["quick", "quick.yaml", "../mine/quick.yaml"])
def test_a_cell_is_rerun_from_the_suite_as_it_was_given(given: str, tmp_path: Path) -> None:
    argv = ["peft-harness", "run", "--out", "runs/quick", given, "--device", "cpu"]
    run = recorded_run.write_run(tmp_path / "r", argv=argv, suite_file="quick.yaml")
    (command, *_) = [row["command"] for row in view.build([analyse(run)])["runs"][0]["rerun"]["cells"]]
    assert command == f"peft-harness run {given} --only {run.manifest.cells[0].cell_id}"


def test_golden_keys_of_the_view(good: store.Run) -> None:
    built = view.build([analyse(good)])
    assert sorted(built) == ["data", "pairs", "reproducibility", "runs", "stored", "title"]
    assert sorted(built["runs"][0]) == [
        "about", "alerts", "alone", "answers", "comparison", "costs", "counts", "curves", "duration", "ended", "environment",
        "failures", "gpus", "groups", "id", "latency", "memory", "mixed", "notes", "parity",
        "parity_summary", "prefix", "questions", "rates", "rerun", "same_losses", "served", "started", "suite", "time",
        "title", "tuning", "verdict",
    ]  # fmt: skip
    json.dumps(built, allow_nan=False)


def test_the_terminal_table_is_aligned(good: store.Run) -> None:
    lines = terminal.summary(analyse(good))
    table = lines[: lines.index("")]
    assert table[0].startswith("minilm-l6 · movie-sentiment")
    ends = {len(line) for line in table}
    assert len(ends) == 1
    assert any("lora r=8 [fused]" in line and "81.0 % [78.5, 83.3]" in line for line in table)


def test_many_cells_are_summarised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "MANY", 3)

    def fail(name: str, record: Record) -> Record:
        if name != "fused":
            return record
        first, *rest = record.checks
        return record.model_copy(update={"checks": [first.model_copy(update={"outcome": Outcome.FAIL}), *rest]})

    facts = analyse(recorded_run.write_run(tmp_path / "r", change=fail))
    *shown, last = sections.checks(facts)
    assert any("fused" in one["title"] and one["open"] for one in shown)  # what failed is shown in full
    assert all(one["word"] != "pass" for one in shown)
    assert "all checks passed; largest error:" in last["summary"]
    assert sections.rerun(facts)["pattern"] == "peft-harness run suites/quick.yaml --only CELL_ID"
