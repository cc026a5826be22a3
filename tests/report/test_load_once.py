"""A run is read once and analysed once, however many outputs are made from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import cli
from harness.analysis import ranking, run_verdict
from harness.analysis.comparison import reproducibility
from harness.errors import Exit
from harness.records import store
from harness.records.manifest import Footer
from support import recorded_run

Calls = Counter[str]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Count reads of Record files and analyses of runs."""
    found: Calls = Counter()

    def count(module: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            found[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    for module, name in (
        (store, "read_record"), (run_verdict, "judge"), (ranking, "groups"), (reproducibility, "reruns"),
    ):  # fmt: skip
        count(module, name)
    return found


@pytest.mark.slow
def test_report_reads_and_analyses_each_run_once(calls: Calls, tmp_path: Path) -> None:
    runs = [recorded_run.write_run(tmp_path / name, run=name) for name in ("a", "b")]
    records = sum(len(run.records) for run in runs)
    calls.clear()
    code = cli.main(["report", *(str(run.path) for run in runs), "-o", str(tmp_path / "page.html")])
    assert code == Exit.PASS
    assert calls == {"read_record": records, "judge": 2, "groups": 2, "reruns": 1}


def test_closing_a_run_returns_what_reading_it_again_would(calls: Calls, tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "a")
    folder = store.RunFolder(run.path)
    folder.reopen()
    footer = run.footer
    assert isinstance(footer, Footer)
    read = store.read_run(run.path)
    calls.clear()
    closed = folder.close(read, footer)
    assert calls["read_record"] == 0
    assert closed == store.read_run(run.path)
