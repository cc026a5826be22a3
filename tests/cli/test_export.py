"""The verb `export`: files that say what `harness.load` says, refusals before anything is written, exit codes."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import harness
from harness.cli import main
from harness.errors import Exit
from harness.records import store
from harness.report.export.columns import TABLES
from support import recorded_run
from support.repository import PUBLISHED, TOP
from support.sandbox import Finished, Sandbox

REAL = PUBLISHED / "2026-11-24-quick-cpu"
FUSED = recorded_run.cells()["fused"]
FILES = (*TABLES, "columns")


def read(path: Path, like: pd.DataFrame) -> pd.DataFrame:
    """Read a file as a stranger to the harness would, with the dtypes that columns.csv names."""
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    kinds = {name: str(dtype) for name, dtype in like.dtypes.items()}
    # Python's own reading of a decimal number is exact; that of `read_csv` is so in some releases of pandas only.
    later = {name: kind for name, kind in kinds.items() if kind in ("Float64", "datetime64[us, UTC]")}
    frame = pd.read_csv(path, dtype=kinds | dict.fromkeys(later, "string"), keep_default_na=False, na_values=[""])
    return frame.astype(later)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_the_files_say_what_load_says_to_the_last_bit(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "numbers"
    assert main(["export", str(REAL), "--format", form, "--out", str(out)]) == Exit.PASS
    printed = capsys.readouterr()
    assert printed.err == ""
    numbers = harness.load(REAL)
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{name}.{form}" for name in FILES)
    for name, line in zip(FILES, printed.out.splitlines(), strict=True):
        frame = getattr(numbers, name)
        assert line == f"{out / name}.{form}: {len(frame)} rows, {len(frame.columns)} columns"
        pd.testing.assert_frame_equal(read(out / f"{name}.{form}", frame), frame, check_exact=True)


def test_a_run_of_today_is_exported_into_its_own_folder(
    smoke: tuple[Finished, store.Run], sandbox: Sandbox, tmp_path: Path
) -> None:
    shutil.copytree(smoke[1].path, tmp_path / "run")
    done = sandbox.command("export", "run", "--format", "parquet")
    assert (done.code, done.err) == (Exit.PASS, "")
    cells = pd.read_parquet(tmp_path / "run" / "export-parquet" / "cells.parquet")
    assert set(cells["cell_id"]) == {cell.cell_id for cell in smoke[1].manifest.cells}
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "page.html")]) == smoke[0].code


@pytest.mark.parametrize("held", ["a run", "a stranger's file", "no folder"])
def test_nothing_is_written_over(held: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded_run.write_run(tmp_path / "run")
    out = tmp_path / "out"
    if held == "a run":
        out = run.path
    elif held == "no folder":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", str(run.path), "--format", "csv", "--out", str(out)]) == Exit.USAGE
    printed = capsys.readouterr()
    what = "is not a folder" if held == "no folder" else "is not empty"
    assert printed.err == f"peft-harness: --out {out}: {what}\n  hint: name another folder, or move that one away\n"
    assert (printed.out, sorted(tmp_path.rglob("*"))) == ("", before)


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    assert main(["export", str(run.path), "--format", "csv", "--out", str(tmp_path / "out")]) == Exit.PASS


_WITHOUT_PYARROW = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "pyarrow":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from harness.cli import main
sys.exit(main(["export", sys.argv[1], "--format", sys.argv[2], "--out", sys.argv[3]]))
"""


@pytest.mark.slow
def test_without_pyarrow_there_is_csv_alone_and_it_says_so_first(tmp_path: Path) -> None:
    def run(form: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _WITHOUT_PYARROW, str(REAL), form, str(tmp_path / form)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    refused = run("parquet")
    assert (refused.returncode, refused.stdout) == (Exit.USAGE, "")
    assert refused.stderr.startswith("peft-harness: --format parquet: Parquet is written by pyarrow, which cannot be ")
    assert refused.stderr.endswith("\n  hint: `pip install pyarrow`, or take --format csv\n")
    assert not (tmp_path / "parquet").exists()
    assert run("csv").returncode == Exit.PASS
    assert len(pd.read_csv(tmp_path / "csv" / "cells.csv")) == 10


def test_nothing_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded_run.write_run(tmp_path / "run", only=["fused"], change=lambda *_: None, footer=False)
    out = tmp_path / "out"
    assert main(["export", str(run.path), "--format", "csv", "--out", str(out)]) == Exit.NOTHING_COMPARED
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"left out: {run.path}: {FUSED.label} ({FUSED.cell_id}) has no Record\n" in printed.err
    assert "nothing to export" in printed.err
    assert not out.exists()


@pytest.mark.parametrize(("deed", "code"), [("torn", 4), ("changed", 1), ("missing", 4)])
def test_what_is_left_out_is_named_and_the_rest_is_written(
    deed: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recorded_run.write_run(tmp_path / "run", footer=deed == "changed")
    path = store.RunFolder(run.path).record_path(FUSED.cell_id, 1)
    if deed == "missing":
        path.unlink()
    else:
        text = path.read_text()
        path.write_text(text[:-9] if deed == "torn" else text.replace('"duration_s"', '"duration_s" '))
    out = tmp_path / "out"
    assert main(["export", str(run.path), "--format", "csv", "--out", str(out)]) == code
    printed = capsys.readouterr()
    assert printed.err.startswith(f"left out: {run.path}: ")
    assert FUSED.cell_id in printed.err
    cells = pd.read_csv(out / "cells.csv")
    assert len(cells) == 9
    assert FUSED.cell_id not in set(cells["cell_id"])


@pytest.mark.slow
def test_several_runs_and_one_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = (recorded_run.write_run(tmp_path / name, run=name) for name in ("first", "other"))
    words = ["--format", "csv", "--out", str(tmp_path / "out")]
    assert main(["export", str(first.path), "nowhere", *words]) == Exit.USAGE
    assert "no run 'nowhere'" in capsys.readouterr().err
    assert main(["export", str(first.path), str(other.path), *words]) == Exit.PASS
    assert pd.read_csv(tmp_path / "out" / "cells.csv")["run"].value_counts().to_dict() == {"first": 10, "other": 10}


def test_a_full_disk_is_said_with_its_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no room")

    run, out = recorded_run.write_run(tmp_path / "run"), tmp_path / "out"
    monkeypatch.setattr(os, "fsync", full)
    assert main(["export", str(run.path), "--format", "csv", "--out", str(out)]) == Exit.INFRASTRUCTURE
    said = capsys.readouterr().err
    assert (
        f"{out / 'cells.csv'}: the disk is full\n  hint: free some space or name another --out, remove {out}, " in said
    )
    assert list(out.iterdir()) == []


@pytest.mark.slow
def test_what_the_readme_shows_is_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manual = (TOP / "results" / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(TOP)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", manual, re.DOTALL):
        exec(block, names)
    numbers, medians, validated = names["numbers"], names["medians"], names["validated"]
    pd.testing.assert_series_equal(
        medians, numbers.cells.set_index("cell_id")["step_s"].dropna().sort_index(), check_names=False, check_exact=True
    )
    assert validated == 10
    (command,) = re.findall(r"^    peft-harness (export results/published/.*?)(?:  .*)?$", manual, re.MULTILINE)
    words = [str(tmp_path / "out") if word == "numbers/" else word for word in command.split()]
    assert main(words) == Exit.PASS
    assert len(list((tmp_path / "out").iterdir())) == len(FILES)


def test_a_format_that_is_left_out_is_asked_for_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(REAL)]) == Exit.USAGE
    said = capsys.readouterr().err.splitlines()
    assert [line.strip().partition(":")[0] for line in said] == ["peft-harness", "hint"]
    assert "parquet, csv" in said[0]
