"""`env` and `check --with` as a user runs them: in which release did it break? Wheels come from this disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from harness.assets.environments import table
from harness.cli import main
from harness.errors import Exit
from support import tiny_wheels
from support.report_page import Page
from support.sandbox import Sandbox

PLUGIN = """
from harness import implements

@implements("nf4_dequantize", name="tiny-op", dtypes=["float32"], requires=[{requires}])
def decode(**arguments):
    from harness.conformance.operations import nf4_dequantize
    return {factor} * nf4_dequantize.OPERATION.reference(**arguments)
"""
DOOR = "[harness.implementations]\ntiny-op = tiny_op:decode\n"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three releases of a plug-in. The second is wrong."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    for version, factor in (("1.0", 1), ("1.1", 1.01), ("1.2", 1)):
        module = {"tiny_op.py": PLUGIN.format(factor=factor, requires="")}
        tiny_wheels.wheel(tmp_path / "wheels", "tiny-op", version, module, entry_points=DOOR)
    return tmp_path / "wheels"


def test_check_shows_in_which_release_a_defect_came_and_went(sandbox: Sandbox, wheels: Path, tmp_path: Path) -> None:
    versions = [f"--with=tiny-op=={one}" for one in ("1.0", "1.1", "1.2")]
    page = tmp_path / "page.html"
    checking = ("check", "tiny-op", *versions, "--offline", "--find-links", str(wheels), "--html", str(page))
    done = sandbox.command(*checking, "--json")
    assert done.code == Exit.FAIL, done.err
    document = json.loads(done.out)
    assert [one["label"] for one in document["environments"]] == ["tiny-op 1.0", "tiny-op 1.1", "tiny-op 1.2"]
    rows = {row["check"]: [field["standing"] for field in row["fields"]] for row in document["versions"]["checks"]}
    assert rows["nf4_dequantize/outputs"] == ["pass", "fail", "pass"]
    assert all(row["differs"] for row in document["versions"]["checks"])
    assert {one["environment"] for one in document["checks"] if one["standing"] == "fail"} == {"tiny-op 1.1"}
    assert "tiny-op (tiny-op 1.1)" in Page(page.read_text(encoding="utf-8")).text
    assert done.err.count("installing 1 package") == 3
    again = sandbox.command("check", "tiny-op", *versions[:1])
    assert again.code == Exit.PASS, again.err
    assert "installing" not in again.err
    assert "tiny-op (tiny-op 1.0)" in again.out
    listed = sandbox.command("env", "list")
    assert "3 environments" in listed.out
    removed = sandbox.command("env", "remove", "tiny-op-1.0", "tiny-op-1.1", "tiny-op-1.2")
    assert removed.code == Exit.PASS
    assert json.loads(sandbox.command("env", "list", "--json").out)["environments"] == []


def test_an_implementation_runs_in_the_environment_that_a_table_declares_for_it(
    sandbox: Sandbox, wheels: Path, tmp_path: Path
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
    assert sandbox.command("env", "create", "tiny", *index).code == Exit.PASS
    without = sandbox.command("check", "tiny-op", "--with", "tiny")
    assert without.code == Exit.INFRASTRUCTURE, without.err
    assert "needs tiny_backend, which is not installed" in without.out
    assert sandbox.command("env", "create", "tiny-whole", *index).code == Exit.PASS
    done = sandbox.command("check", "tiny-op", "--with", "tiny-whole")
    assert done.code == Exit.PASS, done.err
    assert "tiny-op (tiny-op 3.0, tiny-backend 1.0)" in done.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["env", "create"], "needs a NAME or --with"),
        (["env", "create", "loralib", "--with", "peft==1"], "needs a NAME or --with"),
        (["env", "create", "lorlib"], "did you mean `loralib`?"),
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
