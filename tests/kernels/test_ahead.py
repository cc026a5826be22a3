"""Kernels judged by their machine code, with no GPU: by the Triton that is installed, and an older one if it is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.processes import eventually, gone
from support.repository import TOP

pytest.importorskip("triton", reason="there is no Triton for this system")

from harness.kernels import triton as kernels
from harness.kernels.compile import ahead
from harness.kernels.compile.machine_code import MachineCode
from harness.kernels.compile.specimen import Specimen

pytestmark = pytest.mark.build

OLDER = TOP / ".triton36"
GOOD = MachineCode(
    registers=40, stack=0, shared=0, instructions=100, wide_loads=2, wide_stores=2, narrow_loads=0, matrix={},
    fused_multiply_adds=0,
)  # fmt: skip
STREAMING = Specimen(name="one", kernel=None, signature={"x": "*fp32"}, constants={}, kind="streaming")


def command(*arguments: str, older: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if older:
        environment["PYTHONPATH"] = os.pathsep.join([str(OLDER), str(TOP)])
    return subprocess.run(
        [sys.executable, "-m", "harness.kernels.compile.ahead", *arguments],
        cwd=TOP, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def skip_without_it() -> None:
    if not OLDER.is_dir():
        pytest.skip(f"Triton 3.6 is not in {OLDER.name}: pip install --no-deps --target {OLDER.name} triton==3.6.0")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("older", "architecture"),
    [
        (True, "90"),
        *((False, one) for one in ("80", "90", "100")),
    ],
)
def test_every_kernel_passes_the_checks_of_its_machine_code(older: bool, architecture: str) -> None:
    if older:
        skip_without_it()
    done = command("--arch", architecture, older=older)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nf4.dequantize-bf16-64 " in done.stdout


@pytest.mark.parametrize(
    ("older", "module", "kernel"),
    [(True, "nf4", "nf4.dequantize-bf16-64"), (False, "dora_gain", "dora_gain.bf16-rank-16")],
)
def test_json_has_the_verdicts(older: bool, module: str, kernel: str) -> None:
    if older:
        skip_without_it()
    done = command("--arch", "90", "--module", module, "--json", older=older)
    found = json.loads(done.stdout)
    one = {each["name"]: each for each in found["verdicts"]}[kernel]
    assert found["triton"].startswith("3.6") is older
    assert one["architecture"] == 90
    assert one["found"]["wide_loads"] > 0
    assert one["found"]["stack"] == 0


def test_an_unknown_module_is_rejected_with_the_known_ones() -> None:
    done = command("--arch", "90", "--module", "nf5")
    assert done.returncode == 2
    assert "nf5" in done.stderr
    assert "nf4" in done.stderr


@pytest.mark.parametrize("arch", ["91", "12"])
def test_an_unknown_architecture_is_rejected_with_the_known_ones(arch: str) -> None:
    done = command("--arch", arch, "--module", "dora_gain")
    assert done.returncode == 2
    assert f"invalid choice: {arch} (choose from 80, 90, 100)" in done.stderr


def test_a_kernel_is_found_and_judged_without_being_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "doubled.py").write_text(
        "import triton\nimport triton.language as tl\nfrom harness.kernels.compile.specimen import Specimen\n"
        "@triton.jit\ndef double(x, y, n, BLOCK: tl.constexpr):\n"
        "    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\n"
        "    tl.store(y + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)\n"
        "SPECIMENS = [Specimen('doubled', double, {'x': '*fp32', 'y': '*fp32', 'n': 'i32'}, {'BLOCK': 1024},\n"
        "                      divisible=('x', 'y', 'n'), kind='streaming')]\n"
    )
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "harness.kernels.triton.doubled", raising=False)
    module = ahead.modules()["doubled"]
    (verdict,) = ahead.judge(module, 90, {"doubled": 255})
    monkeypatch.delitem(sys.modules, module)
    assert (verdict.name, verdict.faults) == ("doubled", ())
    assert verdict.found is not None
    assert verdict.found.wide_loads > 0


def test_a_module_that_fails_to_import_hides_no_other() -> None:
    verdict, *rest = ahead.judge("half_written", 90, {})
    assert not rest
    assert "half_written" in verdict.faults[0]


@pytest.mark.parametrize(
    ("found", "changed", "limit", "says"),
    [
        ({}, {}, 40, None),
        ({"stack": 16}, {}, 40, "spilled"),
        ({"shared": ahead.SHARED[80]}, {}, 40, None),
        ({"shared": ahead.SHARED[80] + 1}, {}, 40, "of shared memory, sm_80 has"),
        ({}, {}, 39, "allows 39"),
        ({}, {}, None, "--write"),
        ({"wide_loads": 0}, {}, 40, "no load of 128"),
        ({"wide_stores": 0}, {}, 40, "no store of 128"),
        ({"narrow_loads": 3}, {}, 40, "one byte"),
        ({"narrow_loads": 3}, {"narrow_loads": 3}, 40, None),
        ({"wide_loads": 0}, {"kind": "other"}, 40, None),
        ({}, {"kind": "gemm"}, 40, "no matrix instruction"),
        ({"matrix": {"HGMMA": 4}}, {"kind": "gemm", "signature": {"x": "*bf16"}}, 40, None),
        ({"matrix": {"UTCHMMA": 4}}, {"kind": "other"}, 40, "TF32"),
        ({"fused_multiply_adds": 1}, {"separate_roundings": True}, 40, "fused multiply-adds"),
    ],
)
def test_each_check_of_the_machine_code(
    found: dict[str, Any], changed: dict[str, Any], limit: int | None, says: str | None
) -> None:
    faults: Iterator[str] = ahead.faults(replace(STREAMING, **changed), replace(GOOD, **found), 80, limit)
    wrong = list(faults)
    assert len(wrong) == (says is not None)
    assert not says or says in wrong[0]


def test_a_compiler_ends_with_a_parent_that_is_killed() -> None:
    code = "import os, time; from harness.kernels.compile import ahead; ahead._end_with(os.getppid()); "
    code += "print(os.getpid(), flush=True); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        compiler = int(killed.stdout.readline())
        killed.kill()
    eventually(lambda: gone(compiler), "the compiler ends")
