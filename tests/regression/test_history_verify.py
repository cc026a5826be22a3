"""Suspicions of the last night, and their confirmation by pairs; the detection rate and the false alarms of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.special import betaincinv

from harness.analysis.statistics import anchor, change_points
from harness.analysis.statistics.pair_design import Design
from harness.analysis.statistics.paired import PairFinding
from harness.analysis.tracked_metrics import STEP
from harness.cli import main
from harness.errors import Exit, HarnessError
from harness.regression.history import night_files, verify
from harness.regression.pairs import gate as gate_pairs
from harness.regression.pairs.request import PairsRequest
from support import histories, simulated_noise
from support.histories import CELLS, FIRST, SHAS, detect
from support.simulated_nights import LEAST, NIGHT, simulated

LAST = 13
A_MONTH = 15_000
"""Cell-nights of 500 Cells in a month."""


def history(
    tmp_path: Path, since: int = LAST, by: float = 1.06, more: str = "", count: int = LAST + 1, libraries: bool = False
) -> Path:
    """Write nights; FIRST, and the Cell whose id is `more`, are slower from night `since` on, with other code.

    libraries: whether a library is another one from then on, too.
    """

    def level(cell: str, index: int) -> float:
        return (by if cell == FIRST else 1.1) if cell in (FIRST, more) and index >= since else 1.0

    folder = histories.write(
        tmp_path / "h", CELLS, histories.noisy(0, level), nights=count, revision=lambda i: SHAS[i >= since]
    )
    for path in folder.glob("2026-*.jsonl") if not libraries else ():
        path.write_text(path.read_text().replace("0.20.0", "0.19.0"))
    return folder


MERGED = "latency_s/merged/forward/1x40"
Paired = Callable[..., list[PairsRequest]]


@pytest.fixture
def paired(monkeypatch: pytest.MonkeyPatch) -> Paired:
    """Return a function that fakes the verdict of the pairs, and returns the list of requests."""

    def let(
        word: str | None, *, cut: str = "", closed: bool = False, fails: bool = False, elsewhere: bool = False
    ) -> list[PairsRequest]:
        requested: list[PairsRequest] = []

        def gate(one: PairsRequest, as_json: bool) -> SimpleNamespace:
            requested.append(one)
            if fails:
                raise HarnessError("gave no Record")
            timed = SimpleNamespace(word=PairFinding(word), sentence=f"{word}, they say") if word else None
            judged = SimpleNamespace(
                cells=[SimpleNamespace(timed=dict.fromkeys((STEP, MERGED), timed))],
                canaries=SimpleNamespace(closed=closed, sentence="too many alarms"),
                verdict=SimpleNamespace(reason="nothing was timed"),
            )
            return SimpleNamespace(judged=judged, runner=SimpleNamespace(seed=3), interrupted=cut)

        monkeypatch.setattr(gate_pairs, "gate", gate)
        monkeypatch.setattr(verify, "_other_place", lambda place, result: ["CPU a -> b"] if elsewhere else [])
        return requested

    return let


def settle(folder: Path, *more: str) -> int:
    out = folder / f"runs-{len(list(folder.iterdir()))}-{len(written(folder))}"
    return main(["history", "settle", "--dir", str(folder), "--out", str(out), "--author", "A", *more])


def written(folder: Path) -> list[Any]:
    path = folder / night_files.CONFIRMATIONS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("since", [LAST, LAST - 1])
def test_a_slow_last_night_is_a_suspicion_and_fails_nothing(
    since: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = history(tmp_path, since)
    code, found = detect(folder, capsys, "--strict")
    assert (code, found["candidates"]) == (Exit.PASS, [])
    (c,) = found["suspects"]
    assert (c["cell"], c["night"], c["standing"]) == (FIRST, histories.night(LAST), "suspect")
    assert c["between"]["revisions"] == list(SHAS)  # also for a change on the night before
    main(["history", "detect", "--dir", str(folder)])
    text = capsys.readouterr().out
    assert "suspicions: slower on the last night than before" in text
    assert f"confirm: peft-harness gate --pairs {SHAS[0][:12]} {SHAS[1][:12]} --suite quick --only {FIRST}" in text


def test_a_faster_or_noisy_night_is_no_suspicion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, by in enumerate((0.9, 1.01)):
        assert detect(history(tmp_path / str(number), by=by), capsys)[1]["suspects"] == []


def test_a_confirmed_suspicion_fails_from_then_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], paired: Paired
) -> None:
    folder, requested = history(tmp_path), paired("slower")
    assert settle(folder) == Exit.PASS
    (one,) = requested
    assert (one.old, one.new, one.only, one.suite) == (SHAS[0][:12], SHAS[1][:12], FIRST, "quick")
    (line,) = written(folder)
    assert (line["verdict"], line["author"], line["revisions"]) == ("regressed", "A", list(SHAS))
    assert line["reason"] == "slower, they say; seed 3"
    assert f"regressed from {histories.night(LAST)} on" in capsys.readouterr().out
    code, found = detect(folder, capsys)
    assert (code, [c["standing"] for c in found["candidates"]], found["suspects"]) == (Exit.FAIL, ["confirmed"], [])


def test_only_the_first_pairs_have_a_canary_and_all_use_the_given_suite(tmp_path: Path, paired: Paired) -> None:
    folder, requested = history(tmp_path, more=list(CELLS)[1]), paired("same")
    (mine := tmp_path / "mine.yaml").write_text("")
    assert settle(folder, "--suite", str(mine)) == Exit.PASS
    assert [(one.canary, one.suite) for one in requested] == [(True, str(mine)), (False, str(mine))]


def test_a_refuted_suspicion_is_tried_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], paired: Paired) -> None:
    folder, requested = history(tmp_path), paired("same")
    assert (settle(folder), settle(folder), len(requested)) == (Exit.PASS, Exit.PASS, 1)
    assert "nothing to try" in capsys.readouterr().out
    code, found = detect(folder, capsys, "--strict")
    assert (code, found["candidates"], found["suspects"]) == (Exit.PASS, [], [])


def test_faster_pairs_refute_a_slow_down(tmp_path: Path, capsys: pytest.CaptureFixture[str], paired: Paired) -> None:
    folder = history(tmp_path)
    paired("faster")
    assert settle(folder) == Exit.PASS
    assert [line["verdict"] for line in written(folder)] == ["refuted"]
    code, found = detect(folder, capsys, "--strict")
    assert (code, found["candidates"], found["suspects"]) == (Exit.PASS, [], [])


def test_slower_pairs_make_a_speed_up_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], paired: Paired
) -> None:
    folder = history(tmp_path, since=LAST - 4, by=0.94)
    assert detect(folder, capsys)[1]["candidates"][0]["worse"] is False
    paired("slower")
    assert settle(folder) == Exit.PASS
    assert detect(folder, capsys)[0] == Exit.FAIL


def test_pairs_do_not_refute_a_slow_down_of_another_library(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], paired: Paired
) -> None:
    folder = history(tmp_path, libraries=True)
    paired("same")
    assert (settle(folder), written(folder)) == (Exit.INCONCLUSIVE, [])
    assert (
        "still open: pairs cannot refute it, since libraries changed (peft 0.19.0 -> 0.20.0)" in capsys.readouterr().out
    )
    assert len(detect(folder, capsys)[1]["suspects"]) == 1


def test_a_manual_confirmation_stands_on_later_nights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = history(tmp_path)
    output = ["--verdict", "regressed", "--evidence", "12 pairs", "--dir", str(folder), "--author", "A"]
    for metric, when in (("step_s", LAST - 6), ("*", LAST)):  # for no change, and for every change that is near
        assert main(["history", "confirm", FIRST, metric, "--night", histories.night(when), *output]) == Exit.PASS
    assert capsys.readouterr().err.count("no change of step_s within 2 nights of") == 1
    assert not any("seen" in line for line in written(folder))
    (folder / night_files.CONFIRMATIONS).unlink()
    assert main(["history", "confirm", FIRST, "step_s", "--night", histories.night(LAST - 1), *output]) == Exit.PASS
    assert [line["night"] for line in written(folder)] == [histories.night(LAST)]
    after = history(tmp_path / "later", since=99, count=LAST + 2)
    name = f"{histories.night(LAST + 1)}.jsonl"
    (folder / name).write_text((after / name).read_text())
    code, found = detect(folder, capsys)
    assert (code, [c["standing"] for c in found["candidates"]]) == (Exit.FAIL, ["confirmed"])


def edited_confirmation(tmp_path: Path, paired: Paired, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """Return a history with one confirmed suspicion. change: edits the line of the confirmation."""
    folder = history(tmp_path)
    paired("slower")
    settle(folder)
    (line,) = written(folder)
    (folder / night_files.CONFIRMATIONS).write_text(json.dumps(change(line)) + "\n")
    return folder


@pytest.mark.parametrize(
    "damage",
    [{"seen": {}}, {"revisions": 5}, {"seen": {"old_night": "x", "place": 1, "before": 1.0, "after": 2.0}}],
    ids=str,
)
def test_a_damaged_decision_is_left_out_and_named(
    damage: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], paired: Paired
) -> None:
    folder = edited_confirmation(tmp_path, paired, lambda line: line | damage)
    code, found = detect(folder, capsys)
    assert (code, list(found["left_out"])) == (Exit.INFRASTRUCTURE, [night_files.CONFIRMATIONS])


def test_a_confirmation_at_an_unknown_place_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], paired: Paired
) -> None:
    def elsewhere(line: dict[str, Any]) -> dict[str, Any]:
        return line | {"seen": line["seen"] | {"place": "elsewhere"}, "metric": "latency_s"}

    folder = edited_confirmation(tmp_path, paired, elsewhere)
    assert detect(folder, capsys)[1]["candidates"] == []


def test_a_confirmed_slow_down_fails_until_it_is_reset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], paired: Paired
) -> None:
    folder = history(tmp_path)
    paired("slower")
    settle(folder)
    after = history(tmp_path / "later", since=99, count=LAST + 3)
    for night in (LAST + 1, LAST + 2):
        name = f"{histories.night(night)}.jsonl"
        (folder / name).write_text((after / name).read_text())
        code, found = detect(folder, capsys)
        assert (code, [c["standing"] for c in found["candidates"]]) == (Exit.FAIL, ["confirmed"])
    at = ["--night", histories.night(LAST + 1), "--dir", str(folder), "--author", "A"]
    assert main(["history", "reset", FIRST, "step_s", *at, "--reason", "taken back"]) == Exit.PASS
    assert detect(folder, capsys)[0] == Exit.PASS


def test_the_pairs_of_a_latency_judge_only_that_latency(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], paired: Paired
) -> None:
    step, since = histories.noisy(0), LAST - 4
    merged = histories.noisy(1, lambda cell, index: 1.1 if cell == FIRST and index >= since else 1.0)
    folder = histories.write(
        tmp_path / "h", CELLS, lambda *at: {**dict(step(*at)), MERGED: dict(merged(*at))["step_s"]},  # type: ignore[arg-type]
        nights=LAST + 1, revision=lambda i: SHAS[i >= since],
    )  # fmt: skip
    for path in folder.glob("2026-*.jsonl"):
        path.write_text(path.read_text().replace("0.20.0", "0.19.0"))
    assert [(c["cell"], c["metric"]) for c in detect(folder, capsys)[1]["candidates"]] == [(FIRST, MERGED)]
    requested = paired("slower")
    assert settle(folder) == Exit.PASS
    assert [one.metric for one in requested] == [MERGED]
    assert [(line["cell"], line["metric"], line["verdict"]) for line in written(folder)] == [
        (FIRST, MERGED, "regressed")
    ]


def test_a_common_change_is_not_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str], paired: Paired) -> None:
    values = histories.noisy(0, lambda cell, index: 1.1 if index >= LAST - 4 else 1.0)
    folder = histories.write(tmp_path / "h", CELLS, values, nights=LAST + 1, revision=lambda i: SHAS[i >= LAST - 4])
    assert [c["cell"] for c in detect(folder, capsys)[1]["candidates"]] == ["*"]
    requested = paired("same")
    assert (settle(folder), requested, written(folder)) == (Exit.PASS, [], [])
    assert "only times of single Cells are tried here: `peft-harness gate --pairs" in capsys.readouterr().out


def test_pairs_use_nights_at_a_distance_from_the_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shas = [f"{i:x}" * 40 for i in range(16)]
    values = histories.noisy(0, lambda cell, index: 1.06 if cell == FIRST and index >= 8 else 1.0)
    folder = histories.write(tmp_path / "h", CELLS, values, nights=LAST + 1, revision=lambda i: shas[i])
    (c,) = detect(folder, capsys)[1]["candidates"]
    old, new = (shas.index(sha) for sha in c["between"]["paired"])
    assert [shas.index(sha) for sha in c["between"]["revisions"]] == [old + 2, new - 2]


def test_two_revisions_of_the_same_code_are_not_paired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], paired: Paired
) -> None:
    folder, requested = history(tmp_path), paired("slower")
    for path in folder.glob("2026-*.jsonl"):
        path.write_text(path.read_text().replace("code-bbbb", "code-aaaa"))
    assert (settle(folder), requested) == (Exit.PASS, [])
    assert "the revisions differ, but their code is the same" in capsys.readouterr().out


def test_a_place_that_has_ended_has_no_suspicion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = history(tmp_path)
    late = histories.write(
        tmp_path / "other",
        CELLS,
        histories.noisy(1),
        nights=LAST + 2,
        place=lambda _: histories.PLACE | {"torch": "2.14.0"},
    )
    name = f"{histories.night(LAST + 1)}.jsonl"
    (folder / name).write_text((late / name).read_text())
    assert detect(folder, capsys)[1]["suspects"] == []


def test_a_refutation_does_not_apply_to_later_revisions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], paired: Paired
) -> None:
    folder = history(tmp_path)
    paired("same")
    settle(folder)
    path = folder / f"{histories.night(LAST)}.jsonl"
    path.write_text(path.read_text().replace(SHAS[1], "c" * 40))
    assert [c["cell"] for c in detect(folder, capsys)[1]["suspects"]] == [FIRST]


@pytest.mark.parametrize(
    ("word", "how", "code", "output"),
    [
        ("inconclusive", {}, Exit.INCONCLUSIVE, "still open: inconclusive, they say"),
        ("slower", {"closed": True}, Exit.INCONCLUSIVE, "still open: too many alarms"),
        (None, {}, Exit.INFRASTRUCTURE, "still open: nothing was timed"),
        ("inconclusive", {"cut": "ended by SIGTERM"}, Exit.INFRASTRUCTURE, "still open"),
        (
            "slower",
            {"elsewhere": True},
            Exit.INCONCLUSIVE,
            "the pairs ran at another place than the night (CPU a -> b)",
        ),
        ("slower", {"fails": True}, Exit.INFRASTRUCTURE, "not tried: gave no Record"),
    ],
)
def test_undecided_pairs_leave_a_suspicion(
    word: str, how: dict[str, Any], code: Exit, output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    paired: Paired,
) -> None:  # fmt: skip
    folder = history(tmp_path)
    paired(word, **how)
    assert settle(folder) == code
    assert output in capsys.readouterr().out
    assert written(folder) == []
    assert [c["cell"] for c in detect(folder, capsys)[1]["suspects"]] == [FIRST]


def test_a_missing_author_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, paired: Paired
) -> None:
    folder, requested = history(tmp_path), paired("slower")
    monkeypatch.setenv("PATH", str(tmp_path))  # no git, and so no author
    assert main(["history", "settle", "--dir", str(folder)]) == Exit.USAGE
    assert "--author: no author" in capsys.readouterr().err
    assert requested == []


def test_the_largest_changes_are_tried_first_and_the_others_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], paired: Paired
) -> None:
    other = list(CELLS)[3]
    folder, requested = history(tmp_path, more=other), paired("slower", cut="ended by Ctrl-C")
    assert settle(folder) == Exit.PASS  # the decision stands
    assert [one.only for one in requested] == [other]
    (left,) = [line for line in capsys.readouterr().out.splitlines() if "not tried, +" in line]
    assert f"`peft-harness gate --pairs {SHAS[0][:12]} {SHAS[1][:12]} --suite quick --only {FIRST}" in left
    assert settle(folder, "--most", "1") == Exit.PASS
    assert [one.only for one in requested] == [other, FIRST]


@pytest.mark.slow
def test_a_noisy_series_is_suspected_as_rarely_as_a_calm_one() -> None:
    wild = np.random.default_rng(4).normal(0, 0.02, (1000, 60))  # a sixth of its nights lies 2 % above its level
    suspected = sum(_suspected(wild, row, 60, 0.02) for row in range(len(wild)))
    assert betaincinv(suspected + 1, len(wild) - suspected, 0.95) < 0.01


def _suspected(logs: Any, row: int, nights_: int, shared: float) -> bool:
    values = logs[row, :nights_]
    return change_points.suspect(values, since=0, least=LEAST, shared=shared) is not None


def _beside(logs: Any) -> tuple[Any, float]:
    relative = logs - anchor.anchor(logs)
    return relative, float(np.median([change_points.noise(row) for row in relative]))


@pytest.mark.slow
def test_a_slow_down_of_three_per_cent_is_found_within_two_nights() -> None:
    suspected = tried = 0
    for seed in range(20):
        relative, shared = _beside(simulated(seed, 0.03)[:, : NIGHT + 2])
        for row in range(20):
            suspected += any(_suspected(relative, row, NIGHT + 1 + night, shared) for night in (0, 1))
            tried += 1
    found = simulated_noise.many_nights(
        np.random.default_rng(1), suspected, Design(), simulated_noise.disturbed(0.03), 0.03
    ).slower
    assert betaincinv(found, tried - found + 1, 0.05) >= 0.95  # exact lower bound, one-sided


@pytest.mark.nightly
def test_less_than_one_false_alarm_a_month_and_few_trials_a_night() -> None:
    suspected = cell_nights = 0
    for seed in range(100, 106):
        relative, shared = _beside(simulated(seed, 0.0))
        for night in range(10, relative.shape[1] + 1):
            suspected += sum(_suspected(relative, row, night, shared) for row in range(len(relative)))
            cell_nights += len(relative)
    alarms = simulated_noise.many_nights(
        np.random.default_rng(2), suspected, Design(), simulated_noise.disturbed(0.03)
    ).slower
    assert suspected > 0
    assert 500 * suspected / cell_nights < 10  # of 500 Cells, each of some 17 process runs
    assert betaincinv(alarms + 1, cell_nights - alarms, 0.95) < 1 / A_MONTH
