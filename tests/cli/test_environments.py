"""`env` and `check --with` as a user runs them: in which release did it break? Wheels come from this disk."""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from harness.assets.environments import folder, table
from harness.cli import check_run as check
from harness.cli import main
from harness.conformance.findings.report import CheckReport
from harness.errors import Exit
from harness.records import store
from support import recorded_run, tiny_wheels
from support.report_page import Page
from support.repository import PUBLISHED
from support.sandbox import Sandbox, make_sandbox

PLUGIN = """
from harness import implements

@implements("nf4_dequantize", name="tiny-op", dtypes=["float32"], requires=[{requires}])
def decode(**arguments):
    from harness.conformance.operations import nf4_dequantize
    return {factor} * nf4_dequantize.OPERATION.reference(**arguments)
"""
DOOR = "[harness.implementations]\ntiny-op = tiny_op:decode\n"


@pytest.fixture
def alone(wheels: Path, tmp_path: Path) -> Sandbox:
    """The command with a cache of its own."""
    return make_sandbox(tmp_path, tmp_path / "cache")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three releases of a plug-in. The second is wrong."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    for number, factor in (("1.0", 1), ("1.1", 1.01), ("1.2", 1)):
        module = {"tiny_op.py": PLUGIN.format(factor=factor, requires="")}
        tiny_wheels.wheel(tmp_path / "wheels", "tiny-op", number, module, entry_points=DOOR)
    return tmp_path / "wheels"


@pytest.mark.nightly
@pytest.mark.e2e
def test_check_shows_in_which_release_a_defect_came_and_went(alone: Sandbox, wheels: Path, tmp_path: Path) -> None:
    versions = [f"--with=tiny-op=={one}" for one in ("1.0", "1.1", "1.2")]
    page = tmp_path / "page.html"
    checking = ("check", "tiny-op", *versions, "--offline", "--find-links", str(wheels), "--html", str(page))
    done = alone.command(*checking, "--json")
    assert done.code == Exit.FAIL, done.err
    document = json.loads(done.out)
    assert [one["label"] for one in document["environments"]] == ["tiny-op 1.0", "tiny-op 1.1", "tiny-op 1.2"]
    rows = {row["check"]: [field["standing"] for field in row["fields"]] for row in document["versions"]["checks"]}
    assert rows["nf4_dequantize/outputs"] == ["pass", "fail", "pass"]
    assert all(row["differs"] for row in document["versions"]["checks"])
    assert {one["environment"] for one in document["checks"] if one["standing"] == "fail"} == {"tiny-op 1.1"}
    assert "tiny-op (tiny-op 1.1)" in Page(page.read_text(encoding="utf-8")).text
    assert done.err.count("installing 1 package") == 3
    again = alone.command("check", "tiny-op", *versions[:1])
    assert again.code == Exit.PASS, again.err
    assert "installing" not in again.err
    assert "tiny-op (tiny-op 1.0)" in again.out
    listed = alone.command("env", "list")
    assert "3 environments" in listed.out
    removed = alone.command("env", "remove", "tiny-op-1.0", "tiny-op-1.1", "tiny-op-1.2")
    assert removed.code == Exit.PASS
    assert json.loads(alone.command("env", "list", "--json").out)["environments"] == []


@pytest.mark.nightly
@pytest.mark.e2e
def test_an_environment_of_a_users_table_has_what_the_implementation_needs(
    alone: Sandbox, wheels: Path, tmp_path: Path
) -> None:
    """Its library is not installed beside the others, as vLLM's is not."""
    tiny_wheels.wheel(wheels, "tiny-backend", "1.0")
    module = {"tiny_op.py": PLUGIN.format(factor=1, requires="'tiny_backend'")}
    tiny_wheels.wheel(wheels, "tiny-op", "3.0", module, entry_points=DOOR)
    file = tmp_path / "mine.yaml"
    file.write_text(
        "environments:\n"
        "  - {name: tiny, requirements: [tiny-op==3.0], implementations: [tiny-op]}\n"
        "  - {name: tiny-whole, requirements: [tiny-op==3.0, tiny-backend==1.0], implementations: [tiny-op]}\n"
    )
    index = ("--file", str(file), "--offline", "--find-links", str(wheels))
    assert alone.command("env", "create", "tiny", *index).code == Exit.PASS
    without = alone.command("check", "tiny-op", "--with", "tiny")
    assert without.code == Exit.INFRASTRUCTURE, without.err
    assert "needs tiny_backend, which is not installed" in without.out
    assert alone.command("env", "create", "tiny-whole", *index).code == Exit.PASS
    done = alone.command("check", "tiny-op", "--with", "tiny-whole")
    assert done.code == Exit.PASS, done.err
    assert "tiny-op (tiny-op 3.0, tiny-backend 1.0)" in done.out


@pytest.mark.nightly
@pytest.mark.e2e
def test_a_suite_runs_the_same_cells_in_several_environments(
    wheels: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Record holds the version of the library that its process saw, and a resumed run measures nothing again."""
    tiny_wheels.wheel(wheels, "liger-kernel", "99.0")
    sandbox.environment.update({"PIP_FIND_LINKS": str(wheels), "PIP_NO_INDEX": "1"})
    suite = sandbox.suite("{id: both, implementation: reference, environment: ['', liger-kernel==99.0]}")
    done = sandbox.command("run", suite, "--out", "run")
    assert done.code == Exit.PASS, done.err
    seen = {one.cell.environment: one.environment.software.get("liger-kernel", "") for one in sandbox.read().records}
    assert seen == {"": version_here("liger-kernel"), "liger-kernel==99.0": "99.0"}
    losses = [one.measurements.training.losses for one in sandbox.read().records if one.measurements]
    assert losses[0] == losses[1]
    again = sandbox.command("run", suite, "--resume", "run")
    assert again.code == Exit.PASS, again.err
    assert len(sandbox.read().records) == 2


def version_here(project: str) -> str:
    try:
        return version(project)
    except PackageNotFoundError:
        return ""


def test_a_cell_without_an_environment_keeps_its_id() -> None:
    cell = recorded_run.cells()["fused"]
    assert cell.model_copy(update={"environment": "peft==0.19.1"}).cell_id != cell.cell_id
    values = json.loads(cell.model_dump_json())
    del values["environment"]  # as in a Record of an older harness
    assert type(cell).model_validate(values).cell_id == cell.cell_id
    older = next((PUBLISHED / "2026-11-24-quick-cpu" / "cells").glob("*.json"))
    assert store.read_record(older).cell.cell_id == older.name.partition(".")[0]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ("peft", "unknown environment 'peft'"),
        ("'pe ft==1'", "is no requirement"),
        ("[a==1, a==1]", "lists 'a==1' 2 times"),
    ],
)
def test_a_mistake_in_a_suites_environment_has_its_line(
    environment: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = make_sandbox(tmp_path, tmp_path).suite(
        f"{{id: one, implementation: reference, environment: {environment}}}"
    )
    assert main(["plan", suite]) == Exit.USAGE
    err = capsys.readouterr().err
    assert said in err
    assert "faults.yaml:13" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["env", "create"], "needs a NAME or --with"),
        (["env", "create", "loralib", "--with", "peft==1"], "needs a NAME or --with"),
        (["env", "create", "lorlib"], "did you mean `loralib`? Or write a requirement with a version"),
        (["env", "remove", "nothing"], "there is no environment 'nothing'"),
        (["env", "repair", "nothing"], "there is no environment 'nothing'"),
        (["check", "hf-peft", "--with", "pfet"], "unknown environment 'pfet'"),
        (["check", "hf-peft", "--offline"], "--offline: has no effect without --with"),
        (["check", "--self-test", "--with", "peft==1"], "--self-test: tests the checks"),
    ],
)
def test_wrong_use_is_said(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path / "cache"))
    assert main(arguments) == Exit.USAGE
    assert said in capsys.readouterr().err


def test_the_list_names_what_could_be_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path / "cache"))
    assert main(["env", "list"]) == Exit.PASS
    out = capsys.readouterr().out
    for spec in table.load().values():
        assert spec.requirements[0] in out
    assert not [line for line in out.splitlines() if line.startswith(" ") and "`" in line]
    assert max(map(len, out.splitlines())) <= 140
    assert "torchtune==0.6.1 and 6 more" in out


@pytest.mark.parametrize("exists", [False, True])
def test_an_implementation_that_nobody_installed_runs_in_its_environment_or_names_the_command(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path / "cache"))
    spec = table.load()["loralib"]
    if exists:
        made = folder.place(spec)
        made.mkdir(parents=True)
        file = folder.EnvironmentFile(
            spec=spec, base={}, versions={"loralib": "0.1.2"}, packages=[], size=1, made="2026-11-28", installer="pip"
        )
        (made / folder.FILE).write_text(file.model_dump_json())
        monkeypatch.setattr(check.homes.integrity, "require_start", lambda _: None)
    ran: list[str] = []

    def judge_in(request: check.CheckRequest, environment: folder.MadeEnvironment | None) -> tuple[CheckReport, set]:
        ran.append(environment.label if environment else "here")
        if environment:
            assert request.implementations == ["loralib"]
            return CheckReport([]), set()
        skipped = {"loralib lora": "needs loralib, which is not installed", "other lora": "needs other"}
        report = CheckReport([], skipped, untried=["loralib"])
        return report, {("loralib", "method", "lora"), ("other", "method", "lora")}

    monkeypatch.setattr(check, "_judge_in", judge_in)
    report = check.judge(check.CheckRequest())
    if exists:
        assert ran == ["here", "loralib 0.1.2"]
        assert (report.skipped, list(report.untried)) == ({"other lora": "needs other"}, [])
    else:
        assert ran == ["here"]
        assert "`peft-harness env create loralib`" in report.skipped["loralib lora"]
        assert report.skipped["other lora"] == "needs other"
