"""A set of correct programs in plain torch, written from the papers and from `explain` without a look at the checks.

What fails here is a false alarm, or a fault of the set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import Exit
from support.repository import TESTS

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]

SET = TESTS / "support" / "plain_torch_plugin"


def test_every_target_of_the_set_conforms(tmp_path: Path) -> None:
    info = tmp_path / "plain_torch-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plain-torch\nVersion: 1.0\n", encoding="utf-8")
    points = "[harness.implementations]\nplain = plain_torch.door:implementations\n"
    (info / "entry_points.txt").write_text(points, encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(tmp_path), str(SET), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "harness.cli", "check", "plain", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == Exit.PASS, done.stdout[-2000:] + done.stderr
    rows = json.loads(done.stdout)["checks"]
    assert len({row["target"] for row in rows if row["standing"] == "pass"}) == 43
