"""The command `history`: stored runs, printed series, decisions and cost."""

from __future__ import annotations

import cProfile
import pstats
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from harness.analysis import tracked_metrics
from harness.cli import main
from harness.errors import Exit
from harness.records import store
from harness.records.record import CheckResult, Outcome, Record
from harness.regression.history import night_files
from harness.regression.history.detect import detection
from support import histories, recorded_run
from support.histories import CELLS, FIRST

FUSED = recorded_run.cells()["fused"]


# Stored runs.


def test_a_run_is_stored_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded_run.write_run(tmp_path / "run")
    folder = tmp_path / "history"
    add = ["history", "add", str(run.path), "--dir", str(folder)]
    assert main(add) == Exit.PASS
    night = folder / "2026-01-05.jsonl"
    assert capsys.readouterr().out == f"{night}: {len(run.manifest.cells)} new rows\n"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main([*add, str(run.path)]) == Exit.PASS
    assert capsys.readouterr().out == f"{night}: nothing new\n"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_stored_values_of_a_record(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "run", only=["fused"])
    assert main(["history", "add", str(run.path), "--dir", str(tmp_path / "history")]) == Exit.PASS
    history = night_files.read(tmp_path / "history")
    (night,) = history.nights
    (row,) = night.rows
    m = run.latest()[FUSED.cell_id].measurements
    assert m is not None
    assert row["values"]["adapter_B"] == m.memory.adapter_B
    assert row["values"]["parameters"] == m.parameters.trainable
    assert row["values"]["training_peak_B"] == 806 * recorded_run.MIB
    assert {f"latency_s/{v}/forward/1x40" for v in ("base", "unmerged", "merged")} <= row["values"].keys()
    assert all(tracked_metrics.kind(name) for name in row["values"])
    assert night.places[row["on"]]["threads"] == "2"
    assert history.cells == {FUSED.cell_id: FUSED.model_dump(mode="json")}


@pytest.mark.parametrize("red", ["lora/gradient/float32/warm", "lora/merge/float32/warm"])
def test_times_after_a_failed_check_are_not_stored(
    red: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: str, record: Record) -> Record:
        return record.model_copy(update={"checks": [*record.checks, CheckResult(check=red, outcome=Outcome.FAIL)]})

    run = recorded_run.write_run(tmp_path / "run", only=["fused"], change=fail)
    assert main(["history", "add", str(run.path), "--dir", str(tmp_path / "history")]) == Exit.PASS
    (row,) = night_files.read(tmp_path / "history").nights[0].rows
    times = {name for name in row["values"] if tracked_metrics.kind(name) == "timed"}
    if "merge" in red:
        assert times == {"step_s", "latency_s/base/forward/1x40", "latency_s/unmerged/forward/1x40"}
    else:
        assert times == set()
        assert f"no times of {FUSED.label} ({FUSED.cell_id}): no speed without parity: {red}" in capsys.readouterr().err
    assert "accuracy" in row["values"]


@pytest.mark.parametrize(("deed", "code"), [("torn", 4), ("changed", 1), ("newer", 4), ("missing", 4)])
def test_omissions_are_named_and_the_other_rows_are_stored(
    deed: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recorded_run.write_run(tmp_path / "run", footer=deed == "changed")
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
    rows = night_files.read(tmp_path / "history").nights[0].rows
    assert len(rows) == 9
    assert FUSED.cell_id not in {row["cell"] for row in rows}


def test_a_run_without_hashes_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded_run.write_run(tmp_path / "run", only=["fused"])
    add = ["history", "add", str(run.path), "--dir", str(tmp_path / "history")]
    assert main(add) == Exit.PASS
    assert run.footer is not None
    store.write(run.path / "footer.json", run.footer.model_copy(update={"sha256": {}}))
    assert main(add) == Exit.INFRASTRUCTURE
    assert "its footer has no hashes" in capsys.readouterr().err


def test_a_run_is_a_pass_of_one_night_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded_run.write_run(tmp_path / "run", only=["fused"])
    add = ["history", "add", str(run.path), "--dir", str(tmp_path / "history"), "--night"]
    assert main([*add, "2026-02-01"]) == Exit.PASS
    assert main([*add, "2026-02-02"]) == Exit.USAGE
    assert "is a pass of the night 2026-02-01 already" in capsys.readouterr().err
    assert main([*add, "yesterday"]) == Exit.USAGE


def test_an_unreadable_night_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded_run.write_run(tmp_path / "run", only=["fused"])
    (tmp_path / "2026-01-05.jsonl").write_text('{"schema":2,"night":"2026-01-05"}\n')
    assert main(["history", "add", str(run.path), "--dir", str(tmp_path)]) == Exit.USAGE
    assert "written with schema 2, this version reads 1" in capsys.readouterr().err
    assert (tmp_path / "2026-01-05.jsonl").read_text() == '{"schema":2,"night":"2026-01-05"}\n'


# Decisions.


@pytest.mark.parametrize(
    ("changed", "reported"),
    [
        ({"reason": "  "}, "the reason is empty"),
        ({"night": "2025-12-31"}, "no night '2025-12-31' in this history"),
        ({"cell": "zzz"}, "no Cell 'zzz' in this history"),
        ({"metric": "speed"}, "not a metric: 'speed'"),
        ({"metric": "accuracy"}, "no such metric in this history: 'accuracy'"),
    ],
)
def test_an_incomplete_reset_is_refused(
    changed: dict[str, str], reported: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = histories.write(tmp_path / "h", CELLS, histories.noisy(0), nights=2)
    a = {"cell": FIRST, "metric": "step_s", "night": histories.night(1), "reason": "it is right"} | changed
    command = ["history", "reset", a["cell"], a["metric"], "--night", a["night"], "--reason", a["reason"]]
    assert main([*command, "--dir", str(folder), "--author", "A. Nyone"]) == Exit.USAGE
    assert reported in capsys.readouterr().err
    assert not (folder / night_files.RESETS).exists()


@pytest.mark.parametrize(("verb", "text"), [(["reset"], "reason"), (["confirm", "--verdict", "regressed"], "evidence")])
def test_all_mistakes_of_a_decision_are_listed_at_once(
    verb: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("GLOBAL", "SYSTEM"):
        monkeypatch.setenv(f"GIT_CONFIG_{place}", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    folder = histories.write(tmp_path / "h", CELLS, histories.noisy(0), nights=2)
    command = ["history", *verb, "nope", "speed", "--night", "2026-10-99", f"--{text}", " ", "--dir"]
    assert main([*command, str(folder)]) == Exit.USAGE
    output = capsys.readouterr().err
    expected = [
        "CELL: no Cell 'nope' in this history", "METRIC: not a metric: 'speed'", "--night: no night '2026-10-99'",
        f"--{text}: the {text} is empty", "--author: no author",
    ]  # fmt: skip
    assert f"{len(expected)} mistakes" in output
    assert all(f"\n  {one}" in output for one in expected), output
    assert not {night_files.RESETS, night_files.CONFIRMATIONS} & {path.name for path in folder.iterdir()}
    (tmp_path / "empty").mkdir()
    assert main([*command, str(tmp_path / "empty"), "--author", "A"]) == Exit.USAGE
    output = capsys.readouterr().err
    assert "2 mistakes" in output
    assert f"--dir: no night in {tmp_path / 'empty'}" in output


def test_the_author_is_the_git_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = histories.write(tmp_path / "h", CELLS, histories.noisy(0), nights=2)
    command = [
        "history",
        "reset",
        "*",
        "*",
        "--night",
        histories.night(1),
        "--reason",
        "new card",
        "--dir",
        str(folder),
    ]
    config = tmp_path / "gitconfig"
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    config.write_text("")
    assert main(command) == Exit.USAGE
    assert "--author: no author" in capsys.readouterr().err
    config.write_text("[user]\n\tname = N. Ight\n\temail = n@example.org\n")
    assert main(command) == Exit.PASS
    (line,) = night_files.read(folder).resets
    assert (line.author, line.reason) == ("N. Ight <n@example.org>", "new card")


# Cost.


@pytest.mark.slow
def test_show_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    folder = histories.write(tmp_path / "h", CELLS, histories.noisy(0), nights=2)
    code = (
        "import sys\nfrom harness.cli import main\n"
        "code = main(['history', 'show', '--dir', sys.argv[1], '--cell', 'method=lora', '--metric', 'step_s'])\n"
        "heavy = {'torch', 'numpy', 'scipy', 'ruptures', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1 + len(CELLS) + 1


COUNTED = {
    "parameters": 338_690, "weights_B": 90_857_472, "adapter_B": 1_351_680, "gradients_B": 1_354_760,
    "optimizer_B": 2_709_528, "adapter_file_B": 1_362_432, "model_B": 90_857_472, "counted_peak_B": 200_123_456,
}  # fmt: skip


@pytest.mark.slow
def test_detect_calls_no_function_per_value(tmp_path: Path) -> None:
    """A thousand Cells over ninety nights are four million values; a call for each of them takes minutes."""
    cells = histories.many(50)
    rng = random.Random(8)
    drawn = [rng.gauss(1, 0.008) for _ in range(99_991)]
    variants = ("base", "unmerged", "merged", "multi-adapter")
    timed = [
        "step_s",
        *(f"latency_s/{of}/forward/4x32" for of in variants),
    ]  # with these, all metrics of an encoder

    def values(cell: str, index: int, number: int) -> dict[str, float]:
        at = zlib.crc32(f"{cell} {index} {number}".encode()) % 99_000
        times = {name: round(0.01 * drawn[at + place], 9) for place, name in enumerate(timed)}
        return COUNTED | {"training_peak_B": 800_000_000 + int(1e6 * drawn[at + 20]), "accuracy": 0.77} | times

    # The latencies of the bare base show changes of the machine, and are not judged themselves.
    metrics = len(COUNTED) + 2 + len(timed)
    calls = []
    for passes in (1, 3, 9):  # the first one also imports numpy
        folder = histories.write(tmp_path / str(passes), cells, values, nights=20, passes=passes)
        profile = cProfile.Profile(builtins=False)
        found = profile.runcall(lambda folder=folder: detection(night_files.read(folder)))
        assert found.compared == len(cells) * (metrics - 1)
        calls.append(pstats.Stats(profile).total_calls)
    assert calls[2] - calls[1] < len(cells) * 20 * (9 - 3) * metrics
