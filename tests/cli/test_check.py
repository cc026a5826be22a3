"""The verb `check`: what it prints and writes, wrong use, Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import psutil
import pytest

from harness import resources
from harness.cli import check_run as command
from harness.cli import check_tasks, main
from harness.conformance import parity_suite
from harness.conformance.case_selection import CaseSelection
from harness.conformance.execution import worker_protocol as protocol
from harness.conformance.findings import defects, summary
from harness.conformance.findings.defects import Defect
from harness.conformance.findings.outcomes import CheckOutcome, Execution
from harness.conformance.findings.report import CheckReport
from harness.errors import Exit
from harness.methods.registry import DTYPES, Implementation, Registry
from harness.process.worker_pool import WorkerPool
from harness.records import files
from harness.records.record import CheckResult, Outcome
from harness.report import check_junit, check_page, check_terminal
from support.processes import eventually
from support.report_page import Page
from support.sandbox import ForkSandbox, Sandbox

EVIL = "x</script><img src=x onerror=alert(1)>\x00\udcff"
SCRIPT = "print('<b>wrong</b>')\n"


def result(check: str = "lora/forward/float32/warm", outcome: Outcome = Outcome.PASS, **more) -> CheckResult:
    return CheckResult(check=check, outcome=outcome, **more)


def tried(name: str = "acme", found: CheckResult | None = None, **more) -> CheckOutcome:
    given = {"kind": "method", "target": "lora", "dtype": "float32", "case": "rank=3 63x128x48", **more}
    return CheckOutcome(implementation=name, result=found or result(), **given)


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckReport:
    """One of everything that can be found."""
    (tmp_path / "wrong.py").write_text(SCRIPT, encoding="utf-8")
    monkeypatch.setattr(defects, "path", lambda: tmp_path / "known.yaml")
    known = Defect(
        id="acme-wrong", library="acme", versions=">=1", implementation="acme", checks=["lora/merge/*/*"],
        summary="merges into thin air", reproduction="wrong.py", link="https://example.org/1",
    )  # fmt: skip
    wrong = {"error": 0.5, "allowed": 0.1, "tensor": "first: y", "worst": "[1, 2]: 3, should be 4"}
    return CheckReport(
        tried=[
            tried(found=result(error=0.02, allowed=0.1)),
            tried(found=result("lora/gradient/float32/warm", Outcome.FAIL, **wrong, policy="noise-floor: 2 x")),
            tried(found=result("lora/merge/float32/warm", Outcome.FAIL, **wrong), defect="acme-wrong"),
            tried(
                found=result("lora/attach/float32/init", Outcome.SKIPPED, detail="unsupported: no Conv2d"),
                execution=Execution.UNSUPPORTED,
            ),
            tried("ghost", result("lora/alive/-/-", Outcome.FAIL, detail="the process died of SIGSEGV"), dtype="-"),
            tried(EVIL, result("lora/forward/float32/warm", Outcome.FAIL, detail=EVIL), case=EVIL),
        ],
        skipped={"absent lora": "needs absent, which cannot be imported"},
        complaints=["known defect acme-gone did not show with acme 2: mended there, or the check went blind"],
        broken={"torn": "SyntaxError: oh"},
        defects=[known],
        software={"acme": "1.4"},
    )


# ---- the terminal


def test_the_terminal_ends_with_commands_that_explain_and_repeat_the_first_failure(report: CheckReport) -> None:
    def last(options: list[str] | None, **changed: Any) -> list[str]:
        outcomes = [one.model_copy(update=changed) for one in report.tried]
        return check_terminal.lines(dataclasses.replace(report, tried=outcomes, options=options))[-3:]

    # The first failure that no known defect explains, in the fixture: `gradient` of the implementation `acme`.
    title, explain = "next, for the first failure:", "  peft-harness explain gradient"
    again, case = "  peft-harness check acme", "--case 'rank=3 63x128x48 float32'"
    assert last([]) == [title, explain, f"{again} --method lora {case}"]
    assert last(["--wide"]) == [title, explain, f"{again} --method lora --wide {case}"]
    assert last(["--case rank"]) == [title, explain, f"{again} --method lora --case rank"]
    assert last(["--drawn 5 --seed 0"])[2] == f"{again} --method lora --drawn 5 --seed 0 {case}"
    assert last([], dtype="-")[2] == f"{again} --method lora"
    assert last([], kind="operation", target="lora_linear")[2] == f"{again} --op lora_linear {case}"
    assert last([], kind="loader", target="adapter_files")[2] == f"{again} --method adapter_files {case}"
    assert title not in last(None)
    assert title not in last([], environment="acme 1.4")
    passed = dataclasses.replace(report, tried=report.tried[:1], options=[])
    assert title not in check_terminal.lines(passed)


def test_the_terminal_says_before_the_counts_what_failing_cases_have_in_common(report: CheckReport) -> None:
    wrong = [
        tried(name, result("lora/gradient/float32/warm", Outcome.FAIL), case=f"rank={rank}", settings={"rank": rank})
        for name in ("acme", EVIL)
        for rank in (1, 2)
    ]
    of_cases = dataclasses.replace(report, tried=[*report.tried, *wrong], options=[])
    shown = check_terminal.lines(of_cases)
    counts = next(index for index, line in enumerate(shown) if "failed" in line and "passed" in line)
    assert shown[counts - 2 : counts] == [
        "acme lora: gradient fails in every case (2)", f"{EVIL} lora: gradient fails in every case (2)",
    ]  # fmt: skip
    assert "acme lora: gradient fails in every case (2)" in Page(check_page.render(of_cases)).text
    assert [one["failing"] for one in of_cases.document()["in_common"]] == [2, 2]
    of_a_loop = dataclasses.replace(of_cases, options=None)  # its cases have no settings
    assert not [line for line in check_terminal.lines(of_a_loop) if "every case" in line]
    assert "in_common" not in of_a_loop.document()


def test_failures_of_one_check_share_a_line(report: CheckReport) -> None:
    def wrong(check: str, rank: int, **more: Any) -> CheckOutcome:
        return tried(found=result(f"lora/{check}/float32/warm", Outcome.FAIL, **more), case=f"rank={rank}")

    measured = [wrong(check, rank, error=rank, allowed=0.1) for check in ("gradient", "outputs") for rank in (1, 2, 3)]
    without_error = [wrong("alive", rank, detail=f"raised on rank {rank}") for rank in (1, 2)]
    found = dataclasses.replace(report, tried=[*measured, *without_error], options=None)
    assert [line for line in check_terminal.lines(found) if line.startswith("FAIL acme lora/")] == [
        "FAIL acme lora/gradient/float32/warm (rank=1) and 2 more: error 1, allowed 0.1",
        "FAIL acme lora/outputs/float32/warm (rank=1) and 2 more: error 1, allowed 0.1",
        "FAIL acme lora/alive/float32/warm (rank=1): raised on rank 1",
        "FAIL acme lora/alive/float32/warm (rank=2): raised on rank 2",
    ]
    assert len(found.document()["checks"]) == 8


def test_the_matrix_marks_a_row_that_was_interrupted(report: CheckReport) -> None:
    stopped = dataclasses.replace(report, tried=report.tried[:1], skipped={"acme lora": "interrupted after 1 check"})
    title, row, *_ = check_terminal.matrix(stopped)
    assert (title.split(), row.split()) == (
        ["target", "implementation", "float32"],
        ["lora", "acme", "(interrupted)", "ok", "0.20"],
    )


def test_the_terminal_says_why_a_check_is_skipped(report: CheckReport) -> None:
    said = "a check is skipped in a case to which it does not apply; --json and --html give each reason"
    skipped = tried(found=result("lora/dropout/float32/warm", Outcome.SKIPPED, detail="the config has no dropout"))
    assert said in check_terminal.lines(dataclasses.replace(report, tried=[*report.tried, skipped]))
    assert said not in check_terminal.lines(report)  # no check is skipped; one is unsupported


def test_the_terminal_says_why_cases_of_a_single_implementation_are_unsupported(report: CheckReport) -> None:
    unsupported = [
        tried(
            found=result("lora/initial/float32/init", Outcome.SKIPPED, detail=f"unsupported: no {what}"),
            execution=Execution.UNSUPPORTED,
        )
        for what in ("experts", "experts", "embeddings")
    ]
    said = ["lora: 2 checks unsupported: no experts", "lora: 1 check unsupported: no embeddings"]
    alone = check_terminal.lines(dataclasses.replace(report, tried=unsupported))
    assert [line for line in alone if "unsupported:" in line] == said
    others = check_terminal.lines(dataclasses.replace(report, tried=[*unsupported, tried("another")]))
    assert not [line for line in others if "unsupported:" in line]


def test_a_long_list_of_failing_checks_is_cut(report: CheckReport) -> None:
    several = [
        tried(found=result(f"lora/check{number}/float32/warm", Outcome.FAIL), case=str(rank), settings={"rank": rank})
        for number in range(20)
        for rank in (1, 2)
    ]
    shown = check_terminal.lines(dataclasses.replace(report, tried=several, options=[]))
    assert sum("fails in every case" in line for line in shown) == 12
    assert "... and 8 more failing checks; --json and --html list all" in shown


def test_the_report_has_the_options_that_decide_which_cases_are_tried() -> None:
    request = command.CheckRequest(
        ["reference"], operations=["double_quantize"], dtypes=["float32"], breadth=CaseSelection(drawn=1, seed=3)
    )
    assert command.judge(request).options == ["--dtype float32", "--drawn 1 --seed 3"]


# ---- the page


def test_the_page_shows_everything_with_its_numbers(report: CheckReport) -> None:
    text = Page(check_page.render(report)).text
    for part in (
        "✗ fail", "3 failed", "1 passed", "1 by known defects", "lora/gradient/float32/warm", "0.5", "first: y",
        "[1, 2]: 3, should be 4", "acme-wrong", "Merges into thin air", ">=1, here 1.4", "print('<b>wrong</b>')",
        "https://example.org/1", "the process died of SIGSEGV", "torn: SyntaxError: oh", "acme-gone did not show",
        "absent lora", "needs absent", "unsupported: no Conv2d", "pass 0.20",
    ):  # fmt: skip
        assert part in text, part


def test_the_page_is_inert_and_needs_no_network(report: CheckReport) -> None:
    page = Page(check_page.render(report))
    assert not [tag for tag, _ in page.tags if tag in ("img", "iframe", "object", "embed", "link", "base", "form", "b")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    links = page.attributes("href")
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert [link for link in links if not link.startswith("#")] == ["https://example.org/1"]


def test_a_link_that_is_no_web_address_is_text(report: CheckReport) -> None:
    evil = report.defects[0].model_copy(update={"link": "javascript:alert(1)"})
    changed = CheckReport(**{**vars(report), "defects": [evil]})
    page = Page(check_page.render(changed))
    assert "javascript:alert(1)" in page.text
    assert not [link for link in page.attributes("href") if not link.startswith("#")]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"interrupted": True}, "interrupted"),
        ({"tried": [], "complaints": [], "broken": {}}, "nothing compared"),
        ({"tried": [tried()], "complaints": [], "broken": {}}, "✓ pass"),
    ],
)
def test_the_page_says_what_came_of_it(report: CheckReport, change: dict, word: str) -> None:
    assert word in Page(check_page.render(CheckReport(**{**vars(report), **change}))).text


# ---- JUnit


def test_junit_has_a_case_of_everything(report: CheckReport) -> None:
    root = ET.fromstring(check_junit.render(report))
    cases = {case.get("name"): case for case in root.iter("testcase")}
    assert len(cases) == len(report.tried) + 3
    failed = cases["lora/gradient/float32/warm (rank=3 63x128x48)"].find("failure")
    assert failed is not None
    assert failed.get("message", "").startswith("error 0.5, allowed 0.1; first: y [1, 2]: 3, should be 4")
    known = cases["lora/merge/float32/warm (rank=3 63x128x48)"].find("skipped")
    assert known is not None
    assert known.get("message", "").startswith("known defect acme-wrong: error 0.5")
    assert cases["torn"].find("error") is not None
    assert cases["acme-gone"].find("failure") is not None
    assert cases["absent lora"].find("skipped") is not None
    assert list(cases["lora/forward/float32/warm (rank=3 63x128x48)"]) == []
    acme = next(suite for suite in root if suite.get("name") == "lora by acme")
    assert [acme.get(key) for key in ("tests", "failures", "errors", "skipped")] == ["4", "1", "0", "2"]


# ---- the terminal


def test_a_field_holds_the_worst_and_a_crash_is_in_all_of_them(report: CheckReport) -> None:
    rows = summary.rows(report.tried)
    field = {
        name: summary.format_field(summary.summarise(summary.select_dtype(one, "float32")))
        for (_, name), one in rows.items()
    }
    assert field == {"acme": "FAIL 1/3", "ghost": "FAIL 1/1", EVIL: "FAIL 1/1"}
    assert summary.format_field(summary.summarise([report.tried[0]])) == "ok 0.20"
    assert summary.format_field(summary.summarise([report.tried[2]])) == "defect 1/1"
    assert summary.format_field(summary.summarise([report.tried[3]])) == "unsupported"
    assert summary.format_field(None) == "-"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, Exit.FAIL),
        ({"tried": [tried()]}, Exit.FAIL),  # a broken plug-in and a complaint are left
        ({"tried": [tried()], "complaints": []}, Exit.FAIL),
        ({"tried": [tried()], "broken": {}}, Exit.FAIL),
        ({"tried": [tried()], "broken": {}, "complaints": []}, Exit.PASS),
        ({"tried": [], "broken": {}, "complaints": []}, Exit.NOTHING_COMPARED),
        ({"tried": [], "broken": {}, "complaints": [], "untried": ["absent"]}, Exit.INFRASTRUCTURE),
        ({"tried": [tried()], "broken": {}, "complaints": [], "untried": ["absent"]}, Exit.INFRASTRUCTURE),
        ({"tried": [tried(found=result(outcome=Outcome.FAIL), defect="x")], "broken": {}, "complaints": []}, Exit.PASS),
        ({"interrupted": True}, Exit.INFRASTRUCTURE),
    ],
)
def test_exit_codes(report: CheckReport, change: dict, code: Exit) -> None:
    assert CheckReport(**{**vars(report), **change}).exit is code


def test_everything_is_written_at_once(fork_sandbox: ForkSandbox) -> None:
    done = fork_sandbox.command(
        "check", "reference", "--method", "frozen", "--json", "--junit", "a.xml", "--html", "a.html"
    )
    assert done.code == Exit.PASS, done.err
    document = json.loads(done.out)
    assert document["exit"] == 0
    assert {row["standing"] for row in document["checks"]} <= {"pass", "skipped"}
    assert "torch" in document["software"]
    assert len(list(ET.parse(fork_sandbox.folder / "a.xml").iter("testcase"))) == len(document["checks"])
    assert "frozen" in Page((fork_sandbox.folder / "a.html").read_text(encoding="utf-8")).text
    assert "checked frozen by reference" in done.err


def test_a_case_is_tried_alone(fork_sandbox: ForkSandbox) -> None:
    done = fork_sandbox.command(
        "check", "reference", "--method", "frozen", "--op", "double_dequantize", "--case", "blocks=1 ", "--json"
    )
    document = json.loads(done.out)
    assert {row["case"] for row in document["checks"]} == {"blocks=1"}
    assert [*document["skipped"]] == ["reference frozen"]
    assert "no case that these options try has 'blocks=1 ' in its name" in document["skipped"]["reference frozen"]
    assert done.code == Exit.PASS


def test_a_text_that_no_case_contains_is_said(fork_sandbox: ForkSandbox) -> None:
    done = fork_sandbox.command("check", "reference", "--op", "double_dequantize", "--case", "rank=160")
    assert done.code == Exit.INFRASTRUCTURE
    assert "not checked: reference double_dequantize: no case that these options try has 'rank=160'" in done.out
    assert "requested, but not tried: reference" in done.out


def test_each_case_is_in_exactly_one_shard(fork_sandbox: ForkSandbox) -> None:
    asked = "check", "reference", "--op", "double_dequantize", "--json"

    def tried(*options: str) -> list[tuple[str, str]]:
        document = json.loads(fork_sandbox.command(*asked, *options).out)
        assert document["options"] == ([" ".join(options)] if options else [])
        return [(row["case"], row["result"]["check"]) for row in document["checks"]]

    shards = [tried("--shard", f"{number}/3") for number in (1, 2, 3)]
    assert all(shards)
    assert sorted(itertools.chain(*shards)) == sorted(tried())


def test_a_shard_without_a_case_is_said(fork_sandbox: ForkSandbox) -> None:
    done = fork_sandbox.command("check", "reference", "--op", "double_dequantize", "--shard", "1/1000000")
    assert done.code == Exit.PASS  # so that no machine of several fails without a cause
    assert "not checked: reference double_dequantize: no case of this target is in shard 1 of 1000000" in done.out
    done = fork_sandbox.command(
        "check", "reference", "--op", "double_dequantize", "--shard", "1/2", "--case", "rank=160"
    )
    assert done.code == Exit.INFRASTRUCTURE
    assert "no case that these options try has 'rank=160'" in done.out


def test_one_check_is_tried_alone(fork_sandbox: ForkSandbox) -> None:
    asked = "check", "reference", "--op", "double_dequantize", "--method", "frozen", "--json"
    document = json.loads(fork_sandbox.command(*asked, "--check", "outputs", "--check", "written").out)
    names = {row["result"]["check"].split("/")[1] for row in document["checks"]}
    assert names == {"outputs", "written"}
    of_frozen = ", ".join(parity_suite.load_plan("frozen").checks)
    assert document["skipped"] == {"reference frozen": "it has no check outputs or written; its checks: " + of_frozen}
    assert document["complaints"] == []


def test_a_check_that_needs_wide_is_said(fork_sandbox: ForkSandbox) -> None:
    done = fork_sandbox.command("check", "reference", "--method", "lora", "--check", "walk")
    assert done.code == Exit.INFRASTRUCTURE
    assert "not checked: reference lora: the check walk does not run with these options; add --wide" in done.out


# ---- wrong use


@pytest.mark.slow
def test_every_unknown_name_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["check", "hf-pfet", "myplugin", "--method", "lorra", "--op", "nf4_quantise", "--dtype", "float8"])
    said = capsys.readouterr().err
    assert code == Exit.USAGE
    assert "5 mistakes" in said
    for what, hint in (
        ("check: unknown implementation 'hf-pfet'", "did you mean `hf-peft`? `peft-harness list implementations`"),
        ("check: unknown implementation 'myplugin'", "add an entry point of the group harness.implementations"),
        ("--method: unknown method 'lorra'", "did you mean `lora`? `peft-harness list methods bases` shows all"),
        ("--op: unknown operation 'nf4_quantise'", "did you mean `nf4_quantize`? `peft-harness list operations` shows"),
        ("--dtype: unknown dtype 'float8'", "did you mean `float64`?"),
    ):
        assert what in said
        assert hint in said.partition(what)[2].splitlines()[1]


@pytest.mark.slow
def test_the_name_of_a_check_is_no_implementation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "shared_input"]) == Exit.USAGE
    said = capsys.readouterr().err
    assert "'shared_input' is a check, not an implementation" in said
    assert "`peft-harness explain shared_input`" in said


def test_an_unknown_name_may_be_of_an_entry_point_that_could_not_be_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = Implementation("acme", "operation", "nf4_dequantize", print)
    found = Registry((one,), {"b4": "TypeError: name must be a word", "torn": "SyntaxError: oh"})
    monkeypatch.setattr(command.worker_processes, "discover", lambda *_: found)
    assert main(["check", "wexit"]) == Exit.USAGE
    said = capsys.readouterr().err
    assert "'wexit'\n  hint: there are: acme;" in said  # entry points are no implementations
    assert "could not be loaded: `b4` (TypeError: name must be a word), `torn` (SyntaxError: oh)" in said


@pytest.mark.slow
def test_where_nothing_is_broken_an_unknown_name_says_nothing_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "wexit"]) == Exit.USAGE
    assert "could not be used" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("offers", "dtypes", "said"),
    [
        (("float32", "bfloat16"), ("bfloat16",), "its parity suite has cases in float32 only; requested: bfloat16"),
        (("bfloat16", "float16"), (), "offers bfloat16, float16; its parity suite has cases in float32"),
        (
            ("bfloat16",),
            ("bfloat16", "float32"),
            "offers bfloat16; of the requested dtypes, its parity suite has cases in float32",
        ),
    ],
)
def test_why_no_dtype_is_left_to_try(
    offers: tuple[str, ...],
    dtypes: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = Implementation("acme", "operation", "double_dequantize", print, dtypes=offers)
    monkeypatch.setattr(command.worker_processes, "discover", lambda *_: Registry((one,)))
    asked = itertools.chain.from_iterable(("--dtype", dtype) for dtype in dtypes)
    assert main(["check", "acme", *asked]) == Exit.INFRASTRUCTURE
    assert f"not checked: acme double_dequantize: {said}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "option"), [("double_dequantize", "--op double_dequantize"), ("qlora", "--method qlora")]
)
def test_what_runs_on_a_gpu_only_is_left_out_with_the_command_for_a_gpu(
    target: str, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = "method" if target == "qlora" else "operation"
    one = Implementation("acme", kind, target, print, devices=("cuda",))
    monkeypatch.setattr(command.worker_processes, "discover", lambda *_: Registry((one,)))
    assert main(["check", "acme"]) == Exit.INFRASTRUCTURE
    out = capsys.readouterr().out
    assert f"not checked: acme {target}: runs on cuda only" in out
    assert f"`peft-harness check acme {option} --device cuda`" in out


def test_a_target_whose_process_died_was_not_tried_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    target = ("acme", "method", "lora")

    def events(*_: object) -> list[object]:
        return [protocol.TargetBegun(begin=target), protocol.Died(died="the process died of SIGSEGV")]

    monkeypatch.setattr(command.worker_processes, "worker_events", events)
    task = protocol.WorkerTask(point="acme", targets=[target])
    (found,), interrupted = command.worker_processes.run([task], WorkerPool(), 1, lambda _: None)
    assert not interrupted
    assert found.not_tried == {target}
    assert [one.check for one in found.tried] == ["alive"]


def test_the_targets_of_one_entry_point_are_shared_out_among_the_jobs() -> None:
    several = [Implementation("acme", "method", name, print) for name in ("lora", "dora", "vera", "pissa")]
    sizes = {"lora": 9, "dora": 4, "vera": 3, "pissa": 2}
    assert [[one.target for one in part] for part in check_tasks._parts(several, 2, sizes)] == [
        ["lora"], ["dora", "vera", "pissa"],
    ]  # fmt: skip
    assert [len(part) for part in check_tasks._parts(several, 9, sizes)] == [1, 1, 1, 1]
    assert len(check_tasks._parts(several, 1, sizes)) == 1


@pytest.mark.parametrize("forks", [True, False])
def test_no_task_is_larger_than_its_share_if_it_costs_little_to_start_a_process(
    forks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.worker_processes, "forks", lambda _: forks)
    names = ("lora", "dora", "vera", "pissa", "adalora", "qlora")
    offered = [Implementation("acme", "method", name, print, dtypes=DTYPES, point="acme") for name in names]
    plans = {name: parity_suite.load_plan(name) for name in names}
    tasks, skipped = check_tasks.tasks(offered, command.CheckRequest(), plans, 2)
    assert not skipped
    assert sorted(target for task in tasks for *_, target in task.targets) == sorted(names)
    assert len(tasks) == (6 if forks else 2)


@pytest.mark.parametrize(
    ("request_", "left_out"),
    [
        (command.CheckRequest(), True),
        (command.CheckRequest(methods=["lora"]), True),
        (command.CheckRequest(["reference"]), False),
        (command.CheckRequest(breadth=CaseSelection(wide=True)), False),
        (command.CheckRequest(breadth=CaseSelection(case="rank=3")), False),
        (command.CheckRequest(dtypes=["bfloat16"]), False),
    ],
    ids=["usual", "method", "named", "wide", "case", "dtype"],
)
def test_only_a_reference_that_nobody_names_is_left_out(request_: command.CheckRequest, left_out: bool) -> None:
    names = ("reference", "acme")
    offered = [Implementation(name, "method", "lora", print, dtypes=DTYPES, point=name) for name in names]
    tasks, skipped = check_tasks.tasks(offered, request_, {"lora": parity_suite.load_plan("lora")}, 1)
    assert [task.targets[0][0] for task in tasks] == ["acme"] if left_out else ["reference", "acme"]
    assert {task.breadth for task in tasks} == {request_.breadth}
    assert [*skipped] == ["reference"] * left_out


def test_a_reference_without_any_other_implementation_is_tried() -> None:
    offered = [Implementation("reference", "method", "lora", print, dtypes=DTYPES, point="reference")]
    tasks, skipped = check_tasks.tasks(offered, command.CheckRequest(), {"lora": parity_suite.load_plan("lora")}, 1)
    assert len(tasks) == 1
    assert not skipped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["loralib", "--method", "dora"], "loralib does not offer dora, only lora"),
        (["lora"], "did you mean `--method lora`? `peft-harness list methods bases` shows all"),
        (["lora_linaer"], "did you mean `--op lora_linear`? `peft-harness list operations` shows all"),
        (["peft"], "did you mean `hf-peft`?"),  # not the Method `peft`, which nothing can check
        (["--op", "lora"], "did you mean `--method lora`?"),
        (["--method", "nf4_dequantise"], "did you mean `--op nf4_dequantize`?"),
        (["--method", "hf-peft"], "did you mean `check hf-peft`?"),
        (
            ["loralib", "--method", "lora", "--op", "galore_step"],
            "none of the named implementations offers galore_step",
        ),
        (["./layer.py"], "decorate a function in it with @conformance"),
        (["layer.py"], "layer.py: is a Python file, not an implementation"),
    ],
)
def test_names_in_the_wrong_place_are_said(asked: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *asked]) == Exit.USAGE
    assert said in capsys.readouterr().err


def test_an_entry_point_in_the_wrong_group_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[harness.plugins]\nacme = acme:implementations\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["check", "acme"]) == Exit.USAGE
    assert "entry points in groups that are not read: `acme` is in harness.plugins" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--jobs", "0"],
        ["--patience", "0"],
        ["--patience", "nan"],
        ["--patience", "soon"],
        ["--jobs", "many"],
        ["--deep"],
        ["--case", ""],
        ["--loop", "trl", "--case", "rank=3"],
        ["--self-test", "--case", "rank=3"],
        ["--case", "rank=3", "./adapter"],
        ["--check", "no-such-check"],
        ["--check", "walk", "./adapter"],
        ["--loop", "trl", "--check", "walk"],
        ["--self-test", "--check", "walk"],
        ["--served", "http://127.0.0.1:1", "--case", "rank=3"],
        *(["--shard", odd] for odd in ("0/3", "4/3", "2", "1/", "-1/3", "1/3.5")),
        ["--shard", "1/2", "--drawn", "5"],
        ["--shard", "1/2", "./adapter"],
        ["--self-test", "--shard", "1/2"],
    ],
)
def test_a_wrong_option_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *wrong]) == Exit.USAGE
    assert wrong[0] in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "judge", lambda asked: pytest.fail("it worked first"))
    there = tmp_path / "both"
    assert main(["check", "--junit", str(tmp_path / "no" / "a.xml"), "--html", "/nowhere/a.html"]) == Exit.USAGE
    said = capsys.readouterr().err
    assert f"there is no folder {tmp_path / 'no'}" in said
    assert "there is no folder /nowhere" in said
    assert main(["check", "--junit", str(there), "--html", str(there)]) == Exit.USAGE
    assert "both name " in capsys.readouterr().err
    assert main(["check", "--html", str(tmp_path / "notes.txt")]) == Exit.USAGE
    assert "notes.txt is no .html file" in capsys.readouterr().err
    assert main(["check", "--junit", "/dev/null"]) == Exit.USAGE
    assert "--junit: /dev/null is no regular file" in capsys.readouterr().err
    monkeypatch.setattr(files.tempfile, "TemporaryFile", lambda dir: (_ for _ in ()).throw(OSError(30, "Read-only")))
    assert main(["check", "--html", str(there)]) == Exit.USAGE
    assert f"--html: {there}: cannot write in {tmp_path}: Read-only" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_after_all_loses_neither_findings_nor_the_other_file(
    report: CheckReport, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, there = tmp_path / "gone" / "a.html", tmp_path / "a.xml"
    page.parent.mkdir()

    def judge(asked: command.CheckRequest) -> CheckReport:
        page.parent.rmdir()
        return report

    monkeypatch.setattr(command, "judge", judge)
    assert main(["check", "--junit", str(there), "--html", str(page)]) == Exit.INFRASTRUCTURE
    captured = capsys.readouterr()
    assert "lora/gradient/float32/warm" in captured.out
    assert str(page) in captured.err
    assert there.is_file()


PARITY = """
method: frozen
checks: [layers, forwards]
states: [init, hot]
configs: [{}]
shapes:
  - {tokens: 0, in: 128, out: 48}
dtypes: [float32, float8]
tolerances: {gradient: {factor: 3, because: short}}
"""
DEFECTS = """
defects:
  - {id: Bad Id, library: peft, versions: new, implementation: hf-peft, checks: [], summary: short, reproduction: x.py}
"""
NAMED = """
defects:
  - &one
    {id: one, library: peft, versions: ">=0.1", implementation: hf-peft, checks: [lora/forwards/*/*], summary: does it wrong,
     reproduction: absent.py}
  - *one
"""


@pytest.fixture
def suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Return a function that changes one file of a copy of the parity suites."""
    copy = tmp_path / "suites"
    shutil.copytree(resources.data_folder("suites"), copy)
    for module in (parity_suite, defects):
        monkeypatch.setattr(module, "data_folder", lambda name: copy)
    defects.known.cache_clear()

    def change(file: str, text: str) -> Path:
        (copy / "parity" / file).write_text(text, encoding="utf-8")
        return copy / "parity" / file

    yield change
    defects.known.cache_clear()


@pytest.mark.slow
def test_all_mistakes_of_all_files_are_said_at_once(suites, capsys: pytest.CaptureFixture[str]) -> None:
    suites("frozen.yaml", PARITY)
    suites("defects/known.yaml", DEFECTS)
    assert main(["check", "reference", "--method", "frozen"]) == Exit.USAGE
    captured = capsys.readouterr()
    for place, part in (
        ("frozen.yaml:4", "hot"), ("frozen.yaml:7", "tokens"), ("frozen.yaml:8", "float8"), ("frozen.yaml:9", "because"),
        ("known.yaml:3", "id"), ("known.yaml:3", "versions"), ("known.yaml:3", "checks"), ("known.yaml:3", "summary"),
    ):  # fmt: skip
        assert any(place in line and part in line for line in captured.err.splitlines()), (place, part, captured.err)
    assert captured.out == ""


@pytest.mark.slow
def test_names_that_a_parity_suite_gets_wrong_are_suggested(suites, capsys: pytest.CaptureFixture[str]) -> None:
    suites("frozen.yaml", PARITY.replace("hot", "warm").replace("tokens: 0", "tokens: 1").replace(", float8", "")
           .replace("because: short", "because: it is not short"))  # fmt: skip
    suites("defects/known.yaml", NAMED)
    assert main(["check", "reference", "--method", "frozen"]) == Exit.USAGE
    said = capsys.readouterr().err
    for part in (
        "no check is called 'forwards'", "did you mean `forward`?",
        "a tolerance for 'gradient', a check that this suite does not try", "the id one is used twice",
        "'lora/forwards/*/*' names no check", "no file absent.py",
    ):  # fmt: skip
        assert part in said, part


# ---- Ctrl-C

_HANGS = """
import time
from harness import implements

@implements("frozen", name="hangs")
def implementations(model, config, generator):
    open({started!r}, "w").close()
    time.sleep(600)
"""


def _slow_plugin(sandbox: Sandbox, code: str) -> Path:
    """Offer a plug-in with this code to the sandbox's command. Return the file that the plug-in creates when it starts."""
    site = Path(sandbox.environment["PYTHONPATH"].split(":")[0])
    info = site / "slow-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slow\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        "[harness.implementations]\nslow = slow_plugin:implementations\n", encoding="utf-8"
    )
    started = sandbox.folder / "started"
    (site / "slow_plugin.py").write_text(code.format(started=str(started)), encoding="utf-8")
    return started


@pytest.mark.parametrize("asked", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)])
def test_ctrl_c_prints_what_was_found_and_ends_the_workers(sandbox: Sandbox, asked: signal.Signals) -> None:
    started = _slow_plugin(sandbox, _HANGS)
    process = sandbox.start("check", "reference", "hangs", "--method", "frozen", "--json", "--jobs", "1")
    eventually(started.exists, "the plug-in hangs")
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(asked)
    done = sandbox.finish(process)
    assert done.code == Exit.INFRASTRUCTURE, done.err
    document = json.loads(done.out)
    assert document["interrupted"]
    assert {row["implementation"] for row in document["checks"] if row["standing"] == "pass"} == {"reference"}
    assert not [row for row in document["checks"] if row["standing"] == "fail"]
    assert document["skipped"] == {"hangs frozen": "interrupted after 0 checks"}
    eventually(lambda: not any(child.is_running() for child in children), "the workers are gone")


_HANGS_ON_IMPORT = """
import time
open({started!r}, "w").close()
time.sleep(600)
"""


def test_ctrl_c_while_plug_ins_are_imported_ends_all_processes(sandbox: Sandbox) -> None:
    started = _slow_plugin(sandbox, _HANGS_ON_IMPORT)
    process = sandbox.start("check", "reference", "--method", "frozen")
    eventually(started.exists, "the plug-in hangs")
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGINT)
    done = sandbox.finish(process)
    assert done.code == Exit.INFRASTRUCTURE, done.err
    assert "Traceback" not in done.err
    eventually(lambda: not any(child.is_running() for child in children), "the processes are gone")


def test_a_wrong_name_leaves_no_process(sandbox: Sandbox) -> None:
    process = sandbox.start("check", "nobody", "--method", "frozen")
    command = psutil.Process(process.pid)
    children = set[psutil.Process]()

    def has_ended() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            children.update(command.children(recursive=True))
        return process.poll() is not None

    eventually(has_ended, "the command ends")
    assert process.returncode == Exit.USAGE, sandbox.finish(process).err
    assert children
    eventually(lambda: not any(child.is_running() for child in children), "the processes are gone")


STALE = """
defects:
  - {id: narrow, library: torch, versions: ">=1", implementation: reference, checks: [frozen/layers/float32/*],
     summary: does it all wrong, reproduction: absent.py}
  - {id: every-dtype, library: torch, versions: ">=1", implementation: reference, checks: [frozen/layers/*/*],
     summary: does it all wrong, reproduction: absent.py}
  - {id: other-too, library: torch, versions: ">=1", implementation: reference, summary: does it all wrong,
     checks: [frozen/layers/float32/*, full/layers/float32/*], reproduction: absent.py}
"""


@pytest.mark.usefixtures("forks")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "complained"),
    [
        (["--method", "frozen"], {"narrow", "every-dtype"}),
        (["--method", "frozen", "--dtype", "float32"], {"narrow"}),
        (["--method", "frozen", "--case", "float32"], set()),
        (["--method", "frozen", "--check", "layers"], set()),
        (["--method", "frozen", "--shard", "1/2"], set()),
        (["--method", "frozen", "--method", "full", "--dtype", "float32"], {"narrow", "other-too"}),
    ],
)
def test_a_defect_is_missed_only_where_all_its_cases_were_tried(
    suites, asked: list[str], complained: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    suites("defects/absent.py", SCRIPT)
    suites("defects/known.yaml", STALE)
    assert main(["check", "reference", *asked, "--json"]) == (Exit.FAIL if complained else Exit.PASS)
    assert {line.split()[2] for line in json.loads(capsys.readouterr().out)["complaints"]} == complained


@pytest.mark.usefixtures("forks")
def test_a_mistake_in_the_suite_of_another_method_does_not_matter(suites) -> None:
    suites("vera.yaml", "checks: [\n")
    assert main(["check", "reference", "--method", "frozen"]) == Exit.PASS


def test_a_killed_check_takes_its_workers_along(sandbox: Sandbox) -> None:
    started = _slow_plugin(sandbox, _HANGS)
    process = sandbox.start("check", "hangs", "--method", "frozen", "--jobs", "1")
    eventually(started.exists, "the plug-in hangs")
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2  # the worker, and who watches over it
    process.kill()
    process.wait()
    eventually(lambda: not any(child.is_running() for child in children), "the workers are gone")


# ---- explain


@pytest.mark.parametrize("check", ["gradient", "codes", "outputs"])
def test_explain_gives_a_check_a_command_that_tries_it(check: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", check]) == Exit.PASS
    said = capsys.readouterr().out
    (line,) = [line.split() for line in said.splitlines() if line.strip().startswith("peft-harness check ")]
    option, target = next((o, t) for o, t in itertools.pairwise(line) if o in ("--method", "--op"))
    plan = parity_suite.load_plan(target)
    assert check in plan.checks
    assert isinstance(plan, parity_suite.OperationSuite) == (option == "--op")
    assert "float32" in plan.dtypes


def test_explain_tells_a_known_defect(suites, capsys: pytest.CaptureFixture[str]) -> None:
    known = NAMED.replace("forwards", "forward").replace("  - *one\n", "").replace("does it wrong", "does it all wrong")
    file = suites("defects/known.yaml", known)
    suites("defects/absent.py", SCRIPT)
    assert main(["explain", "one"]) == Exit.PASS
    said = capsys.readouterr().out
    for part in (
        "known defect one", "does it all wrong", "library: peft >=0.1", f"python {file.with_name('absent.py')}",
        "peft-harness check hf-peft --method lora",
    ):  # fmt: skip
        assert part in said


@pytest.mark.parametrize(("name", "wide"), [("walk", True), ("nonfinite", False), ("gradient", False)])
def test_the_example_of_a_check_runs_it(name: str, wide: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", name]) == Exit.PASS
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.lstrip().startswith("peft-harness check ")
    assert command.endswith(" --wide") is wide


def test_a_mistake_among_the_defects_does_not_silence_the_rest(suites) -> None:
    suites("defects/known.yaml", DEFECTS)
    assert main(["explain", "gradient"]) == Exit.PASS
    assert main(["explain", "acme-wrong"]) == Exit.USAGE
