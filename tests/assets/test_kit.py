"""`kit`: what fits is in it, what does not is told, and its script runs without the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from harness.assets.kit import contents, make
from harness.cli import main
from harness.errors import Exit

MIB = 2**20


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return the wheels that pip finds: distribution -> bytes. Others do not exist."""
    sizes = dict.fromkeys(contents.NEEDED, 1000) | {"bitsandbytes": 3 * MIB, "scipy": 200 * MIB, "acme": 10}

    def download(name: str, _: str, target: Path) -> str:
        if name not in sizes:
            return "pip cannot get it: no matching distribution"
        wheel = target / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
        with wheel.open("wb") as file:
            file.truncate(sizes[name])
        return ""

    monkeypatch.setattr(make, "_download", download)
    monkeypatch.setattr(contents, "SOURCES", ())
    monkeypatch.setattr(contents, "HALF", ())
    return sizes


def test_what_fits_is_in_the_kit_and_what_does_not_is_told(
    index: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kit", str(tmp_path / "kit"), "--size", "20MiB"]) == Exit.PASS
    document = json.loads((tmp_path / "kit" / "kit.json").read_text())
    assert document["items"]["bitsandbytes"] == 3 * MIB
    assert document["left_out"]["scipy"] == "200.0 MiB do not fit"
    assert document["left_out"]["torchao"].startswith("pip cannot get it")
    files = [path for path in (tmp_path / "kit").rglob("*") if path.is_file() and path.name != "kit.json"]
    assert sum(path.stat().st_size for path in files) == document["bytes"] <= 20 * MIB
    assert {path.relative_to(tmp_path / "kit").as_posix() for path in files} == document["sha256"].keys()
    assert "scipy" in capsys.readouterr().out


def test_a_missing_wheel_without_which_nothing_starts_is_an_error(index: dict[str, int], tmp_path: Path) -> None:
    del index["pydantic"]
    assert main(["kit", str(tmp_path / "kit"), "--size", "20MiB"]) == Exit.INFRASTRUCTURE


def test_a_size_that_the_source_exceeds_is_refused(
    index: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kit", str(tmp_path / "kit"), "--size", "1MiB"]) == Exit.USAGE
    assert "the source alone takes" in capsys.readouterr().err


def test_a_wheel_is_unpacked_only_where_its_distribution_is_missing(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    for name in ("acme", "click"):
        with zipfile.ZipFile(tmp_path / "wheels" / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}_of_kit.py", "")
            wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    script = Path(make.__file__).with_name("unpack.py")
    command = [sys.executable, "-I", str(script), str(tmp_path / "wheels"), str(tmp_path / "site")]
    subprocess.run(command, check=True)
    assert {path.name for path in (tmp_path / "site").iterdir()} == {"acme_of_kit.py", "acme-1.0.dist-info"}
    in_use = tmp_path / "site" / "acme_of_kit.py"
    in_use.write_text("x = 1")
    subprocess.run(command, check=True)
    assert in_use.read_text() == "x = 1"  # a night that runs has mapped the libraries there


def test_a_wheel_for_another_python_is_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "acme-1.0-cp27-cp27m-linux_x86_64.whl", "w") as wheel:
        wheel.writestr("acme.so", "")
    for name in ("run.sh", "unpack.py"):
        shutil.copy(Path(make.__file__).with_name(name), tmp_path / name)
    done = subprocess.run(
        ["bash", str(tmp_path / "run.sh")], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == Exit.INFRASTRUCTURE
    assert "acme-1.0-cp27-cp27m-linux_x86_64.whl is for another Python" in done.stderr
    assert f"--python 3.{sys.version_info.minor}" in done.stderr


@pytest.mark.nightly
def test_a_kit_has_a_small_model_in_float16_and_a_suite_that_trains_it(
    index: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import safe_open

    large = tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_text("{}")
    (large / "notes.bin").write_bytes(bytes(30 * MIB))
    real = make.fetch.ensure
    monkeypatch.setattr(make.fetch, "ensure", lambda source: large if source.name == "minilm-l6" else real(source))
    halves = (contents.Half("minilm-l6", "sentinels"), contents.Half("tiny-llama", "night", ("toy-sentiment",)))
    monkeypatch.setattr(contents, "HALF", halves)
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path / "cache"))
    kit = tmp_path / "kit"
    assert main(["kit", str(kit), "--size", "20MiB"]) == Exit.PASS
    document = json.loads((kit / "kit.json").read_text())
    assert document["left_out"]["minilm-l6 in float16"] == "30.0 MiB do not fit"
    assert document["items"]["tiny-llama in float16"] > 0
    assert list((kit / "cache" / "data").glob("toy-sentiment-*"))  # the suite's data come with it
    assert document["bytes"] == sum(f.stat().st_size for f in kit.rglob("*") if f.is_file() and f.name != "kit.json")
    with safe_open(kit / "models" / "tiny-llama-half" / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118
    assert main(["plan", str(kit / "half.yaml")]) == Exit.PASS


@pytest.mark.e2e
def test_the_script_runs_the_harness_of_the_kit(index: dict[str, int], tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    assert main(["kit", str(kit), "--size", "20MiB"]) == Exit.PASS
    of_a_card = Path("results", "baselines", "night-a-card", "run.json")
    (kit / "source" / of_a_card).parent.mkdir(parents=True)
    (kit / "source" / of_a_card).touch()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(kit / "run.sh"), "list", "implementations", "--json"], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "fused" in done.stdout
    assert (tmp_path / of_a_card).is_file()  # where `night` looks for the baseline of its card
    (typed,) = re.findall(
        r'export PATH="(.*):\$PATH"', done.stderr
    )  # lets a reader paste the lines that `night` prints
    again = subprocess.run(
        ["peft-harness", "list", "implementations", "--json"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=environment | {"PATH": f"{typed}{os.pathsep}{os.defpath}"},
    )  # fmt: skip
    assert again.stdout == done.stdout, again.stderr
