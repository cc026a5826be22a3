"""pytest's `--harness-gate`: verdicts, undecided benchmarks, output and exit codes of a session."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy  # noqa: F401  # it can be loaded once only, and a session in this process forgets what it loaded
import pytest
import scipy.special  # noqa: F401

from harness import pytest_plugin
from harness.analysis.comparison.baseline_rows import GateResult, RowKind
from harness.analysis.verdict_kind import VerdictKind
from harness.bench import pytest_benchmark
from harness.bench.pytest_benchmark import Saved
from harness.errors import UsageError
from harness.regression.benchmarks import SessionResults, compare
from support.process_rounds import FIVE, rounds

pytest_plugins = ["pytester"]
HERE = {"cpu": "an EPYC", "python": "CPython 3.11.7", "torch": "2.9.1"}
KERNEL, OTHER = "test_k.py::test_kernel", "test_k.py::test_other"


# ---- a session against saved runs


def saved_runs(*names: str, place: dict[str, str] | None = None) -> list[Saved]:
    place = HERE if place is None else place
    return [Saved(Path(f"{i}.json"), place, dict.fromkeys(names, run)) for i, run in enumerate(FIVE)]


def session(**changes: object) -> SessionResults:
    return SessionResults(
        **{"place": HERE, "rounds": {KERNEL: rounds(1e-3)}, "absent": {}, "cases_passed": 4} | changes
    )  # type: ignore[arg-type]


def words(found: GateResult) -> list[tuple[RowKind, VerdictKind]]:
    return [(row.kind, row.word) for row in found.rows]


def test_a_correct_session_that_is_not_slower_passes() -> None:
    found = compare(saved_runs(KERNEL), session())
    assert words(found) == [(RowKind.SPEED, VerdictKind.PASS)]
    assert found.verdict.word is VerdictKind.PASS
    assert found.verdict.reason == (
        "1 of 1 benchmarks not slower (by more than 10 %, each at a level of 1 %); @conformance: 4 cases passed"
    )


def test_the_verdict_names_a_slower_benchmark() -> None:
    both = {KERNEL: rounds(1e-3), OTHER: rounds(1.3e-3)}
    found = compare(saved_runs(KERNEL, OTHER), session(rounds=both))
    assert found.verdict.word is VerdictKind.FAIL
    assert f"1 of 2 benchmarks slower (by more than 10 %, each at a level of 1 %): {OTHER}" in found.verdict.reason


def test_no_speed_is_a_pass_without_parity() -> None:
    found = compare(saved_runs(KERNEL), session(cases_failed=1))
    assert words(found) == [(RowKind.PARITY, VerdictKind.FAIL), (RowKind.SPEED, VerdictKind.INCONCLUSIVE)]
    assert found.verdict.word is VerdictKind.FAIL
    assert "no benchmark passes without parity: 1 case of @conformance failed" in found.verdict.reason
    found = compare(
        saved_runs(KERNEL, OTHER), session(failed=frozenset([OTHER]), rounds={KERNEL: FIVE[0], OTHER: FIVE[0]})
    )
    assert words(found) == [(RowKind.SPEED, VerdictKind.PASS), (RowKind.OUTCOME, VerdictKind.FAIL)]
    assert found.verdict.word is VerdictKind.FAIL
    assert "no case of @conformance ran" in compare(saved_runs(KERNEL), session(cases_passed=0)).verdict.reason


def test_undecided_or_missing_benchmarks_do_not_pass() -> None:
    found = compare(saved_runs(KERNEL), session(rounds={KERNEL: rounds(1.1e-3)}))
    assert (found.verdict.word, f"undecided: {KERNEL}" in found.verdict.reason) == (VerdictKind.INCONCLUSIVE, True)
    found = compare(saved_runs(KERNEL, OTHER), session(absent={OTHER: "this session has no such test"}))
    assert (found.verdict.word, f"missing: {OTHER}" in found.verdict.reason) == (VerdictKind.INCONCLUSIVE, True)
    # A deselected benchmark is neither missing nor listed.
    assert words(compare(saved_runs(KERNEL, OTHER), session())) == [(RowKind.SPEED, VerdictKind.PASS)]


def test_a_new_benchmark_is_listed_and_not_judged() -> None:
    found = compare(saved_runs(KERNEL), session(rounds={KERNEL: rounds(1e-3), OTHER: rounds(9)}))
    assert words(found) == [(RowKind.SPEED, VerdictKind.PASS), (RowKind.NEW, VerdictKind.NOT_RUN)]
    assert found.verdict.word is VerdictKind.PASS


@pytest.mark.parametrize("what", HERE)
def test_times_of_another_machine_python_or_torch_are_not_compared(what: str) -> None:
    found = compare(saved_runs(KERNEL, place=HERE | {what: "another"}), session(rounds={KERNEL: rounds(9)}))
    assert found.verdict.word is VerdictKind.NOT_RUN
    assert "nothing was compared; saved on another machine only: " + KERNEL in found.verdict.reason
    assert f"{what}: another, here {HERE[what]}" in found.rows[0].reason


def test_saved_runs_of_another_machine_are_left_out_and_named() -> None:
    mixed = [*saved_runs(KERNEL), Saved(Path("x.json"), HERE | {"cpu": "a Xeon"}, {KERNEL: rounds(9)})]
    found = compare(mixed, session())
    assert words(found) == [(RowKind.SPEED, VerdictKind.PASS), (RowKind.ENVIRONMENT, VerdictKind.PASS)]
    assert "5 saved runs" in found.rows[0].reason
    assert (found.rows[1].name, found.rows[1].reason) == ("1 of 6 saved runs", "not used: cpu: a Xeon, here an EPYC")
    # A fact that a file lacks is no difference: an old pytest-benchmark does not store the cores.
    for less, more in ((HERE, HERE | {"cores": "8"}), (HERE | {"cores": "8"}, HERE)):
        assert compare(saved_runs(KERNEL, place=less), session(place=more)).verdict.word is VerdictKind.PASS


@pytest.mark.parametrize("what", ["torch", "gpu"])
def test_torch_or_a_gpu_on_one_side_only_is_another_machine(what: str) -> None:
    without = {name: value for name, value in HERE.items() if name != what}
    with_it = without | {what: "an H100"}
    for old, new, output in (
        (without, with_it, f"{what}: none in use, here an H100"),
        (with_it, without, f"{what}: an H100, here none in use"),
    ):
        found = compare(saved_runs(KERNEL, place=old), session(place=new, rounds={KERNEL: rounds(1e-4)}))
        assert found.verdict.word is VerdictKind.NOT_RUN
        assert (words(found)[0], output in found.rows[0].reason) == (
            (RowKind.ENVIRONMENT, VerdictKind.INCONCLUSIVE),
            True,
        )


def test_nothing_compared_names_what_the_baseline_has() -> None:
    found = compare(saved_runs(OTHER), session())
    assert found.verdict.word is VerdictKind.NOT_RUN
    assert f"nothing was compared: no benchmark of this session is in the baseline, which has e.g. {OTHER}" in (
        found.verdict.reason
    )


# ---- files


def file(path: Path, seconds: Sequence[float], *names: str, **machine: object) -> Path:
    """Write a file as some version of pytest-benchmark does; only a part of it is read."""
    benchmarks = [{"fullname": name, "stats": {"data": list(seconds)}} for name in names]
    pytest_plugin.pytest_benchmark_update_machine_info(machine)  # other tests of this process may have loaded torch
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": benchmarks}), encoding="utf-8")
    return path


def test_each_file_of_a_folder_is_one_process_run(tmp_path: Path) -> None:
    for number, run in enumerate(FIVE):
        file(tmp_path / "saved" / f"{number}.json", run, KERNEL)
    found = pytest_benchmark.read([tmp_path / "saved", tmp_path / "saved" / "0.json"])
    assert [saved.rounds[KERNEL] for saved in found] == FIVE


ROUND = {"fullname": "t", "stats": {"data": [1.0]}}
BAD = {
    "torn": ('{"benchmarks": [', "is not JSON"),
    "bytes": (b"\xff\xfe\x00", "is not JSON"),
    "list": ("[]", "no `benchmarks`"),
    "empty": ('{"benchmarks": []}', "no `benchmarks`"),
    "nameless": (json.dumps({"benchmarks": [{}]}), r"benchmarks\[0\]: has no `fullname`"),
    "no data": (
        json.dumps({"benchmarks": [ROUND, {**ROUND, "stats": {"median": 1}}]}),
        r"benchmarks\[1\]: t has no raw rounds",
    ),
    "infinite": (
        json.dumps({"benchmarks": [{**ROUND, "stats": {"data": [math.inf]}}]}),
        "not a list of positive seconds",
    ),
    "zero": (json.dumps({"benchmarks": [{**ROUND, "stats": {"data": [0.0]}}]}), "not a list of positive seconds"),
    "words": (json.dumps({"benchmarks": [{**ROUND, "stats": {"data": "1.0"}}]}), "not a list of positive seconds"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_baseline_is_refused_with_a_hint(tmp_path: Path, name: str) -> None:
    text, output = BAD[name]
    path = tmp_path / "bad.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=output) as caught:
        pytest_benchmark.read([path])
    assert caught.value.where.startswith(str(path))
    assert "--benchmark-json" in caught.value.hint


def test_a_missing_file_an_empty_folder_and_a_copy_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        pytest_benchmark.read([tmp_path / "nowhere.json"])
    with pytest.raises(UsageError, match="contains no JSON file"):
        pytest_benchmark.read([tmp_path])
    copies = [file(tmp_path / name, FIVE[0], KERNEL) for name in ("a.json", "b.json")]
    with pytest.raises(UsageError, match=r"same process run as .*a\.json"):
        pytest_benchmark.read(copies)


def test_a_saved_run_names_torch_and_the_gpu_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_device_name=lambda: "H100")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="9.9", cuda=cuda))
    info: dict[str, object] = {"machine": "x86_64"}
    pytest_plugin.pytest_benchmark_update_machine_info(info)
    assert pytest_benchmark.place(info) == {"architecture": "x86_64", "torch": "9.9", "gpu": "H100"}


# ---- sessions

TESTS = """
import os, time
import pytest

def busy():
    end = time.perf_counter() + 0.0002 * float(os.environ.get("SLOWER", "1"))
    while time.perf_counter() < end:
        pass

def test_kernel(benchmark):
    benchmark.pedantic(busy, rounds=150)
"""
OTHER_TESTS = """
import pytest

def test_left_out(benchmark):
    benchmark.pedantic(int, rounds=5, iterations=100)

@pytest.mark.skip
def test_skipped(benchmark):
    benchmark(int)

def test_red(benchmark):
    benchmark.pedantic(int, rounds=5, iterations=100)
    assert False
"""
# Like the tests of `@conformance`, without the case, which would import torch.
WRONG = """
from harness.conformance.findings.outcomes import CheckOutcome
from harness.records.record import CheckResult, Outcome
from harness.methods.registry import Implementation
from harness.testing import Conforming

OF = {"implementation": "mine", "kind": "operation", "target": "op", "dtype": "float32", "case": "c"}

class Wrong(Conforming):
    def cases(self):
        for number, outcome in enumerate([Outcome.FAIL, Outcome.PASS]):
            result = CheckResult(check="op/outputs/float32/call", outcome=outcome, detail="off")
            yield f"case {number}", lambda result=result: [CheckOutcome(**OF, result=result)]

wrong = Wrong(Implementation("mine", "operation", "nf4_dequantize", print, ("float32",)))
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Return a function that runs pytest in another repository, and returns the exit code and the output."""
    for name in ("PYTEST_XDIST_WORKER", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    pytester.makepyfile(test_k=TESTS)

    def run(*arguments: str) -> tuple[int, str]:
        done = pytester.runpytest_inprocess("-q", "--strict-markers", "-p", "no:cacheprovider", *arguments)
        return int(done.ret), "\n".join([*done.outlines, *done.errlines])

    return run


def line_of(name: str, output: str) -> str:
    (line,) = [line for line in output.partition("peft-harness gate")[2].splitlines() if line.split()[:1] == [name]]
    return line


@pytest.mark.slow
def test_a_kernel_with_a_busy_wait_of_thirty_per_cent_fails_the_session(
    project, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.mkdir("saved")
    for number in range(3):
        assert project(f"--benchmark-json=saved/{number}.json")[0] == pytest.ExitCode.OK
    code, output = project("--harness-gate", "saved")
    assert code == pytest.ExitCode.OK, output
    assert "3 saved runs; finds " in line_of(KERNEL, output)
    monkeypatch.setenv("SLOWER", "1.3")
    code, output = project("--harness-gate", "saved")
    assert code == pytest.ExitCode.TESTS_FAILED, output
    assert "fail: slower by more than 10 % at p = " in line_of(KERNEL, output)
    assert "1 passed" in output
    assert "::error" not in output
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert f"\n::error title=peft-harness gate%3A speed::{KERNEL}: median round" in project("--harness-gate=saved")[1]


@pytest.mark.slow
def test_a_session_with_a_wrong_kernel_has_no_speed_that_passes(project, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_w=WRONG)
    base = file(pytester.path / "base.json", rounds(2e-4), KERNEL)
    code, output = project(f"--harness-gate={base}", "--harness-gate-margin=100")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "✗ fail: 0 of 1 benchmarks not slower (by more than 100 %" in output
    assert "inconclusive: no pass without parity: not slower" in line_of(KERNEL, output)
    assert output.count("no benchmark passes without parity: 1 case of @conformance failed") == 1
    code, output = project(f"--harness-gate={base}", "--harness-gate-margin=100", "-k", "kernel or (wrong and 1)")
    assert (code, "✓ pass" in output, "@conformance: 1 case passed" in output) == (pytest.ExitCode.OK, True, True)


def test_a_baseline_is_made_by_benchmarks_alone(project, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_w=WRONG)
    code, output = project("--benchmark-only", "--benchmark-json=base.json")
    assert (code, "1 passed, 2 skipped" in output) == (pytest.ExitCode.OK, True), output
    assert list(pytest_benchmark.read([pytester.path / "base.json"])[0].rounds) == [KERNEL]


@pytest.mark.slow
def test_each_reason_for_not_comparing_is_named(project, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_odd=OTHER_TESTS)
    names = [f"test_odd.py::{name}" for name in ("test_left_out", "test_skipped", "test_red", "test_gone")]
    base = file(pytester.path / "base.json", FIVE[0], *names, "elsewhere/test_x.py::test_x")
    code, output = project(f"--harness-gate={base}", "test_odd.py", "-k", "not left_out")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "its test was skipped" in line_of(names[1], output)
    assert "failed, so its time is not shown" in line_of(names[2], output)
    assert "this session has no such test" in line_of(names[3], output)
    assert names[0] not in output  # by -k
    assert "elsewhere" not in output  # not among the files given to pytest
    assert "elsewhere/test_x.py::test_x" in project(f"--harness-gate={base}")[1]


@pytest.mark.slow
def test_nothing_compared_fails_a_session_in_which_no_test_does(project, pytester: pytest.Pytester) -> None:
    base = file(pytester.path / "base.json", FIVE[0], OTHER)
    code, output = project(f"--harness-gate={base}")
    assert (code, "1 passed" in output) == (pytest.ExitCode.TESTS_FAILED, True)
    assert "nothing was compared" in output
    # Many scripts ignore pytest's own exit code for no tests.
    assert project(f"--harness-gate={base}", "-k", "nothing")[0] == pytest.ExitCode.TESTS_FAILED
    assert project(f"--harness-gate={base}", "--collect-only")[0] == pytest.ExitCode.OK


@pytest.mark.slow
def test_a_missing_benchmark_fails_a_strict_session(project, pytester: pytest.Pytester) -> None:
    base = file(pytester.path / "base.json", rounds(2e-4), KERNEL, OTHER)
    options = [f"--harness-gate={base}", "--harness-gate-margin=100"]
    code, output = project(*options)
    assert (code, f"missing: {OTHER}" in output) == (pytest.ExitCode.OK, True)
    assert project(*options, "--harness-gate-strict")[0] == pytest.ExitCode.TESTS_FAILED


def test_a_session_on_another_machine_says_so(project, pytester: pytest.Pytester) -> None:
    base = file(pytester.path / "base.json", rounds(2e-4), KERNEL, cpu={"brand_raw": "an Abacus"}, python_version="2.7")
    code, output = project(f"--harness-gate={base}")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "saved on another machine only: cpu: an Abacus, here " in output


@pytest.mark.parametrize(
    ("options", "output", "hint"),
    [
        (["-n", "2"], "under xdist pytest-benchmark takes no times", "run this session with `-n 0`"),
        (["--benchmark-disable"], "nothing is timed with --benchmark-disable", "leave --benchmark-disable out"),
        (
            ["--harness-gate=nowhere.json"],
            "nowhere.json: cannot be read: No such file",
            "`pytest --benchmark-json=FILE`",
        ),
        (["--harness-gate-margin=0"], "0 % is no margin", "give per cent above 0"),
        (["-p", "no:benchmark"], "pytest-benchmark is not installed", "pip install pytest-benchmark"),
    ],
)
def test_a_session_that_cannot_be_judged_is_refused_before_any_test_runs(
    project, pytester: pytest.Pytester, options: list[str], output: str, hint: str
) -> None:
    base = file(pytester.path / "base.json", FIVE[0], KERNEL)
    code, reported = project(f"--harness-gate={base}", *options)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert output in reported
    assert f"hint: {hint}" in reported
    assert "passed" not in reported


def test_without_the_option_neither_pytest_benchmark_nor_the_gate_is_loaded(project, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_k="import sys\ndef test_it():\n    assert 'harness.regression.pytest_gate' not in sys.modules"
    )
    assert project("-p", "no:benchmark")[0] == pytest.ExitCode.OK
