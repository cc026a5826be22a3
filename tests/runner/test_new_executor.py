"""Executors by name: a new one is one file, with an option of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cli import main
from harness.errors import Exit, UsageError
from harness.records.record import Status
from harness.runner import executors
from harness.runner.executors.local import Local
from support import stub_attempts

_BACKWARDS = """
from harness.runner.executors.executor import ExecutorKind, ExecutorOption
from harness.runner.executors.local import Local


class Backwards(Local):
    def __init__(self, jobs, colours):
        super().__init__(jobs or 1)
        self.colours = tuple(colours)

    def run(self, queue, context, listener):
        return super().run(iter(list(queue)[::-1]), context, listener)


EXECUTOR = ExecutorKind("backwards", Backwards, option=ExecutorOption("colour", "NAME", "A colour."))
"""


@pytest.fixture
def backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module among those of the package that declares an executor."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "backwards.py").write_text(_BACKWARDS, encoding="utf-8")
    monkeypatch.setattr(executors, "__path__", [*executors.__path__, str(tmp_path / "modules")])


def test_the_executors_and_their_options() -> None:
    assert set(executors.kinds()) == {"local", "ray", "slurm"}
    assert executors.option_names() == ["slurm"]
    assert isinstance(local := executors.choose("local", 3), Local)
    assert local.jobs == 3
    with pytest.raises(UsageError) as caught:
        executors.choose("local", options={"slurm": ("gres=gpu:1",)})
    assert (caught.value.where, caught.value.what) == ("--slurm gres=gpu:1", "is for --executor slurm")


@pytest.mark.usefixtures("backwards")
def test_a_new_executor_is_one_file(tmp_path: Path) -> None:
    run = stub_attempts.Stubbed(tmp_path / "cells", 2)
    executor = executors.choose("backwards", options={"colour": ("red", "blue")})
    assert executor.colours == ("red", "blue")  # type: ignore[attr-defined]
    executor.command = run.command()  # type: ignore[attr-defined]
    records = [*executor.run(run.works(), run.terms, run.nobody)]
    assert [(record.cell.seed, record.status) for record in records] == [(1, Status.OK), (0, Status.OK)]


@pytest.mark.usefixtures("backwards")
def test_the_command_line_takes_its_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from harness.cli.run import run

    monkeypatch.setattr(run, "params", [p for p in run.params if p.name not in ("executor", "slurm")])
    seen = []
    monkeypatch.setattr("harness.runner.run.run_suite", lambda *_, executor, **__: seen.append(executor) or Exit.PASS)
    assert main(["run", "smoke", "--executor", "backwards", "--colour", "red"]) == Exit.PASS
    assert seen[0].colours == ("red",)
    assert main(["run", "smoke", "--colour", "red"]) == Exit.USAGE
    assert "is for --executor backwards" in capsys.readouterr().err
