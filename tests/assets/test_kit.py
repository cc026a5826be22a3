"""`kit`: what fits is in it, what does not is told, and its script runs without the checkout."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from harness.assets.kit import contents, make, unpack
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


def test_a_missing_wheel_without_which_nothing_starts_is_an_error(
    index: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del index["pydantic"]
    assert main(["kit", str(tmp_path / "kit"), "--size", "20MiB"]) == Exit.INFRASTRUCTURE
    out = capsys.readouterr().out
    assert out.splitlines()[-1].endswith(": pydantic")
    assert "next:" not in out  # such a kit is not worth a copy


def test_the_command_for_the_other_machine_can_be_pasted(
    index: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a kit").mkdir()
    monkeypatch.chdir(tmp_path / "a kit")
    assert main(["kit", ".", "--size", "20MiB"]) == Exit.PASS
    words = shlex.split(capsys.readouterr().out.partition("next:")[2].partition("run: ")[2])
    assert words[:2] == ["bash", "a kit/run.sh"]


def test_a_size_that_the_source_exceeds_is_refused(
    index: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kit", str(tmp_path / "kit"), "--size", "1MiB"]) == Exit.USAGE
    assert "the source alone takes" in capsys.readouterr().err
    assert main(["kit", str(tmp_path / "kit"), "--size", "20MiB"]) == Exit.PASS  # the same folder can be named again


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["kit", str(tmp_path / "file" / "kit")]) == Exit.USAGE
    assert "cannot be made: Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["60", "60mb", "lots", "0MiB"])
def test_a_wrong_size_is_refused_with_units_that_a_kit_may_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    assert main(["kit", str(tmp_path / "kit"), "--size", size]) == Exit.USAGE
    assert "e.g. 60MiB or 60MB" in capsys.readouterr().err


def test_a_wheel_is_unpacked_only_where_its_distribution_is_missing(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    for name in ("acme", "click"):
        with zipfile.ZipFile(tmp_path / "wheels" / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}_of_kit.py", "")
            wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    script = Path(make.__file__).with_name("unpack.py")
    command = [sys.executable, "-I", str(script), str(tmp_path / "wheels"), str(tmp_path / "site")]
    subprocess.run(command, check=True)
    visible = {path.name for path in (tmp_path / "site").iterdir() if not path.name.startswith(".")}
    assert visible == {"acme_of_kit.py", "acme-1.0.dist-info"}
    in_use = tmp_path / "site" / "acme_of_kit.py"
    in_use.write_text("x = 1")
    subprocess.run(command, check=True)
    assert in_use.read_text() == "x = 1"  # a night that runs has mapped the libraries there


def write_wheel(folder: Path, name: str, info: str = "acme-1.0.dist-info") -> Path:
    """Write a wheel that stores its RECORD first. Return the folder into which a kit would unpack it."""
    (folder / "wheels").mkdir()
    with zipfile.ZipFile(folder / "wheels" / f"{name}.whl", "w") as wheel:
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr("acme/library.py", "x = 0")
    return folder / "site"


def test_a_start_that_was_interrupted_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = write_wheel(tmp_path, "acme-1.0-py3-none-any")

    def interrupted(archive: zipfile.ZipFile, folder: Path) -> None:
        archive.extract(archive.namelist()[0], folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "extractall", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unpack.main(tmp_path / "wheels", site)
    unpack.main(tmp_path / "wheels", site)
    assert (site / "acme" / "library.py").read_text() == "x = 0"


def test_a_wheel_with_another_spelling_than_its_metadata_is_unpacked_once(tmp_path: Path) -> None:
    site = write_wheel(tmp_path, "Acme_Two-1.0-py3-none-any", "acme_two-1.0.dist-info")
    unpack.main(tmp_path / "wheels", site)
    (site / "acme" / "library.py").write_text("x = 1")
    unpack.main(tmp_path / "wheels", site)
    assert (site / "acme" / "library.py").read_text() == "x = 1"


MINOR = sys.version_info.minor


@pytest.mark.parametrize(
    ("tags", "fits"),
    [
        ("py2.py3-none-any", True),
        ("cp38.cp39-abi3-manylinux_2_17_x86_64", True),
        (f"py3{MINOR}-none-any", True),
        (f"cp3{MINOR}-cp3{MINOR}{sys.abiflags}-linux_x86_64", True),
        ("cp27-none-linux_x86_64", False),
        ("py2-none-any", False),
        (f"cp3{MINOR + 1}-abi3-linux_x86_64", False),
        (f"cp3{MINOR - 1}-none-linux_x86_64", False),
    ],
)
def test_a_wheel_is_unpacked_only_if_its_tags_fit(tags: str, fits: bool, tmp_path: Path) -> None:
    site = write_wheel(tmp_path, f"acme-1.0-{tags}")
    if not fits:
        with pytest.raises(SystemExit, match="for another Python"):
            unpack.main(tmp_path / "wheels", site)
    else:
        unpack.main(tmp_path / "wheels", site)
    assert (site / "acme").exists() == fits


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


@pytest.mark.parametrize("version", ["2.7", "3.10", "3", "3.x", "banana"])
def test_a_python_on_which_the_harness_does_not_run_is_refused(
    tmp_path: Path, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kit", str(tmp_path / "kit"), "--python", version]) == Exit.USAGE
    assert f"`{version}`" in capsys.readouterr().err
    assert not (tmp_path / "kit").exists()
