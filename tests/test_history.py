"""The verb `history`: what is kept of runs, what is told of the nights, who decides, and what it costs."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nights
import pytest
import recorded_run as recorded

from harness import store
from harness.analysis import watched
from harness.cli import main
from harness.errors import Exit
from harness.history import files
from harness.records import CheckResult, Outcome, Record

CELLS = nights.many(8)
FIRST = next(iter(CELLS))
FUSED = recorded.cells()["fused"]
SLOWER = 9
"""The night on which FIRST becomes slower."""


def regressed(cell: str, index: int) -> float:
    return 1.06 if cell == FIRST and index >= SLOWER else 1.0


def detect(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["history", "detect", "--dir", str(folder), "--json", *more])
    return code, json.loads(capsys.readouterr().out)


def bytes_only(change: Mapping[int, int]) -> nights.Values:
    """Return values in which FIRST's adapter has, from each night on, so many bytes."""

    def values(cell: str, index: int, _: int) -> dict[str, float]:
        size = [n for since, n in sorted(change.items()) if since <= index][-1] if cell == FIRST else 1000
        return {"adapter_B": size}

    return values


# What is kept.


def test_a_run_is_kept_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded.write_run(tmp_path / "run")
    folder = tmp_path / "history"
    add = ["history", "add", str(run.path), "--dir", str(folder)]
    assert main(add) == Exit.PASS
    night = folder / "2026-01-05.jsonl"
    assert capsys.readouterr().out == f"{night}: {len(run.manifest.cells)} new rows\n"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main([*add, str(run.path)]) == Exit.PASS
    assert capsys.readouterr().out == f"{night}: nothing new\n"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_what_is_kept_of_a_record(tmp_path: Path) -> None:
    run = recorded.write_run(tmp_path / "run", only=["fused"])
    assert main(["history", "add", str(run.path), "--dir", str(tmp_path / "history")]) == Exit.PASS
    history = files.read(tmp_path / "history")
    (night,) = history.nights
    (row,) = night.rows
    m = run.latest()[FUSED.cell_id].measurements
    assert m is not None
    assert row["values"]["adapter_B"] == m.memory.adapter_B
    assert row["values"]["parameters"] == m.parameters.trainable
    assert row["values"]["training_peak_B"] == 806 * recorded.MIB
    assert {f"latency_s/{v}/forward/1x40" for v in ("base", "unmerged", "merged")} <= row["values"].keys()
    assert all(watched.kind(name) for name in row["values"])
    assert night.places[row["on"]]["threads"] == "2"
    assert history.cells == {FUSED.cell_id: FUSED.model_dump(mode="json")}


@pytest.mark.parametrize("red", ["lora/gradient/float32/warm", "lora/merge/float32/warm"])
def test_no_speed_of_what_failed_a_check(red: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: str, record: Record) -> Record:
        return record.model_copy(update={"checks": [*record.checks, CheckResult(check=red, outcome=Outcome.FAIL)]})

    run = recorded.write_run(tmp_path / "run", only=["fused"], change=fail)
    assert main(["history", "add", str(run.path), "--dir", str(tmp_path / "history")]) == Exit.PASS
    (row,) = files.read(tmp_path / "history").nights[0].rows
    times = {name for name in row["values"] if watched.kind(name) == "timed"}
    if "merge" in red:
        assert times == {"step_s", "latency_s/base/forward/1x40", "latency_s/unmerged/forward/1x40"}
    else:
        assert times == set()
        assert f"no times of {FUSED.label} ({FUSED.cell_id}): no speed without parity: {red}" in capsys.readouterr().err
    assert "accuracy" in row["values"]


@pytest.mark.parametrize(("deed", "code"), [("torn", 4), ("changed", 1), ("newer", 4), ("missing", 4)])
def test_what_is_left_out_is_named_and_the_rest_is_kept(
    deed: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recorded.write_run(tmp_path / "run", footer=deed == "changed")
    path = store.RunFolder(run.path).record_path(FUSED.cell_id, 1)
    text = path.read_text()
    if deed == "missing":
        path.unlink()
    else:
        changed = {"torn": text[:-9], "changed": text.replace('"duration_s"', '"duration_s" ')}
        path.write_text(changed.get(deed) or text.replace('"schema": 1', '"schema": 99'))
    assert main(["history", "add", str(run.path), "--dir", str(tmp_path / "history")]) == code
    printed = capsys.readouterr().err
    assert f"left out: {run.path}: " in printed
    assert FUSED.cell_id in printed
    rows = files.read(tmp_path / "history").nights[0].rows
    assert len(rows) == 9
    assert FUSED.cell_id not in {row["cell"] for row in rows}


def test_a_run_is_a_pass_of_one_night_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded.write_run(tmp_path / "run", only=["fused"])
    add = ["history", "add", str(run.path), "--dir", str(tmp_path / "history"), "--night"]
    assert main([*add, "2026-02-01"]) == Exit.PASS
    assert main([*add, "2026-02-02"]) == Exit.USAGE
    assert "is a pass of the night 2026-02-01 already" in capsys.readouterr().err
    assert main([*add, "yesterday"]) == Exit.USAGE


def test_a_night_that_cannot_be_read_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded.write_run(tmp_path / "run", only=["fused"])
    (tmp_path / "2026-01-05.jsonl").write_text('{"schema":2,"night":"2026-01-05"}\n')
    assert main(["history", "add", str(run.path), "--dir", str(tmp_path)]) == Exit.USAGE
    assert "written with schema 2, this version reads 1" in capsys.readouterr().err
    assert (tmp_path / "2026-01-05.jsonl").read_text() == '{"schema":2,"night":"2026-01-05"}\n'


# What is told.


def test_a_slow_down_is_told_with_what_lies_between_and_how_to_confirm_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nights.write(
        tmp_path / "h", CELLS, nights.noisy(0, regressed), nights=14, revision=lambda i: nights.SHAS[i >= SLOWER]
    )
    code, found = detect(folder, capsys)
    (c,) = found["candidates"]
    assert (code, c["cell"], c["metric"], c["night"]) == (Exit.PASS, FIRST, "step_s", nights.night(SLOWER))
    assert (c["worse"], c["standing"], c["settled"]) == (True, "candidate", None)
    assert c["change"] > 0
    assert c["between"]["revisions"] == list(nights.SHAS)
    assert c["between"]["software"] == ["peft 0.19.0 -> 0.20.0"]
    pairs = f"peft-harness gate --pairs {'a' * 12} {'b' * 12} --only {FIRST}"
    assert c["between"]["confirm"] == pairs
    assert main(["history", "detect", "--dir", str(folder)]) == Exit.PASS
    text = capsys.readouterr().out
    assert f"    confirm: {pairs}\n" in text
    assert "worse, not confirmed" in text
    assert detect(folder, capsys, "--strict")[0] == Exit.INCONCLUSIVE


def test_a_slow_down_counts_once_it_is_confirmed_and_no_more_once_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nights.write(tmp_path / "h", CELLS, nights.noisy(0, regressed), nights=14)
    at = ["--night", nights.night(SLOWER), "--dir", str(folder), "--author", "A. Nyone"]
    assert (
        main(["history", "confirm", FIRST[:8], "step_s", *at, "--verdict", "regressed", "--evidence", "12 pairs"]) == 0
    )
    code, found = detect(folder, capsys)
    assert (code, found["candidates"][0]["standing"]) == (Exit.FAIL, "confirmed")
    assert (
        main(["history", "confirm", FIRST, "step_s", *at, "--verdict", "refuted", "--evidence", "again"]) == Exit.PASS
    )
    path = folder / files.CONFIRMATIONS
    later = path.read_text().splitlines()
    later[1] = json.dumps(json.loads(later[1]) | {"made": "2099-01-01T00:00:00Z"})  # the same second would be a draw
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


def test_a_slow_down_that_was_taken_back_is_told_and_awaits_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = nights.noisy(1, lambda c, i: 1.06 if c == FIRST and 8 <= i < 16 else 1.0)
    folder = nights.write(tmp_path / "h", CELLS, values, nights=24)
    code, found = detect(folder, capsys)
    slower = next(c for c in found["candidates"] if c["worse"])
    assert (code, slower["night"], slower["settled"]) == (Exit.PASS, nights.night(8), nights.night(16))


@pytest.mark.parametrize("where", [5, 19])
def test_a_lone_bad_night_of_a_cell_is_no_change(
    where: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = nights.noisy(2, lambda c, i: 1.5 if c == FIRST and i == where else 1.0)
    folder = nights.write(tmp_path / "h", CELLS, values, nights=20)
    assert detect(folder, capsys)[1]["candidates"] == []


def test_one_bad_pass_of_three_is_outvoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = nights.noisy(3)

    def values(cell: str, index: int, number: int) -> dict[str, float]:
        drawn = usual(cell, index, number)
        assert isinstance(drawn, dict)
        return {"step_s": drawn["step_s"] * (2 if number == index % 3 else 1)}

    folder = nights.write(tmp_path / "h", CELLS, values, nights=20)
    assert detect(folder, capsys)[1]["candidates"] == []


@pytest.mark.parametrize("sentinels", ["none", "quiet", "too"])
def test_what_hits_every_cell_is_not_divided_away(
    sentinels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = nights.noisy(4)
    rng = random.Random(5)

    def values(cell: str, index: int, number: int) -> dict[str, float]:
        slower = 1.10 if index >= 10 else 1.0
        drawn = usual(cell, index, number)
        assert isinstance(drawn, dict)
        base = {"latency_s/base/forward/1x40": 0.01 * (slower if sentinels == "too" else 1) * rng.gauss(1, 0.005)}
        return {"step_s": drawn["step_s"] * slower} | ({} if sentinels == "none" else base)

    folder = nights.write(tmp_path / "h", CELLS, values, nights=20)
    _, found = detect(folder, capsys)
    if sentinels == "too":
        assert found["candidates"] == []
        assert [(m["metric"], m["night"]) for m in found["machine"]] == [("step_s", nights.night(10))]
        assert main(["history", "detect", "--dir", str(folder)]) == Exit.PASS
        assert f"the machine: on {nights.night(10)} all step_s" in capsys.readouterr().out
        return
    (c,) = found["candidates"]
    assert (c["cell"], c["metric"], c["night"], c["worse"]) == ("*", "step_s", nights.night(10), True)
    assert ("no sentinel" in c["note"]) == (sentinels == "none")
    assert found["machine"] == []


def test_another_torch_begins_a_new_series_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = nights.noisy(6, lambda _, i: 1.3 if i >= 10 else 1.0)
    newer = nights.PLACE | {"torch": "2.13.1"}
    folder = nights.write(tmp_path / "h", CELLS, values, nights=20, place=lambda i: newer if i >= 10 else nights.PLACE)
    code, found = detect(folder, capsys)
    assert (code, found["candidates"], found["machine"]) == (Exit.PASS, [], [])
    (moved,) = found["residue"]
    assert (moved["night"], moved["changed"]) == (nights.night(10), ["torch 2.13.0 -> 2.13.1"])
    assert moved["cells"] == len(CELLS)
    assert moved["step_ratio"] > 1.2


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        ({0: 1000}, Exit.PASS, []),
        ({0: 1000, 1: 1001}, Exit.FAIL, [(1, 1000, 1001, True, None)]),
        ({0: 1000, 1: 999}, Exit.PASS, [(1, 1000, 999, False, None)]),
        ({0: 1000, 1: 1001, 3: 1000}, Exit.PASS, [(3, 1001, 1000, False, None), (1, 1000, 1001, True, 3)]),
    ],
)
def test_counted_bytes_are_told_on_their_first_night(
    change: dict[int, int], code: int, told: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nights.write(tmp_path / "h", CELLS, bytes_only(change), nights=max(change) + 2, passes=1)
    got, found = detect(folder, capsys)
    seen = [(c["night"], c["before"], c["after"], c["worse"], c["settled"]) for c in found["candidates"]]
    name = {None: None} | {i: nights.night(i) for i in range(5)}
    assert (got, seen) == (code, [(name[n], a, b, worse, name[s]) for n, a, b, worse, s in told])
    assert found["few_passes"][nights.night(0)] == 1


@pytest.mark.parametrize(("more", "told"), [(0, False), (1, True)])
def test_a_peak_must_grow_by_sixteen_mebibytes(
    more: int, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def values(cell: str, index: int, _: int) -> dict[str, float]:
        return {"training_peak_B": 500 * 2**20 + (watched.PEAK_BYTES + more if cell == FIRST and index else 0)}

    folder = nights.write(tmp_path / "h", CELLS, values, nights=2)
    assert bool(detect(folder, capsys)[1]["candidates"]) == told


def test_a_fall_of_accuracy_is_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nights.write(
        tmp_path / "h", CELLS, lambda c, i, _: {"accuracy": 0.80 if c != FIRST or i < 7 else 0.78}, nights=12
    )
    (c,) = detect(folder, capsys)[1]["candidates"]
    assert (c["cell"], c["metric"], c["night"], c["worse"]) == (FIRST, "accuracy", nights.night(7), True)


def test_a_cell_that_is_no_longer_measured_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = nights.noisy(7)
    folder = nights.write(
        tmp_path / "h", CELLS, lambda c, i, p: "oom" if c == FIRST and i == 9 else usual(c, i, p), nights=10
    )
    (stopped,) = detect(folder, capsys)[1]["stopped"]
    assert (stopped["cell"], stopped["status"], stopped["ok"]) == (FIRST, "oom", nights.night(8))


def test_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nights.write(tmp_path / "h", CELLS, nights.noisy(0), nights=5)
    assert detect(folder, capsys)[0] == Exit.NOTHING_COMPARED
    assert main(["history", "detect", "--dir", str(tmp_path / "none")]) == Exit.USAGE
    assert "`peft-harness history add RUN` begins one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("2026-01-03.jsonl", '{"schema":7,"night":"2026-01-03"}\n', "written with schema 7, this version reads 1"),
        ("2026-01-03.jsonl", "hello\n", "not a night"),
        ("notes.jsonl", "{}\n", "a stranger"),
        ("resets.jsonl", '{"schema":1,"cell":"*"}\n', "a torn or foreign line"),
        ("2026-01-03.jsonl", None, "a torn or foreign line"),
    ],
)
def test_what_cannot_be_read_is_named_and_the_rest_is_judged(
    name: str, text: str | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nights.write(tmp_path / "h", CELLS, nights.noisy(0, regressed), nights=14)
    path = folder / name
    path.write_text(path.read_text()[:-20] if text is None else text)
    code, found = detect(folder, capsys)
    assert code == Exit.INFRASTRUCTURE
    assert any(file.startswith(name) and told in why for file, why in found["left_out"].items())
    assert [c["cell"] for c in found["candidates"]] == [FIRST]


@pytest.mark.parametrize("value", ["NaN", "1e999", "-1", '"fast"', "null"])
def test_a_value_that_is_no_number_is_left_out(value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nights.write(tmp_path / "h", CELLS, nights.noisy(0), nights=8)
    path = folder / f"{nights.night(2)}.jsonl"
    lines = path.read_text().splitlines()
    lines[-1] = lines[-1].partition('"step_s":')[0] + f'"step_s":{value}}}}}'
    path.write_text("\n".join(lines) + "\n")
    code, found = detect(folder, capsys)
    assert (code, found["candidates"]) == (Exit.INFRASTRUCTURE, [])
    assert [file for file in found["left_out"] if file.startswith(path.name)]


# Who decides.


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"reason": "  "}, "an empty reason"),
        ({"night": "2025-12-31"}, "no night '2025-12-31' in this history"),
        ({"cell": "zzz"}, "no Cell 'zzz' in this history"),
        ({"metric": "speed"}, "not a metric: 'speed'"),
        ({"metric": "accuracy"}, "no such metric in this history: 'accuracy'"),
    ],
)
def test_a_reset_that_says_nothing_is_refused(
    changed: dict[str, str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nights.write(tmp_path / "h", CELLS, nights.noisy(0), nights=2)
    a = {"cell": FIRST, "metric": "step_s", "night": nights.night(1), "reason": "it is right"} | changed
    command = ["history", "reset", a["cell"], a["metric"], "--night", a["night"], "--reason", a["reason"]]
    assert main([*command, "--dir", str(folder), "--author", "A. Nyone"]) == Exit.USAGE
    assert told in capsys.readouterr().err
    assert not (folder / files.RESETS).exists()


def test_the_author_is_whom_git_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = nights.write(tmp_path / "h", CELLS, nights.noisy(0), nights=2)
    command = ["history", "reset", "*", "*", "--night", nights.night(1), "--reason", "new card", "--dir", str(folder)]
    config = tmp_path / "gitconfig"
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    config.write_text("")
    assert main(command) == Exit.USAGE
    assert "git knows no user.name here" in capsys.readouterr().err
    config.write_text("[user]\n\tname = N. Ight\n\temail = n@example.org\n")
    assert main(command) == Exit.PASS
    (line,) = files.read(folder).resets
    assert (line["author"], line["reason"]) == ("N. Ight <n@example.org>", "new card")


# What it costs.


def test_show_imports_neither_torch_nor_what_judges(tmp_path: Path) -> None:
    folder = nights.write(tmp_path / "h", CELLS, nights.noisy(0), nights=2)
    code = (
        "import sys\nfrom harness.cli import main\n"
        "code = main(['history', 'show', '--dir', sys.argv[1], '--cell', 'method=lora', '--metric', 'step_s'])\n"
        "heavy = {'torch', 'numpy', 'scipy', 'ruptures', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1 + len(CELLS) + 1


def test_a_thousand_cells_over_ninety_nights_take_less_than_five_seconds(tmp_path: Path) -> None:
    cells = nights.many(1000)
    rng = random.Random(8)
    drawn = [rng.gauss(1, 0.008) for _ in range(99_991)]

    def values(cell: str, index: int, number: int) -> dict[str, float]:
        at = zlib.crc32(f"{cell} {index} {number}".encode()) % 99_000
        return {
            "adapter_B": 1_351_680,
            "step_s": 0.1 * drawn[at],
            "latency_s/unmerged/forward/1x32": 0.01 * drawn[at + 1],
        }

    folder = nights.write(tmp_path / "h", cells, values, nights=90)
    code = (
        "import sys\nfrom harness.cli import main\n"
        "code = main(['history', 'detect', '--dir', sys.argv[1], '--json'])\n"
        "sys.exit('imports torch' if 'torch' in sys.modules else code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (Exit.PASS, "")
    assert json.loads(done.stdout)["compared"] == 3000
    # CPU time, not wall time: the machine may be busy with other tests.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
