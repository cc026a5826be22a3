"""Mutants: changes made by machine, the trial of each in a fork, and the rate that `check --self-test --mutants` prints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from harness.cli import main
from harness.conformance.mutants import mutant as mutant_module
from harness.conformance.mutants import run
from harness.conformance.mutants.mutant import Mutant, mutants
from harness.errors import Exit
from harness.process import forks

SOURCE = '''"""A module."""

from torch import Tensor

SPEC = 3
LEVELS = (0.5, 1.0)


def scaled(x: Tensor, rank: int = 8) -> Tensor:
    """Return 2 x."""
    if rank < 1:
        problem = f"rank {rank + 1} is too small"
        raise ValueError(problem)
    if rank > 4 and x.dim() == 2:
        x.mul_(2)
    return x.detach() / rank
'''


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> list[Mutant]:
    monkeypatch.setattr(mutant_module, "source_of", lambda _: SOURCE)
    return list(mutants("some.module"))


def test_each_mutant_changes_one_line_of_the_behaviour(changed: list[Mutant]) -> None:
    lines = {one.diff().splitlines()[1] for one in changed}
    assert lines == {
        "- LEVELS = (0.5, 1.0)", "- if rank > 4 and x.dim() == 2:", "- x.mul_(2)", "- return x.detach() / rank",
    }  # fmt: skip
    for one in changed:
        compile(one.source("probe"), "mutant", "exec")
        before, after = SOURCE.splitlines(), one.source().splitlines()
        assert [a != b for a, b in zip(before, after, strict=True)].count(True) == 1


def test_the_kinds_of_mistakes(changed: list[Mutant]) -> None:
    after = {(one.kind, one.diff().splitlines()[2]) for one in changed}
    assert after >= {
        ("constant", "+ LEVELS = (1.0, 1.0)"),
        ("comparison", "+ if (rank >= 4) and x.dim() == 2:"),
        ("branch", "+ if True:"),
        ("branch", "+ if (x.dim() == 2):"),
        ("omitted statement", "+ pass"),
        ("function", "+ x.div_(2)"),
        ("omitted call", "+ return x / rank"),
        ("arithmetic", "+ return (x.detach() * rank)"),
        ("omitted term", "+ return x.detach()"),
    }


def test_the_probe_tells_whether_the_changed_statement_ran(changed: list[Mutant]) -> None:
    ran: list[str] = []
    only = next(one for one in changed if one.text == "x.div_(2)" or one.kind == "omitted statement")
    scope = {"probe": lambda: ran.append(only.name)}
    exec(compile(only.source("probe"), "mutant", "exec"), scope)
    import torch

    scope["scaled"](torch.ones(2), 8)  # type: ignore[operator]
    assert not ran
    scope["scaled"](torch.ones(2, 2), 8)  # type: ignore[operator]
    assert ran


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform == "win32", reason="mutants are tried in forks")
@pytest.mark.slow
def test_the_checks_of_a_target_catch_its_mutants() -> None:
    # In a process of its own: here another test may have imported the kernels that the mutants are to replace.
    command = ["check", "--self-test", "--mutants", "12", "--op", "lora_linear", "--seed", "3", "--json", "--jobs", "2"]
    ended = subprocess.run([sys.executable, "-m", "harness.cli", *command], capture_output=True, text=True, check=False)
    assert ended.returncode in (Exit.PASS, Exit.FAIL), ended.stderr
    found = json.loads(ended.stdout)
    assert [len(found["mutants"]), found["errors"]] == [12, 0]
    assert found["caught"] >= found["tried"] / 2 > 0  # most of them are caught; the rest is printed with its diff
    assert all(one["of"] in ([], ["lora_linear"]) for one in found["mutants"])
    assert {one["caught"] for one in found["mutants"]} <= {"default", "wide", "died", None}


def test_a_mutant_that_is_no_mistake_is_not_counted() -> None:
    one = next(iter(mutants("reference.vera")))
    verdicts = [
        run.MutantResult(one, ("vera",), run.Catch("default", "vera/forward/float32/warm", False)),
        run.MutantResult(one, ("vera",), equivalent="a reason"),
        run.MutantResult(one, ("vera",), same_bits=True),
        run.MutantResult(one, ()),
    ]
    report = run.MutantReport(verdicts)
    assert report.exit is Exit.PASS
    assert [len(report.tried()), report.survivors()] == [1, []]
    survivor = run.MutantReport([*verdicts, run.MutantResult(one, ("vera",))])
    assert survivor.exit is Exit.FAIL
    assert "1 of 2 counted mutants caught (50.0 %)" in "\n".join(survivor.lines())
    assert one.diff().splitlines()[1] in "\n".join(survivor.lines())


def test_a_mutant_that_could_not_be_tried_is_neither_caught_nor_a_survivor() -> None:
    one = next(iter(mutants("reference.vera")))
    report = run.MutantReport([run.MutantResult(one, ("vera",), error="AlreadyImportedError: too late")])
    assert report.exit is Exit.INFRASTRUCTURE
    assert [report.tried(), report.survivors()] == [[], []]
    assert f"COULD NOT BE TRIED {one.name}: AlreadyImportedError: too late" in report.lines()


def test_a_mutant_that_is_not_caught_is_reported_as_soon_as_its_trial_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    caught, missed = list(mutants("reference.vera"))[:2]
    catch = vars(run.Catch("default", "vera/forward/float32/warm", False))
    ends = [forks.ForkEnd(caught, (catch, True), "", ""), forks.ForkEnd(missed, (None, True), "", "")]
    said: list[str] = []

    def trials(*_: object) -> Iterator[forks.ForkEnd[Mutant]]:
        yield ends[0]
        assert not said
        yield ends[1]
        assert missed.name in said[0]

    monkeypatch.setattr(forks, "run", trials)
    verdicts = {one: run.MutantResult(one, ("vera",)) for one in (caught, missed)}
    run._Trials(verdicts, 1, said.append).run_checks("default")
    assert len(said) == 1


@pytest.mark.slow
def test_the_list_of_equivalent_mutants_names_what_exists() -> None:
    modules = run.modules()
    known = {*modules, *(one.name for module in modules for one in mutants(module))}
    assert set(run.equivalent()) <= known


@pytest.mark.parametrize(
    "options", [["--mutants", "3"], ["--self-test", "--mutants", "3", "--full"], ["--self-test", "--method", "lora"]]
)
def test_options_that_do_not_go_together_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *options]) == Exit.USAGE
    assert "hint" in capsys.readouterr().err


def test_an_unknown_target_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--self-test", "--mutants", "3", "--method", "lroa"]) == Exit.USAGE
    assert "did you mean `lora`?" in capsys.readouterr().err
