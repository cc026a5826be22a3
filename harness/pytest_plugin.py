"""pytest plug-in: one test for each case of a parity suite (`harness.testing.conformance`), and `--harness-gate`.

pytest loads this module wherever peft-harness is installed, even if no test uses it. To keep pytest's start fast, the module
imports the rest of the harness only when a test or an option needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--harness-gate` and the options that belong to it."""
    group = parser.getgroup("peft-harness")
    group.addoption(
        "--harness-gate", action="append", default=[], metavar="BASELINE",
        help="Compare this session's benchmarks with files of --benchmark-json, one per process run: name each file (repeat "
        "the option), or their folder. Fails if a benchmark is slower, or if nothing was compared.",
    )  # fmt: skip
    group.addoption(
        "--harness-gate-margin",
        type=float,
        default=10.0,
        metavar="PERCENT",
        help="Allowed slow-down in percent.  [10]",
    )
    group.addoption(
        "--harness-gate-strict", action="store_true",
        help="Also fail if a benchmark is inconclusive, missing, or was only measured on another machine.",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Set up the regression gate if `--harness-gate` is given.

    Workers of xdist and runs that only collect tests have no gate.
    """
    if config.getoption("harness_gate") and not hasattr(config, "workerinput") and not config.option.collectonly:
        from harness.regression.pytest_gate import PytestGate

        config.pluginmanager.register(PytestGate(config, CaseItem), "peft-harness-gate")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Add torch's version and the GPU's name to the `machine_info` of pytest-benchmark, if the session uses them."""
    torch = sys.modules.get("torch")
    if torch is not None:
        machine_info.setdefault("torch", str(torch.__version__))
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            machine_info.setdefault("gpu", torch.cuda.get_device_name())


def pytest_pycollect_makeitem(collector: Any, name: str, obj: Any) -> pytest.Collector | None:
    """Return a collector for a function that `@conformance` decorates, whatever its name.

    For other objects, return None.
    """
    testing = sys.modules.get("harness.testing")
    if testing is None or not isinstance(obj, testing.Conforming):
        return None
    return ConformanceCollector.from_parent(collector, name=name, conforming=obj)


class ConformanceCollector(pytest.Collector):
    """The collector of a function that `@conformance` decorates."""

    def __init__(self, *, conforming: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conforming = conforming

    def collect(self) -> Iterator[pytest.Item]:
        """Yield one test per case."""
        for words, tries in self.conforming.cases():
            yield CaseItem.from_parent(self, name=words, tries=tries)


class CaseItem(pytest.Item):
    """The test of one case. It runs every check of the parity suite on the case."""

    def __init__(self, *, tries: Callable[[], Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tries = tries

    def runtest(self) -> None:
        """Run the case. Fail with a line for each failed check."""
        from harness.testing import verdict

        failed, skipped = verdict(self.tries())
        if failed:
            pytest.fail(failed, pytrace=False)
        if skipped:
            pytest.skip(skipped)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Return the path, line and name of the test.

        The line must not be None: a mark that skips the test (--benchmark-only) would then fail.
        """
        suite = self.parent
        assert isinstance(suite, ConformanceCollector)  # noqa: S101
        code = getattr(suite.conforming.implementation.function, "__code__", None)
        return self.path, code.co_firstlineno - 1 if code else 0, f"{suite.name}[{self.name}]"
