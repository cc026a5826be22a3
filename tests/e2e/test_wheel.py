"""The wheel: what is inside, and that it works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.repository import TESTS, TOP

pytestmark = pytest.mark.build


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel; pip fetches the build backend."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(out), str(TOP)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("peft_harness-*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(code: str, site: Path, cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run code with the unpacked wheel in front of everything else, somewhere else."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_code_suites_and_templates_are_inside_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for top, inside in (("suites", "harness/_data/suites"), ("report_templates", "harness/_data/report_templates")):
        files = [p for p in (TOP / top).rglob("*") if p.is_file() and p.parent.name != "__pycache__"]
        want = {f"{inside}/{p.relative_to(TOP / top).as_posix()}" for p in files}
        assert len(want) > 3
        assert want == {n for n in names if n.startswith(f"{inside}/")}
    assert {"harness/cli/__init__.py", "harness/assets/shapes.yaml", "reference/lora.py"} <= names
    tops = {n.partition("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"harness", "reference"}
    assert not [n for n in names if n.endswith(".pyc")]


def test_the_command_and_the_door_are_declared(unpacked: Path) -> None:
    (points,) = unpacked.glob("peft_harness-*.dist-info/entry_points.txt")
    text = points.read_text(encoding="utf-8")
    assert "peft-harness = harness.cli:main" in text
    for name in ("reference", "fused", "hf-peft", "bitsandbytes"):
        assert f"{name} = harness.methods.implementations." in text


@pytest.mark.parametrize("name", ["quick", "smoke"])
def test_a_suite_loads_from_the_wheel(unpacked: Path, tmp_path: Path, name: str) -> None:
    code = (
        "import sys, harness\n"
        "from harness import resources; from harness.suites import loader as suites\n"
        f"loaded = suites.load({name!r})\n"
        "print(harness.__file__, resources.data_folder('suites'), resources.checkout(), len(loaded.tasks), sep='\\n')"
    )
    done = python(code, unpacked, tmp_path)
    assert done.returncode == 0, done.stderr
    module, folder, checkout, tasks = done.stdout.splitlines()
    assert Path(module).is_relative_to(unpacked)
    assert Path(folder) == unpacked / "harness" / "_data" / "suites"
    assert checkout == "None"
    assert int(tasks) > 0


def test_a_report_renders_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "sys.path.append(sys.argv[1])\n"  # the tests' recorded run; the checkout itself stays off the path
        "import harness\nfrom support import recorded_run\n"
        "from harness.cli import main\n"
        "run = Path('run')\nrecorded_run.write_run(run)\n"
        "code = main(['report', str(run), '-o', 'report.html'])\n"
        "assert 'torch' not in sys.modules\n"
        "print(harness.__file__)\nsys.exit(code)"
    )
    done = python(code, unpacked, tmp_path, str(TESTS))
    assert (tmp_path / "report.html").is_file(), done.stderr
    assert Path(done.stdout.splitlines()[-1]).is_relative_to(unpacked)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<style" in html
    assert "<script" in html
    assert "minilm-l6" in html


def test_methods_and_parity_suites_are_found_in_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "from harness.conformance import parity_suite as suite\nfrom harness.methods.spec import methods\n"
        "print(*[f'{m}:{len(suite.load(m).checks)}' for m in methods()])"
    )
    done = python(code, unpacked, tmp_path)
    assert done.returncode == 0, done.stderr
    found = dict(pair.split(":") for pair in done.stdout.split())
    assert {"frozen", "full", "lora"} <= set(found)
    assert min(map(int, found.values())) > 0
