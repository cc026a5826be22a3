"""Pytest plugin of `--harness-gate`: compare a session with saved runs. A slower benchmark fails the session.

It is imported only in a session with this option. It imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest

from harness.analysis.comparison.baseline_rows import GateResult
from harness.analysis.verdict_kind import VerdictKind
from harness.bench import pytest_benchmark
from harness.bench.pytest_benchmark import Saved
from harness.errors import UsageError
from harness.regression import benchmarks
from harness.regression.outputs import github, terminal

_OPTION = "--harness-gate"
_JUDGED = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
"""Exit codes of sessions that are judged. A session with another exit code, e.g. an interrupted one, keeps it."""


class PytestGate:
    """Plugin that collects the results of a session, and judges the session at its end."""

    def __init__(self, config: pytest.Config, conforming: type[pytest.Item]) -> None:
        self.config, self.conforming = config, conforming
        self.saved: list[Saved] = []
        self.margin = 0.0
        self.result: GateResult | None = None
        self._collected: set[str] = set()
        self._deselected: set[str] = set()
        self._cases: set[str] = set()
        self._outcomes: dict[str, str] = {}

    def pytest_sessionstart(self) -> None:
        """Raise pytest.UsageError, before any test runs, if the session cannot be judged."""
        try:
            self._benchmarks()
            self.margin = _margin(self.config.getoption("harness_gate_margin"))
            start = self.config.invocation_params.dir
            self.saved = pytest_benchmark.read([start / path for path in self.config.getoption("harness_gate")])
        except UsageError as error:
            raise pytest.UsageError(str(error)) from error

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Note the deselected tests."""
        self._deselected |= {item.nodeid for item in items}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note the tests that will run."""
        self._collected = {item.nodeid for item in session.items}
        self._cases = {item.nodeid for item in session.items if isinstance(item, self.conforming)}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome of each test. A failed teardown makes the test a failure."""
        if report.failed or (report.skipped and self._outcomes.get(report.nodeid) != "failed"):
            self._outcomes[report.nodeid] = report.outcome
        elif report.when == "call":
            self._outcomes.setdefault(report.nodeid, report.outcome)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Judge the session, and set its exit status.

        The verdicts FAIL and NOT_RUN make the session fail. With the strict option, INCONCLUSIVE does too.
        """
        if session.exitstatus not in _JUDGED:
            return
        self.result = benchmarks.compare(self.saved, self._session(), self.margin)
        word, strict = self.result.verdict.word, self.config.getoption("harness_gate_strict")
        # If nothing was compared, the exit code is not 5, which many scripts ignore.
        if word in (VerdictKind.FAIL, VerdictKind.NOT_RUN) or (strict and word is VerdictKind.INCONCLUSIVE):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the comparison below the tables of pytest-benchmark, with the verdict at the end."""
        terminalreporter.section("peft-harness gate")
        if self.result is None:
            terminalreporter.write_line("not judged: the session was interrupted")
            return
        annotations = github.lines(self.result) if github.is_job() else []
        for line in [*terminal.lines(self.result, first="benchmark"), *annotations]:
            terminalreporter.write_line(line)

    def _benchmarks(self) -> Any:
        """Return the session of pytest-benchmark. Raises UsageError if pytest-benchmark is missing or times nothing."""
        plugin = self.config.pluginmanager.get_plugin("pytest-benchmark")
        if plugin is None:
            what = "pytest-benchmark is not installed, or is blocked by `-p no:benchmark`"
            raise UsageError(what, where=_OPTION, hint="pip install pytest-benchmark")
        if self.config.getoption("dist", "no") != "no" or os.environ.get("PYTEST_XDIST_WORKER"):
            what = "under xdist pytest-benchmark takes no times, since parallel tests disturb them"
            raise UsageError(what, where=_OPTION, hint="run this session with `-n 0`, or `-p no:xdist`")
        for option, is_set in (("--benchmark-disable", plugin.disabled), ("--benchmark-skip", plugin.skip)):
            if is_set:
                raise UsageError(f"nothing is timed with {option}", where=_OPTION, hint=f"leave {option} out")
        return plugin

    def _session(self) -> benchmarks.SessionResults:
        plugin = self._benchmarks()
        timed = [one for one in plugin.benchmarks if one and not one.has_error and min(one.stats.data) > 0]
        cases = [self._outcomes.get(nodeid) for nodeid in self._cases]
        return benchmarks.SessionResults(
            place=pytest_benchmark.place(plugin.get_machine_info()),
            rounds={one.fullname: one.stats.data for one in timed},
            failed=frozenset(nodeid for nodeid, outcome in self._outcomes.items() if outcome == "failed"),
            absent={name: why for saved in self.saved for name in saved.rounds if (why := self._why_absent(name))},
            cases_passed=cases.count("passed"), cases_failed=cases.count("failed"),
        )  # fmt: skip

    def _why_absent(self, name: str) -> str:
        """Return the reason why a saved benchmark was not timed; empty if the session was not asked to run it."""
        if name in self._collected:
            outcome = self._outcomes.get(name)
            return f"its test was {outcome}" if outcome == "skipped" else "its test was not run, or took no time"
        if name in self._deselected or not any(self._covers(argument, name) for argument in self.config.args):
            return ""
        return "this session has no such test"

    def _covers(self, argument: str, name: str) -> bool:
        """Return whether a command-line argument of pytest selects the test with the full name `name`.

        argument: a file, folder or test, from the command line or from `testpaths`.
        """
        (path, _, selected), (file, _, test) = argument.partition("::"), name.partition("::")
        start = (self.config.invocation_params.dir / path).resolve()
        inside = (self.config.rootpath / file).resolve().is_relative_to(start)
        return inside and (not selected or test == selected or test.startswith((f"{selected}::", f"{selected}[")))


def _margin(per_cent: float) -> float:
    if not 0 < per_cent <= 100:
        hint = "give per cent above 0, at most 100"
        raise UsageError(f"{per_cent:g} % is no margin", where="--harness-gate-margin", hint=hint)
    return per_cent / 100
