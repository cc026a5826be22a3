from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from harness.analysis import contention, divergence
from harness.analysis.run_facts import analyse
from harness.cli import main
from harness.records import store
from harness.records.record import CheckResult, Outcome, Record
from harness.report import alerts, formatting, html, terminal, text_formats, view
from harness.report.formatting import DASH
from support import recorded_run
from support.report_page import Page, row


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    return recorded_run.write_run(tmp_path_factory.mktemp("good") / "run")


def _timed(
    r: Record, share: float, load_end: float | None, cores: str = "2", threads: int = 2, device: str = "cpu"
) -> Record:
    """Return a Record with `share` seconds of CPU time per second of its steps."""
    assert r.measurements is not None
    training = r.measurements.training
    if training is None:
        return r
    training = training.model_copy(update={"cpu_seconds": share * sum(training.step_seconds)})
    phases = [p.model_copy(update={"load_end": load_end}) if p.name == "train" else p for p in r.phases]
    return r.model_copy(
        update={
            "phases": phases,
            "device": device,
            "measurements": r.measurements.model_copy(update={"training": training}),
            "environment": recorded_run.environment(machine={"cores": cores}, threads=threads),
        }
    )


@pytest.mark.parametrize(
    ("share", "load_end", "more", "flagged"),
    [
        (1.9, 2.1, {}, False),
        (1.9, 8.0, {}, False),  # the machine was busy, this Cell got its due
        (1.3, 3.0, {}, True),
        (1.3, 2.2, {}, False),  # idle, but not everything runs in two threads
        (1.3, None, {}, False),
        (0.5, None, {}, True),
        (0.5, 0.1, {"threads": 1}, True),
        (5.0, 20.0, {"cores": "64", "threads": 8}, False),  # others have cores enough
        (0.5, 8.0, {"device": "cuda"}, False),
    ],
)
def test_steps_that_waited_for_a_cpu_are_flagged(
    share: float, load_end: float | None, more: dict[str, Any], flagged: bool
) -> None:
    record = _timed(recorded_run.record("fused", recorded_run.cells()["fused"]), share, load_end, **more)
    assert bool(contention.busy(record)) is flagged


@pytest.mark.slow
def test_busy_cells_are_flagged_and_the_rule_is_shown(good: store.Run, tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "r", change=lambda n, r: _timed(r, 0.5, 9.0) if n == "fused" else r)
    built = view.build([analyse(run)])
    fused = row(built["runs"][0]["comparison"], run.latest()[recorded_run.cells()["fused"].cell_id])
    assert [label for label, f in fused.items() if f["flag"]] == ["Tokens/s", "Step, ms"]
    (note,) = built["runs"][0]["comparison"]["notes"]
    assert contention.RULE in note
    assert "lora r=8 [fused], 0.50 s of CPU time per second for 2 threads; load average 9.0" in note
    words = Page(html.render([analyse(run)])).text
    # Five times of its recipe (step, time to the target loss, tokens/s, two latencies), two of its Cell, three latencies
    # with two ratios, and two notes.
    assert words.count("! busy") == 14
    assert contention.RULE in words
    text = terminal.summary(analyse(run))
    assert [line for line in text if line.endswith("] !") and "lora r=8 [fused]" in line]
    assert [line for line in text if line.startswith("! busy: ") and "lora r=8 [fused]" in line]
    # Records from before there was CPU time to compare say nothing.
    assert not view.build([analyse(good)])["runs"][0]["comparison"]["notes"]
    assert "busy" not in "\n".join(terminal.summary(analyse(good)))


def _untrained(
    r: Record, share: float, load_end: float | None, phase: str = "latency", threads: int = 2, device: str = "cpu"
) -> Record:
    """Return the Record of an untrained Cell with `share` seconds of CPU time per second of a phase."""
    assert r.training is None
    phases = [
        p.model_copy(update={"cpu_seconds": (share if p.name == phase else 1.9) * p.seconds, "load_end": load_end})
        for p in r.phases
    ]
    environment = recorded_run.environment(machine={"cores": "2"}, threads=threads)
    return r.model_copy(update={"phases": phases, "device": device, "environment": environment})


@pytest.mark.parametrize(
    ("share", "load_end", "more", "flagged"),
    [
        (1.9, 8.0, {}, False),
        (1.3, 3.0, {}, True),
        (1.3, 2.2, {}, False),
        (0.5, None, {}, True),
        (0.5, 8.0, {"device": "cuda"}, False),
        (0.5, 8.0, {"phase": "evaluate"}, False),  # its only times, the latencies, are right
    ],
)
def test_passes_of_an_untrained_cell_that_waited_for_a_cpu_are_flagged(
    share: float, load_end: float | None, more: dict[str, Any], flagged: bool
) -> None:
    record = recorded_run.record("zero-shot", recorded_run.cells()["zero-shot"])
    assert contention.busy(record) == ""  # a Record from before there was CPU time to compare says nothing
    assert bool(contention.busy(_untrained(record, share, load_end, **more))) is flagged


def test_an_untrained_cell_without_latencies_is_judged_by_its_evaluation() -> None:
    record = recorded_run.record("zero-shot", recorded_run.cells()["zero-shot"])
    record = record.model_copy(update={"phases": [p for p in record.phases if p.name != "latency"]})
    why = contention.busy(_untrained(record, 0.5, 9.0, "evaluate"))
    assert why == "0.50 s of CPU time per second for 2 threads; load average 9.0 at the end of its phase evaluate"


def test_a_busy_untrained_cell_is_flagged_where_its_times_stand(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "r", change=lambda n, r: _untrained(r, 0.5, 9.0) if n == "zero-shot" else r)
    built = view.build([analyse(run)])["runs"][0]
    record = run.latest()[recorded_run.cells()["zero-shot"].cell_id]
    assert row(built["latency"], record)["Base, ms"]["flag"] == "busy"
    (note,) = built["comparison"]["notes"]
    assert "load average 9.0 at the end of its phase latency" in note
    # No time of a training is marked: there was none.
    assert not any(answer["table"]["busy"] for answer in built["answers"])


def shaken(name: str, r: Record) -> Record:
    """Slow half of the merged passes of the fused Cell down to twice their time."""
    if name != "fused" or r.measurements is None:
        return r
    latency = [
        x.model_copy(update={"seconds": [s * (1 + i % 2) for i, s in enumerate(x.seconds)]})
        if x.variant == "merged"
        else x
        for x in r.measurements.latency
    ]
    return r.model_copy(update={"measurements": r.measurements.model_copy(update={"latency": latency})})


def _legends(answers: list[dict[str, Any]]) -> list[list[str]]:
    return [answer["table"]["disturbed"] for answer in answers]


def test_the_legend_blames_other_programs_only_where_they_used_the_cpu(tmp_path: Path) -> None:
    only, blame, spread = ["full", "fused"], "other programs used the CPU", "some passes took much longer than others"
    steady = recorded_run.write_run(tmp_path / "shaken", only=only, change=shaken)
    waited = recorded_run.write_run(
        tmp_path / "busy", only=only, change=lambda n, r: _timed(r, 0.5, 9.0) if n == "fused" else r
    )
    for run, kind, there, absent in ((steady, "unsteady", spread, blame), (waited, "busy", blame, spread)):
        assert _legends(view.build([analyse(run)])["runs"][0]["answers"]) == [[kind]]
        words = Page(html.render([analyse(run)])).text
        (legend,) = re.findall(r"Beside a latency[^.]*\.", words)
        assert there in legend
        assert absent not in legend
    notes = [
        note
        for g in view.build([analyse(steady)])["runs"][0]["groups"]
        for figure in (g["chart"] or {"figures": []})["figures"]
        for note in figure["notes"]
        if "Dashed ring" in note
    ]
    assert notes
    assert all(spread in note for note in notes)


def test_latencies_that_are_not_shown_have_no_flag(tmp_path: Path) -> None:
    def wrong(name: str, r: Record) -> Record:
        check = CheckResult(check="lora/gradient/float32/warm", outcome=Outcome.FAIL)
        return shaken(name, r).model_copy(update={"checks": [*r.checks, check]}) if name == "fused" else r

    run = recorded_run.write_run(tmp_path / "r", change=wrong)
    for form in ("csv", "json", "markdown"):
        assert "unsteady" not in text_formats.FORMATS[form]([analyse(run)])


def test_unsteady_latencies_are_flagged_wherever_they_stand(good: store.Run, tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "r", change=shaken)
    built = view.build([analyse(run)])["runs"][0]
    record = run.latest()[recorded_run.cells()["fused"].cell_id]
    fused = row(built["latency"], record)
    # The variants are timed in turn, so what slowed one slowed the others, too.
    flagged = ["Base, ms", "Unmerged, ms", "Merged, ms", "Unmerged / base", "Merged / base"]
    assert [label for label, f in fused.items() if f["flag"] == "unsteady"] == flagged
    assert "merged 6." in fused["Base, ms"]["why"]
    (note,) = built["latency"]["notes"]
    assert note == f"{contention.UNSTEADY_RULE}. This is so in 1 of 12 rows."
    recipe = row(built["answers"][0]["table"], record)
    assert [label for label, f in recipe.items() if f["flag"]] == ["Unmerged, ms", "Merged, ms"]
    assert recipe["Merged, ms"]["flag"] == "unsteady 1 of 1"
    for form in ("csv", "json"):
        assert text_formats.FORMATS[form]([analyse(run)]).count("unsteady 1 of 1") == 1
    assert contention.unsteady(record).startswith("forward: 95 % interval of the median: merged 6.")
    assert contention.unsteady(good.latest()[record.cell_id]) == ""
    figures = [figure for g in built["groups"] if g["chart"] for figure in g["chart"]["figures"]]
    tips = [m["tip"] for figure in figures if figure["choice"] == "latency" for m in figure["marks"]]
    assert len([tip for tip in tips if "unsteady 1 of 1" in tip]) == 1
    assert not view.build([analyse(good)])["runs"][0]["latency"]["notes"]


def test_the_first_screen_says_which_latencies_may_be_too_high(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "r", only=["full", "fused"], change=shaken)
    (answer,) = view.build([analyse(run)])["runs"][0]["answers"]
    (cost,) = (card for card in answer["cards"] if card["question"] == "At what cost?")
    assert cost["details"][-1] == "! The passes of lora r=8 were disturbed: their times may be too high."


def test_a_busy_cell_without_latencies_has_no_flag_of_latencies(tmp_path: Path) -> None:
    def untimed(name: str, r: Record) -> Record:
        r = _timed(r, 0.5, 9.0) if name == "fused" else r
        measured = r.measurements and r.measurements.model_copy(update={"latency": []})
        return r.model_copy(update={"measurements": measured})

    run = recorded_run.write_run(tmp_path / "r", change=untimed)
    built = view.build([analyse(run)])["runs"][0]
    assert next(answer["table"]["busy"] for answer in built["answers"])
    assert not any(answer["table"]["disturbed"] for answer in built["answers"])
    assert "busy 1 of 1" not in text_formats.FORMATS["csv"]([analyse(run)])


def _red(check: str) -> CheckResult:
    return CheckResult(
        check=check,
        outcome=Outcome.FAIL,
        error=0.5,
        allowed=0.25,
        tensor="layer.0.query",
        worst="[3]: 1.5, should be 1",
    )


def _with_red(check: str) -> Any:
    add = lambda r: r.model_copy(update={"checks": [*r.checks, _red(check)]})  # noqa: E731
    return lambda n, r: add(r) if n == "fused" else r


def test_a_failed_merge_hides_the_merged_latency_and_fails_the_run(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "r", change=_with_red("lora/merge/float32/trained"))
    built = view.build([analyse(run)])["runs"][0]
    record = run.latest()[recorded_run.cells()["fused"].cell_id]
    shown = row(built["latency"], record)
    why = "no speed without parity: lora/merge/float32/trained failed"
    for column in ("Merged, ms", "Merged / base"):
        assert (shown[column]["text"], shown[column]["value"], shown[column]["why"]) == (DASH, None, why)
    assert shown["Unmerged, ms"]["value"] is not None
    assert row(built["comparison"], record)["Step, ms"]["value"] is not None
    assert row(built["comparison"], record)["Status"]["text"] == "✗ ok, 1 failed check"
    assert built["verdict"]["word"] == "fail"
    assert "lora r=8 [fused]: lora/merge/float32/trained failed" in built["verdict"]["reason"]
    sentence = "lora/merge/float32/trained: error 0.5, allowed 0.25; layer.0.query [3]: 1.5, should be 1"
    assert built["alerts"][0]["items"] == [f"minilm-l6 lora r=8 [fused]: {sentence}"]
    assert built["failures"][0]["checks"] == [sentence]
    assert f"failed: minilm-l6 lora r=8 [fused]: {sentence}" in terminal.summary(analyse(run))


def test_any_other_failed_check_hides_all_speeds(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "r", change=_with_red("lora/forward/float32/warm"))
    built = view.build([analyse(run)])
    record = run.latest()[recorded_run.cells()["fused"].cell_id]
    shown = row(built["runs"][0]["comparison"], record) | row(built["runs"][0]["latency"], record)
    hidden = ("Tokens/s", "Step, ms", "Unmerged, ms", "Merged, ms", "Unmerged / base", "Merged / base")
    assert [shown[column]["text"] for column in hidden] == [DASH] * 6
    (raw,) = [c for c in built["data"][0]["cells"] if c["record"] == record.id]
    assert (raw["tokens_per_s"], raw["step_s"]) == (None, None)


def test_a_check_shows_its_numbers_and_its_worst_element(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "r", change=_with_red("lora/gradient/float32/warm"))
    (cell,) = [c for c in view.build([analyse(run)])["runs"][0]["parity"] if c["open"]]
    shown = cell["checks"][0]
    assert (shown["error"], shown["allowed"], shown["share"]) == ("0.5", "0.25", "2")
    assert (shown["tensor"], shown["worst"]) == ("layer.0.query", "[3]: 1.5, should be 1")
    assert "Worst element" in Page(html.render([analyse(run)])).text


def test_the_duration_of_a_resumed_run(good: store.Run) -> None:
    assert good.footer is not None
    resumed = dataclasses.replace(good, footer=good.footer.model_copy(update={"kept": 4, "seconds_total": 75.0}))
    inside = sum(r.duration_s for r in good.latest().values())
    text = view.build([analyse(resumed)])["runs"][0]["duration"]
    assert text.startswith("resumed: the last invocation took 75.0 s, after 4 of 10 Cells had been measured before")
    assert text.endswith(f"all Cells took {formatting.seconds(inside)} together")
    assert view.build([analyse(resumed)])["runs"][0]["time"]["sentence"].startswith(
        "In the last invocation, outside the Cells"
    )


@pytest.mark.parametrize(("footer", "reason"), [(None, "has no footer"), ("{torn", "has a footer that cannot be read")])
def test_an_unfinished_run_is_reported_with_a_banner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], footer: str | None, reason: str
) -> None:
    folder = recorded_run.write_run(tmp_path / "r", footer=False).path
    if footer:
        (folder / "footer.json").write_text(footer)
    assert main(["report", str(folder)]) == 4
    assert f"incomplete: this run {reason}" in capsys.readouterr().out
    page = Page((folder / "report.html").read_text())
    assert 0 < page.text.index(f"This run {reason}") < page.text.index("Questions of the suite")
    assert "took an unknown time" in page.text
    assert "81.0 %" in page.text


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["run", "quick"], "run quick --resume 7 measures the rest"),
        (["run", "my suite.yaml", "--only", "id=a", "--device", "cpu"],
         "run 'my suite.yaml' --only id=a --device cpu --resume 7 measures the rest"),
        (["run", "quick", "--out", "/there/r", "--strict"], "run quick --strict --resume /there/r measures the rest"),
        (["run", "--out=r", "quick"], "run quick --resume r measures the rest"),
        (["import", "there", "--out", "r"], "import there measures it again"),
    ],
)  # fmt: skip
def test_the_banner_of_an_unfinished_run_has_the_command_that_resumes_it(
    good: store.Run, words: list[str], wanted: str
) -> None:
    manifest = good.manifest.model_copy(update={"run": "7", "argv": ["peft-harness", *words]})
    alert, *_ = alerts.of_run(analyse(dataclasses.replace(good, manifest=manifest, footer=None)))
    assert alert["items"] == [f"peft-harness {wanted}"]


@pytest.mark.parametrize(
    ("losses", "rising"),
    [
        ([0.7, 0.7, 0.8, 0.6, 0.7, 0.7, 2.0, 9.0, 12.0, 11.0, 10.0, 13.0], "the loss rose from 0.7 to 11 "),
        ([4.5, 9.1], "the loss rose from 4.5 to 9.1 (of 2 steps)"),
        ([4.5, 4.4, 4.6, 4.5, 12.0, 4.3, 4.5, 4.4, 4.6, 30.0], ""),  # single hard batches
        ([5.0, 6.0], ""),
        ([0.001, 0.01], ""),  # it knows its data by heart
        ([0.7] * 5 + [0.1] * 5, ""),
        ([9.0], ""),
        ([], ""),
    ],
)
def test_a_loss_that_ends_far_above_its_start(losses: list[float], rising: str) -> None:
    text = divergence.rose(losses)
    assert text.startswith(rising)
    assert bool(text) == bool(rising)


@pytest.mark.slow
def test_a_finite_divergence_is_an_alert(good: store.Run, tmp_path: Path) -> None:
    away = [0.7 * 1.1**step for step in range(60)]
    run = recorded_run.write_run(
        tmp_path / "r", change=lambda n, r: recorded_run.with_losses(r, away) if n == "fused" else r
    )
    (alert,) = view.build([analyse(run)])["runs"][0]["alerts"]
    assert alert["text"].startswith("Measured, although training diverged (a lower `lr`, ")
    (item,) = alert["items"]
    assert item.startswith("minilm-l6 lora r=8 [fused]: the loss rose from 0.847 to ")
    assert f"diverged: {item}" in terminal.summary(analyse(run))
    assert item in Page(html.render([analyse(run)])).text
    assert not [line for line in terminal.summary(analyse(good)) if line.startswith("diverged")]
