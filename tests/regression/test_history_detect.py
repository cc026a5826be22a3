"""The command `history detect`: changes, changes of the machine, new series and omissions."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.analysis import metrics
from harness.analysis.comparison.baseline_rows import COUNTED_PEAK_B
from harness.cli import main
from harness.cli.run import run as run_command
from harness.errors import Exit
from harness.regression.history import night_files
from harness.regression.pairs import gate as gate_pairs
from harness.regression.pairs.request import PairsRequest
from harness.suites import loader
from harness.suites.expand import select
from support import histories
from support.histories import CELLS, FIRST, SLOWER, detect, regressed


def bytes_only(change: Mapping[int, int]) -> histories.Values:
    """Return sizes of adapters. change: the new size of FIRST's adapter, by night."""

    def values(cell: str, index: int, _: int) -> dict[str, float]:
        size = [n for since, n in sorted(change.items()) if since <= index][-1] if cell == FIRST else 1000
        return {"adapter_B": size}

    return values


def test_a_slow_down_has_its_differences_and_a_command_to_confirm_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = histories.write(
        tmp_path / "h", CELLS, histories.noisy(0, regressed), nights=14, revision=lambda i: histories.SHAS[i >= SLOWER]
    )
    code, found = detect(folder, capsys)
    (c,) = found["candidates"]
    assert (code, c["cell"], c["metric"], c["night"]) == (Exit.PASS, FIRST, "step_s", histories.night(SLOWER))
    assert (c["worse"], c["standing"], c["settled"]) == (True, "candidate", None)
    assert c["change"] > 0
    assert c["between"]["revisions"] == list(histories.SHAS)
    assert c["between"]["software"] == ["peft 0.19.0 -> 0.20.0"]
    pairs = f"peft-harness gate --pairs {'a' * 12} {'b' * 12} --suite quick --only {FIRST} --device cpu --cores 2"
    assert c["between"]["confirm"] == pairs
    assert main(["history", "detect", "--dir", str(folder)]) == Exit.PASS
    text = capsys.readouterr().out
    assert (
        f"    confirm: {pairs} (pairs run both revisions with today's libraries; peft 0.19.0 -> 0.20.0 changed since then)\n"
        in text
    )
    assert "worse, not confirmed" in text
    assert detect(folder, capsys, "--strict")[0] == Exit.INCONCLUSIVE


def request_of(confirm: str, monkeypatch: pytest.MonkeyPatch) -> PairsRequest:
    """Run a printed command with a fake gate and return its request."""
    requested: list[PairsRequest] = []

    def gate(what: PairsRequest, _: bool) -> SimpleNamespace:
        requested.append(what)
        return SimpleNamespace(exit=Exit.PASS)

    monkeypatch.setattr(gate_pairs, "gate", gate)
    name, *words = shlex.split(confirm)
    assert (name, main(words)) == ("peft-harness", Exit.PASS)
    return requested[0]


@pytest.mark.parametrize("metric", ["step_s", "training_peak_B"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_command_that_confirms_finds_the_cell_and_the_device(
    metric: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = {c.cell_id: c for c in loader.load("quick").plan.cells if c.training.steps}
    slow = list(cells)[-1]
    usual = histories.noisy(0, lambda cell, i: 1.06 if cell == slow and i >= SLOWER else 1.0)

    def values(cell: str, index: int, number: int) -> dict[str, float]:
        peak = 500 * 2**20 * (2 if cell == slow and index >= SLOWER else 1)
        return {"training_peak_B": peak} if metric != "step_s" else dict(usual(cell, index, number))  # type: ignore[arg-type]

    folder = histories.write(
        tmp_path / "h", cells, values, nights=14, place=lambda _: histories.PLACE | {"device": device},
        revision=lambda i: histories.SHAS[i >= SLOWER],
    )  # fmt: skip
    (c,) = detect(folder, capsys)[1]["candidates"]
    requested = request_of(c["between"]["confirm"], monkeypatch)
    assert (requested.old, requested.new, requested.device) == ("a" * 12, "b" * 12, device)
    plan = gate_pairs._trained(loader.load(requested.suite).plan, requested.only)
    assert [cell.cell_id for cell in plan.cells] == [slow]


def test_a_common_change_is_confirmed_by_the_whole_suite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = histories.write(
        tmp_path / "h", CELLS, histories.noisy(4, lambda _, i: 1.1 if i >= 10 else 1.0), nights=20,
        revision=lambda i: histories.SHAS[i >= 10],
    )  # fmt: skip
    (c,) = detect(folder, capsys)[1]["candidates"]
    requested = request_of(c["between"]["confirm"], monkeypatch)
    assert (c["cell"], requested.suite, requested.only) == ("*", "quick", None)


def test_a_metric_without_pairs_names_the_rerun_that_confirms_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = {c.cell_id: c for c in loader.load("quick").plan.cells}
    worse = next(iter(cells))
    folder = histories.write(
        tmp_path / "h", cells, lambda c, i, _: {"accuracy": 0.80 if c != worse or i < 7 else 0.78}, nights=12,
        revision=lambda i: histories.SHAS[i >= 7],
    )  # fmt: skip
    (c,) = detect(folder, capsys)[1]["candidates"]
    assert c["between"]["confirm"] == ""
    assert main(["history", "detect", "--dir", str(folder)]) == Exit.PASS
    output = "    confirm: not by pairs (pairs do not measure accuracy; rerun the suite with both revisions: `"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(output)]
    _, *words = shlex.split(line.removeprefix(output).removesuffix("`)"))
    run = run_command.make_context("run", words[1:]).params
    assert [cell.cell_id for cell in select(loader.load(run["suite"]).plan, run["only"]).cells] == [worse]
    assert run["device"] == "cpu"


@pytest.mark.parametrize(
    ("what", "reported"),
    [("suite", "replace its name in the command by the path of its file"), ("search", "pairs leave such Cells out")],
)
def test_a_command_that_would_not_find_its_cell_has_a_remark(
    what: str, reported: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = histories.write(
        tmp_path / "h", CELLS, histories.noisy(0, regressed), nights=14, revision=lambda i: histories.SHAS[i >= SLOWER]
    )
    if what == "search":
        cells = {i: cell.model_dump(mode="json") for i, cell in CELLS.items()}
        cells[FIRST]["evaluation"]["skip"] = 1000
        night_files.write_cells(folder, cells)
    else:
        for path in folder.glob("2026-*.jsonl"):
            path.write_text(path.read_text().replace('"suite":"quick"', '"suite":"our own"'))
    (c,) = detect(folder, capsys)[1]["candidates"]
    assert reported in c["between"]["because"]
    assert ("--suite 'our own'" in c["between"]["confirm"]) == (what == "suite")


def test_a_confirmed_slow_down_counts_until_it_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = histories.write(tmp_path / "h", CELLS, histories.noisy(0, regressed), nights=14)
    at = ["--night", histories.night(SLOWER), "--dir", str(folder), "--author", "A. Nyone"]
    assert (
        main(["history", "confirm", FIRST[:8], "step_s", *at, "--verdict", "regressed", "--evidence", "12 pairs"]) == 0
    )
    code, found = detect(folder, capsys)
    assert (code, found["candidates"][0]["standing"]) == (Exit.FAIL, "confirmed")
    assert (
        main(["history", "confirm", FIRST, "step_s", *at, "--verdict", "refuted", "--evidence", "again"]) == Exit.PASS
    )
    path = folder / night_files.CONFIRMATIONS
    later = path.read_text().splitlines()
    later[1] = json.dumps(json.loads(later[1]) | {"made": "2099-01-01T00:00:00Z"})  # else both have the same second
    path.write_text("\n".join(later) + "\n")
    code, found = detect(folder, capsys, "--strict")
    assert (code, found["candidates"][0]["standing"]) == (Exit.PASS, "refuted")
    path.unlink()
    assert main(["history", "reset", FIRST, "step_s", *at, "--reason", "dropout is right now"]) == Exit.PASS
    code, found = detect(folder, capsys, "--strict")
    assert (code, found["candidates"]) == (Exit.PASS, [])
    assert [(r["cell"], r["author"], r["reason"]) for r in found["resets"]] == [
        (FIRST, "A. Nyone", "dropout is right now")
    ]


def test_a_reverted_slow_down_is_listed_and_needs_no_confirmation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = histories.noisy(1, lambda c, i: 1.06 if c == FIRST and 8 <= i < 16 else 1.0)
    folder = histories.write(tmp_path / "h", CELLS, values, nights=24)
    code, found = detect(folder, capsys)
    slower = next(c for c in found["candidates"] if c["worse"])
    assert (code, slower["night"], slower["settled"]) == (Exit.PASS, histories.night(8), histories.night(16))


@pytest.mark.parametrize("where", [5, 19])
def test_a_lone_bad_night_of_a_cell_is_no_change(
    where: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = histories.noisy(2, lambda c, i: 1.5 if c == FIRST and i == where else 1.0)
    folder = histories.write(tmp_path / "h", CELLS, values, nights=20)
    assert detect(folder, capsys)[1]["candidates"] == []


def test_one_bad_pass_of_three_is_outvoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = histories.noisy(3)

    def values(cell: str, index: int, number: int) -> dict[str, float]:
        drawn = usual(cell, index, number)
        assert isinstance(drawn, dict)
        return {"step_s": drawn["step_s"] * (2 if number == index % 3 else 1)}

    folder = histories.write(tmp_path / "h", CELLS, values, nights=20)
    assert detect(folder, capsys)[1]["candidates"] == []


@pytest.mark.parametrize("sentinels", ["none", "quiet", "too"])
def test_a_change_of_every_cell_is_found(sentinels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = histories.noisy(4)
    rng = random.Random(5)

    def values(cell: str, index: int, number: int) -> dict[str, float]:
        slower = 1.10 if index >= 10 else 1.0
        drawn = usual(cell, index, number)
        assert isinstance(drawn, dict)
        base = {"latency_s/base/forward/1x40": 0.01 * (slower if sentinels == "too" else 1) * rng.gauss(1, 0.005)}
        return {"step_s": drawn["step_s"] * slower} | ({} if sentinels == "none" else base)

    folder = histories.write(tmp_path / "h", CELLS, values, nights=20)
    _, found = detect(folder, capsys)
    if sentinels == "too":
        assert found["candidates"] == []
        assert [(m["metric"], m["night"]) for m in found["machine"]] == [("step_s", histories.night(10))]
        assert main(["history", "detect", "--dir", str(folder)]) == Exit.PASS
        assert f"the machine: on {histories.night(10)} all step_s" in capsys.readouterr().out
        return
    (c,) = found["candidates"]
    assert (c["cell"], c["metric"], c["night"], c["worse"]) == ("*", "step_s", histories.night(10), True)
    assert ("no sentinel" in c["note"]) == (sentinels == "none")
    assert found["machine"] == []


def test_a_change_of_most_series_is_reported_for_the_anchor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # As the README warns: the anchor is the median of the series it judges.
    hit = set(list(CELLS)[:5])
    values = histories.noisy(4, lambda cell, i: 1.06 if cell in hit and i >= 10 else 1.0)
    folder = histories.write(tmp_path / "h", CELLS, values, nights=20)
    reported = {c["cell"]: c["worse"] for c in detect(folder, capsys)[1]["candidates"]}
    assert reported == {"*": True} | dict.fromkeys(set(CELLS) - hit, False)


def test_another_torch_begins_a_new_series_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = histories.noisy(6, lambda _, i: 1.3 if i >= 10 else 1.0)
    newer = histories.PLACE | {"torch": "2.13.1"}
    folder = histories.write(
        tmp_path / "h", CELLS, values, nights=20, place=lambda i: newer if i >= 10 else histories.PLACE
    )
    code, found = detect(folder, capsys)
    assert (code, found["candidates"], found["machine"]) == (Exit.PASS, [], [])
    (moved,) = found["residue"]
    assert (moved["night"], moved["changed"]) == (histories.night(10), ["torch 2.13.0 -> 2.13.1"])
    assert moved["cells"] == len(CELLS)
    assert moved["step_ratio"] > 1.2


@pytest.mark.parametrize(
    ("change", "code", "reported"),
    [
        ({0: 1000}, Exit.PASS, []),
        ({0: 1000, 1: 1001}, Exit.FAIL, [(1, 1000, 1001, True, None)]),
        ({0: 1000, 1: 999}, Exit.PASS, [(1, 1000, 999, False, None)]),
        ({0: 1000, 1: 1001, 3: 1000}, Exit.PASS, [(3, 1001, 1000, False, None), (1, 1000, 1001, True, 3)]),
    ],
)
def test_counted_bytes_are_reported_on_the_first_night(
    change: dict[int, int], code: int, reported: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = histories.write(tmp_path / "h", CELLS, bytes_only(change), nights=max(change) + 2, passes=1)
    got, found = detect(folder, capsys)
    seen = [(c["night"], c["before"], c["after"], c["worse"], c["settled"]) for c in found["candidates"]]
    name = {None: None} | {i: histories.night(i) for i in range(5)}
    assert (got, seen) == (code, [(name[n], a, b, worse, name[s]) for n, a, b, worse, s in reported])
    assert found["few_passes"][histories.night(0)] == 1


@pytest.mark.parametrize(("more", "reported"), [(0, False), (1, True)])
def test_a_peak_must_grow_by_sixteen_mebibytes(
    more: int, reported: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def values(cell: str, index: int, _: int) -> dict[str, float]:
        return {
            "training_peak_B": 500 * 2**20 + (metrics.TRAINING_PEAK.slack_B + more if cell == FIRST and index else 0)
        }

    folder = histories.write(tmp_path / "h", CELLS, values, nights=2)
    assert bool(detect(folder, capsys)[1]["candidates"]) == reported


@pytest.mark.parametrize(("more", "code"), [(0, Exit.PASS), (1, Exit.FAIL)])
def test_a_counted_peak_has_the_margin_of_the_gate(
    more: int, code: Exit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def values(cell: str, index: int, _: int) -> dict[str, float]:
        return {"counted_peak_B": 500 * 2**20 + (COUNTED_PEAK_B + more if cell == FIRST and index else 0)}

    folder = histories.write(tmp_path / "h", CELLS, values, nights=2)
    got, found = detect(folder, capsys)
    assert (got, len(found["candidates"])) == (code, more)


def test_a_lower_accuracy_is_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = histories.write(
        tmp_path / "h", CELLS, lambda c, i, _: {"accuracy": 0.80 if c != FIRST or i < 7 else 0.78}, nights=12
    )
    (c,) = detect(folder, capsys)[1]["candidates"]
    assert (c["cell"], c["metric"], c["night"], c["worse"]) == (FIRST, "accuracy", histories.night(7), True)


def test_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = histories.write(tmp_path / "h", CELLS, histories.noisy(0), nights=5)
    assert detect(folder, capsys)[0] == Exit.NOTHING_COMPARED
    assert main(["history", "detect", "--dir", str(tmp_path / "none")]) == Exit.USAGE
    assert "`peft-harness history add RUN` starts one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "reported"),
    [
        ("2026-01-03.jsonl", '{"schema":7,"night":"2026-01-03"}\n', "written with schema 7, this version reads 1"),
        ("2026-01-03.jsonl", "hello\n", "not a night"),
        ("notes.jsonl", "{}\n", "not a file of a history"),
        ("resets.jsonl", '{"schema":1,"cell":"*"}\n', "an incomplete or unknown line"),
        ("2026-01-03.jsonl", None, "an incomplete or unknown line"),
    ],
)
def test_unreadable_files_are_named_and_the_others_are_judged(
    name: str, text: str | None, reported: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = histories.write(tmp_path / "h", CELLS, histories.noisy(0, regressed), nights=14)
    path = folder / name
    path.write_text(path.read_text()[:-20] if text is None else text)
    code, found = detect(folder, capsys)
    assert code == Exit.INFRASTRUCTURE
    assert any(file.startswith(name) and reported in why for file, why in found["left_out"].items())
    assert [c["cell"] for c in found["candidates"]] == [FIRST]


@pytest.mark.parametrize("value", ["NaN", "1e999", "-1", '"fast"', "null"])
def test_an_invalid_number_is_left_out(value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = histories.write(tmp_path / "h", CELLS, histories.noisy(0), nights=8)
    path = folder / f"{histories.night(2)}.jsonl"
    lines = path.read_text().splitlines()
    lines[-1] = lines[-1].partition('"step_s":')[0] + f'"step_s":{value}}}}}'
    path.write_text("\n".join(lines) + "\n")
    code, found = detect(folder, capsys)
    assert (code, found["candidates"]) == (Exit.INFRASTRUCTURE, [])
    assert [file for file in found["left_out"] if file.startswith(path.name)]
