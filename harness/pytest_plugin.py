"""The pytest plug-in behind `harness.testing.conformance`: one test for each case of a parity suite.

pytest loads this in every run of an environment that has peft-harness, so it imports nothing of ours before a test uses it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest


def pytest_pycollect_makeitem(collector: Any, name: str, obj: Any) -> pytest.Collector | None:
    """Collect what `@conformance` has decorated, whatever it is called."""
    testing = sys.modules.get("harness.testing")
    if testing is None or not isinstance(obj, testing.Conforming):
        return None
    return Suite.from_parent(collector, name=name, conforming=obj)


class Suite(pytest.Collector):
    """A decorated function."""

    def __init__(self, *, conforming: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conforming = conforming

    def collect(self) -> Iterator[pytest.Item]:
        """Yield one test per case."""
        for words, tries in self.conforming.cases():
            yield CaseItem.from_parent(self, name=words, tries=tries)


class CaseItem(pytest.Item):
    """One case: every check of the suite."""

    def __init__(self, *, tries: Callable[[], Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tries = tries

    def runtest(self) -> None:
        """Try the case; fail with a line for each check that failed."""
        from harness.testing import verdict

        failed, skipped = verdict(self.tries())
        if failed:
            pytest.fail(failed, pytrace=False)
        if skipped:
            pytest.skip(skipped)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Say where the function is."""
        return self.path, None, f"{self.parent.name if self.parent else ''}[{self.name}]"
