"""`serve:` in a suite, with a small server of a plug-in: the Record, the terminal and the page have its times."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import Exit
from harness.records.record import Outcome
from support.repository import TESTS
from support.sandbox import Sandbox

pytestmark = pytest.mark.e2e

SERVER = f"""
from harness.methods.servers.kind import ServerKind

def arguments(launch):
    adapters = [f"{{name}}={{folder}}" for name, folder in launch.adapters.items()]
    return ["-P", {str(TESTS / "support" / "model_server.py")!r}, str(launch.port), launch.name, str(launch.base), *adapters]

SMALL = ServerKind("small", "torch", arguments, distributions=("torch",))
"""


def plug_in(folder: Path) -> None:
    """Add a distribution with a kind of server to the folder of plug-ins."""
    facts = folder / "small_server-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: small-server\nVersion: 1.0\n", encoding="utf-8")
    (facts / "entry_points.txt").write_text("[harness.servers]\nsmall = small_server:SMALL\n", encoding="utf-8")
    (folder / "small_server.py").write_text(SERVER, encoding="utf-8")


@pytest.mark.nightly
def test_a_suite_serves_its_adapter_in_the_server_of_a_plug_in(sandbox: Sandbox) -> None:
    plug_in(sandbox.folder / "plugin")
    suite = sandbox.suite("{id: a, implementation: reference, serve: small}")
    planned = sandbox.command("plan", suite)
    assert "served by small" in planned.out
    done = sandbox.command("run", suite, "--out", str(sandbox.run_folder))
    assert done.code == Exit.PASS, done.err
    (record,) = sandbox.read().records
    assert {c.id.check for c in record.checks if c.outcome is Outcome.PASS} >= {"served-several", "served-alive"}
    assert record.measurements is not None
    assert record.measurements.served is not None
    assert all(times.round_s for times in record.measurements.served.times)
    assert "4 × several adapters" in done.out
    page = (sandbox.run_folder / "report.html").read_text(encoding="utf-8")
    assert "4 × several adapters" in page
    assert not list(sandbox.run_folder.glob("serve-*"))
