"""`night`: a failing Cell of the matrix is a finding, of a headline a result if memory ends; a missing rival is named."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from harness.errors import Exit
from harness.records.record import Status
from harness.regression.night import parts
from harness.regression.night.parts import NightPart
from harness.regression.night.run import NightRequest, night

STUB = """
import sys
from pathlib import Path
from harness.records.record import Status
from support import recorded_run
status = Status(sys.argv[3])
change = lambda name, good: recorded_run.failed(good, status, because="a Cell's reason") if name == "fused" else good
recorded_run.write_run(Path(sys.argv[4]), only=("head", "fused"), change=change)
sys.exit(1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cell", "status", "because"),
    [
        ("matrix", Status.ERROR, "finding", "1 Cell failed: error"),
        ("matrix", Status.OOM, "finding", "1 Cell failed: oom"),
        ("matrix-real", Status.TIMEOUT, "finding", "1 Cell failed: timeout"),
        ("headline-7b", Status.ERROR, "finding", "1 Cell failed: error"),
        ("headline-7b", Status.OOM, "ok", ""),
        ("headline-7b", Status.TIMEOUT, "ok", ""),
    ],
)
def test_a_cell_that_fails_is_told_at_the_top(
    name: str, cell: Status, status: str, because: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(
        parts,
        "on_cpu",
        lambda: [NightPart(name, "?", "run", ("run", "./my suite.yaml", cell.value, f"{parts.OUT}/run"), 1.0)],
    )
    code = night(NightRequest(600.0, "cpu", tmp_path / "night", command=(sys.executable, str(stub))), as_json=True)
    assert code == (Exit.FAIL if status == "finding" else Exit.PASS)
    found = json.loads((tmp_path / "night" / "parts" / f"{name}.json").read_text())
    assert (found["status"], found["because"]) == (status, because)
    (failure,) = found["failures"]
    assert failure["reproduce"].startswith("peft-harness run './my suite.yaml' --only ")
    top = (tmp_path / "night" / "index.html").read_text().partition('id="next"')[0]
    assert "a Cell&#39;s reason" in top
    assert "found nothing wrong" not in top


def test_a_rival_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "name": "nf4", "shape": "-", "dtype": "float32", "device": "cpu", "ours": "fused", "other": "acme",
        "outcome": "not-run", "because": "acme is not installed", "parity": [],
    }  # fmt: skip
    code = f"import sys; print({json.dumps({'benchmarks': [row, row]})!r}); sys.exit(5)"
    monkeypatch.setattr(parts, "on_cpu", lambda: [NightPart("operation-nf4", "?", "bench", ("bench",), 1.0)])
    night(NightRequest(600.0, "cpu", tmp_path / "night", command=(sys.executable, "-c", code)), as_json=True)
    found = json.loads((tmp_path / "night" / "parts" / "operation-nf4.json").read_text())
    assert (found["status"], found["summary"]) == ("not-run", "2 not-run: acme is not installed")
    assert "2 not-run: acme is not installed; nothing was compared" in (tmp_path / "night" / "index.html").read_text()
