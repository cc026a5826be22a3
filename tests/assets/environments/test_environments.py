"""Environments: made from wheels on this disk, whole or not at all. No network but loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from harness import cache_folder
from harness.assets.environments import create, folder, integrity, packages, table
from harness.assets.environments.folder import MadeEnvironment
from harness.assets.environments.packages import IndexOptions
from harness.assets.environments.table import EnvironmentSpec
from harness.cell.serving import server_process
from harness.errors import AssetError, Exit, HarnessError, SuiteError, UsageError
from harness.methods import servers
from harness.methods.servers.kind import ServerKind
from harness.records.training import Loop
from harness.runner import cell_environments
from support import tiny_wheels
from support.processes import eventually, gone
from support.sandbox import COMMAND, hear_ctrl_c

pytestmark = pytest.mark.e2e  # every environment takes some runs of pip

NO_OPTIONS = IndexOptions()
TOOL = "[console_scripts]\ntiny-tool = tiny_lib:main\n"
SLOW_PIP = """
import os, pathlib, sys, time
pathlib.Path(os.environ["TMPDIR"], "partial").write_text("half")
pathlib.Path(sys.argv[0]).with_name("pid").write_text(str(os.getpid()))
time.sleep(600)
"""


def settings(monkeypatch: pytest.MonkeyPatch, home: Path) -> Path:
    """Set an empty cache, and a pip that knows only a folder of wheels. Return the folder."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    wheels = home / "wheels"
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_NO_CACHE_DIR": "1", "PIP_FIND_LINKS": str(wheels),
        "PEFT_HARNESS_CACHE": str(home / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for version in ("1.0", "2.0"):
        source = f"VERSION = {version!r}\ndef main(): print(VERSION)\n"
        tiny_wheels.wheel(wheels, "tiny-lib", version, {"tiny_lib.py": source}, entry_points=TOOL)
    tiny_wheels.wheel(wheels, "tiny-user", "1.0", requires=["tiny-lib<2"])
    return wheels


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return settings(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MadeEnvironment]:
    """An environment with tiny-lib 1.0, and with the cache in which it is."""
    with pytest.MonkeyPatch.context() as patch:
        settings(patch, tmp_path_factory.mktemp("tiny"))
        yield create.ensure(table.of_requirement("tiny-lib==1.0"), NO_OPTIONS, silent)


@pytest.fixture
def copied(tiny: MadeEnvironment, wheels: Path) -> MadeEnvironment:
    """A copy of `tiny` in this test's own cache."""
    place = folder.root() / tiny.folder.name
    shutil.copytree(tiny.folder, place, symlinks=True)
    return MadeEnvironment(place, tiny.file)


def silent(line: str) -> None:
    """Say nothing."""


def said_by(environment: MadeEnvironment, code: str) -> str:
    command = [str(environment.python), "-P", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def left() -> list[str]:
    """Return the files in the cache, without the lock of the staging folder."""
    files = [path.relative_to(cache_folder.root()) for path in cache_folder.root().rglob("*") if not path.is_dir()]
    return sorted({str(path) for path in files} - {"staging/lock"})


def command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_ctrl_c,
    )


# --- a whole environment


def test_an_environment_replaces_one_library_and_shares_the_rest(tiny: MadeEnvironment) -> None:
    import torch

    import harness

    facts = said_by(
        tiny,
        "import tiny_lib, json, importlib.util as u, importlib.metadata as m; from harness.methods.registry import GROUP\n"
        "points = sorted(p.name for p in m.entry_points(group=GROUP))\n"
        "print(json.dumps([tiny_lib.VERSION, u.find_spec('torch').origin, u.find_spec('harness').origin, points]))",
    )
    version, torch_file, harness_file, points = json.loads(facts)
    assert version == "1.0"
    assert torch_file == torch.__file__
    assert harness_file == harness.__file__
    assert {"reference", "hf-peft"} <= set(points)
    assert tiny.label == "tiny-lib 1.0"
    assert tiny.is_current
    (package,) = tiny.file.packages
    assert package.startswith("tiny-lib==1.0 --hash=sha256:")
    assert [path.name for path in tiny.folder.parent.iterdir()] == [tiny.folder.name], "no lock, nothing else"


def test_a_script_runs_after_the_folder_was_renamed(tiny: MadeEnvironment) -> None:
    done = subprocess.run([tiny.folder / "bin" / "tiny-tool"], capture_output=True, text=True, check=True)
    assert done.stdout == "1.0\n"


def test_an_environment_that_exists_is_taken_without_pip(
    copied: MadeEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "run_pip", lambda *_: pytest.fail("pip ran again"))
    assert create.ensure(copied.file.spec, NO_OPTIONS, silent).folder == copied.folder


def test_another_torch_needs_another_environment(tiny: MadeEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    before = folder.place(tiny.file.spec)
    monkeypatch.setattr(folder, "version", lambda project: "9.9" if project == "torch" else "1")
    assert folder.place(tiny.file.spec) != before


def test_the_size_is_said_before_anything_is_downloaded(wheels: Path) -> None:
    said: list[str] = []
    create.announce(table.of_requirement("tiny-user==1.0"), NO_OPTIONS, said.append)
    asked, chosen = said
    assert "tiny-user==1.0" in asked
    assert "2 packages to download, 0.0 MB; " in chosen
    assert "GB are free: " in chosen
    assert "tiny-lib 1.0" in chosen
    assert left() == []


@pytest.mark.nightly
def test_an_environment_without_dependencies_holds_its_requirements_only(wheels: Path) -> None:
    spec = EnvironmentSpec(name="user", requirements=["tiny-user==1.0"])
    bare = spec.model_copy(update={"dependencies": False})
    assert folder.place(spec) != folder.place(bare)
    made = create.ensure(bare, NO_OPTIONS, silent)
    found = "import importlib.util as u; print([u.find_spec(n) is not None for n in ('tiny_user', 'tiny_lib')])"
    assert said_by(made, found) == "[True, False]"


@pytest.mark.nightly
def test_an_isolated_environment_holds_everything_itself(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "requires", lambda _: ["tiny-lib>=2", "other; extra == 'x'"])
    spec = EnvironmentSpec(name="alone", requirements=["tiny-user==1.0"], isolated=True)
    made = create.ensure(spec, NO_OPTIONS, silent)
    facts = said_by(
        made,
        "import tiny_lib, reference, importlib.util as u, importlib.metadata as m\n"
        "print(tiny_lib.VERSION, u.find_spec('torch'), 'hf-peft' in m.entry_points(group='harness.implementations').names)",
    )
    assert facts == "1.0 None True"
    assert {one.partition("==")[0] for one in made.file.packages} == {"tiny-user", "tiny-lib"}


@pytest.mark.nightly
def test_uv_installs_if_it_is_on_the_path(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(
        f"#!{sys.executable}\n"
        "import subprocess, sys\n"
        "if sys.argv[1] == '--version': print('uv 9.9.9 (x 2026)'); raise SystemExit\n"
        "python = sys.argv[sys.argv.index('--python') + 1]\n"
        "files = [one for one in sys.argv if one.endswith('.whl')]\n"
        "pip = [sys.executable, '-m', 'pip', '--python', python, 'install', '--no-index', '--no-deps', *files]\n"
        "raise SystemExit(subprocess.run(pip).returncode)\n"
    )
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", str(uv.parent), prepend=os.pathsep)
    made = create.ensure(table.of_requirement("tiny-lib==2.0"), NO_OPTIONS, silent)
    assert made.file.installer == "uv 9.9.9"
    assert said_by(made, "import tiny_lib; print(tiny_lib.VERSION)") == "2.0"


# --- failures: one message each, and nothing is left


def no_index(monkeypatch: pytest.MonkeyPatch, wheels: Path) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")


def no_links(monkeypatch: pytest.MonkeyPatch, wheels: Path) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")


def no_room(monkeypatch: pytest.MonkeyPatch, wheels: Path) -> None:
    usage = shutil.disk_usage(wheels)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))


def full_disk(monkeypatch: pytest.MonkeyPatch, wheels: Path) -> None:
    fake_pip(wheels.parent, "raise SystemExit('ERROR: [Errno 28] No space left on device')", monkeypatch)


def broken_pip(monkeypatch: pytest.MonkeyPatch, wheels: Path) -> None:
    fake_pip(wheels.parent, "raise SystemExit('ERROR: oh no')", monkeypatch)


def nothing_wrong(monkeypatch: pytest.MonkeyPatch, wheels: Path) -> None:
    """Leave everything as it is."""


def fake_pip(home: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    (home / "pip").mkdir()
    (home / "pip" / "__init__.py").touch()
    main = home / "pip" / "__main__.py"
    main.write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{home}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return main


BAD_HASH = f"tiny-lib==1.0 --hash=sha256:{'0' * 64}"


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("break_it", "requirements", "options", "kind", "what", "hint"),
    [
        (no_index, ["tiny-lib==1.0"], NO_OPTIONS, AssetError, "cannot read the package index", "PIP_INDEX_URL"),
        (nothing_wrong, ["tiny-lib==9"], NO_OPTIONS, UsageError, "no version satisfies tiny-lib==9", "1.0, 2.0"),
        (nothing_wrong, ["tiny-lob==1"], NO_OPTIONS, UsageError, "no file of tiny-lob==1", "spelling"),
        (
            nothing_wrong,
            ["tiny-user==1.0", "tiny-lib==2.0"],
            NO_OPTIONS,
            UsageError,
            "cannot be installed together",
            "",
        ),
        (nothing_wrong, [BAD_HASH], NO_OPTIONS, AssetError, "the wrong hash", "do not use"),
        (no_links, ["tiny-lib==1.0"], IndexOptions(offline=True), AssetError, "offline: no file of", "--find-links"),
        (no_room, ["tiny-lib==1.0"], NO_OPTIONS, AssetError, "not enough room", "PEFT_HARNESS_CACHE"),
        (full_disk, ["tiny-lib==1.0"], NO_OPTIONS, AssetError, "the disk is full", "PEFT_HARNESS_CACHE"),
        (broken_pip, ["tiny-lib==1.0"], NO_OPTIONS, AssetError, "oh no", "exit code 1"),
    ],
)
def test_a_failure_is_one_message_and_leaves_nothing(
    break_it, requirements, options, kind, what, hint, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(monkeypatch, wheels)
    with pytest.raises(HarnessError) as caught:
        create.ensure(EnvironmentSpec(name="tiny", requirements=requirements), options, silent)
    assert type(caught.value) is kind
    assert what in caught.value.what
    assert hint in caught.value.hint
    assert left() == []
    assert folder.made() == []


def test_a_conflict_lists_both_sides(wheels: Path) -> None:
    spec = EnvironmentSpec(name="tiny", requirements=["tiny-user==1.0", "tiny-lib==2.0"])
    with pytest.raises(UsageError) as caught:
        create.ensure(spec, NO_OPTIONS, silent)
    assert any("tiny-user 1.0 depends on tiny-lib<2" in line for line in caught.value.details)


@pytest.mark.nightly
def test_a_killed_creation_leaves_a_folder_that_the_next_command_removes(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = fake_pip(tmp_path, SLOW_PIP, monkeypatch)
    with command("env", "create", "--with", "tiny-lib==1.0") as creation:
        pid = main.with_name("pid")
        eventually(lambda: pid.is_file() and bool(pid.read_text()), "pip runs")
        creation.send_signal(signal.SIGKILL)
        creation.communicate()
    eventually(lambda: gone(int(pid.read_text())), "pip has died with the command")
    assert any(path.endswith("/tmp/partial") for path in left())
    shutil.rmtree(main.parent)
    with command("env", "list") as listing:
        out, _ = listing.communicate()
    assert listing.returncode == 0
    assert out.startswith("no environment exists yet\n")
    assert "tiny-lib" not in out
    assert [path for path in left() if not path.endswith(".lock")] == []
    assert create.ensure(table.of_requirement("tiny-lib==1.0"), NO_OPTIONS, silent).label == "tiny-lib 1.0"
    assert not [path for path in left() if path.endswith(".lock")]


def test_an_interrupted_creation_leaves_nothing_and_says_so(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = fake_pip(tmp_path, SLOW_PIP, monkeypatch)
    with command("env", "create", "--with", "tiny-lib==1.0") as creation:
        eventually(lambda: main.with_name("pid").is_file() and bool(main.with_name("pid").read_text()), "pip runs")
        creation.send_signal(signal.SIGINT)
        _, err = creation.communicate()
    assert creation.returncode == Exit.INFRASTRUCTURE
    assert "interrupted: environment tiny-lib-1.0 was not made\n  hint: nothing new is left of it" in err
    assert left() == []


@pytest.mark.nightly
def test_of_two_creations_at_once_one_makes_it_and_both_succeed(wheels: Path) -> None:
    with (
        command("env", "create", "--with", "tiny-lib==1.0") as one,
        command("env", "create", "--with", "tiny-lib==1.0") as two,
    ):
        outputs = [one.communicate(), two.communicate()]
    assert [one.returncode, two.returncode] == [0, 0], outputs
    assert sum(err.count("installing") for _, err in outputs) == 1
    assert [out.split(", ")[0] for out, _ in outputs] == ["tiny-lib-1.0: tiny-lib 1.0"] * 2
    assert len(folder.made()) == 1


def test_a_creation_that_must_wait_says_so_and_takes_what_the_other_made(
    tiny: MadeEnvironment, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder.place(tiny.file.spec)
    place.parent.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
         "print('held', flush=True); sys.stdin.read()", f"{place}.lock"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = []

    def say(line: str) -> None:
        said.append(line)
        shutil.copytree(tiny.folder, place, symlinks=True)  # the other process is done
        holder.communicate("")

    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr(packages, "run_pip", lambda *_: pytest.fail("it was made twice"))
        assert create.ensure(tiny.file.spec, NO_OPTIONS, say).folder == place
    assert len(said) == 1
    assert "another process makes this environment" in said[0]


@pytest.mark.nightly
def test_an_environment_leaves_out_the_packages_that_its_table_names(wheels: Path) -> None:
    spec = EnvironmentSpec(name="user", requirements=["tiny-user==1.0"])
    both = create.ensure(spec, NO_OPTIONS, silent)
    one = create.ensure(spec.model_copy(update={"without": ["Tiny_Lib"]}), NO_OPTIONS, silent)
    assert both.folder != one.folder
    found = "import importlib.util as u; print([u.find_spec(n) is not None for n in ('tiny_user', 'tiny_lib')])"
    assert said_by(both, found) == "[True, True]"
    assert said_by(one, found) == "[True, False]"
    assert integrity.damage(one) == []


def test_a_server_runs_with_the_python_of_its_environment(
    copied: MadeEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = ServerKind("tiny", "tiny_lib", lambda _: [], environment=copied.name, distributions=("tiny-lib", "absent"))
    monkeypatch.setattr(servers, "kinds", lambda: {"tiny": kind, "other": replace(kind, environment="vllm")})
    cells: Any = [SimpleNamespace(serve=name) for name in ("tiny", "other", "")]
    assert cell_environments.server_pythons(cells) == {"tiny": str(copied.python)}
    found = server_process.find_python(kind, str(copied.python))
    assert found == server_process.ServerPython(str(copied.python), {"tiny-lib": "1.0"})
    assert server_process.find_python(kind, "") == (
        f"not run: tiny is not installed; `peft-harness env create {copied.name}`"
    )


# --- repair and remove


def test_a_whole_environment_is_left_alone(copied: MadeEnvironment) -> None:
    before = copied.folder.stat().st_ino
    assert create.repair(copied, NO_OPTIONS, silent) == []
    assert copied.folder.stat().st_ino == before


@pytest.mark.parametrize(
    ("file", "content", "wrong"),
    [
        ("tiny_lib.py", "VERSION = '1.1'\n", "tiny-lib: 1 file missing or changed, e.g. tiny_lib.py"),
        pytest.param(
            "tiny_lib.py", None, "tiny-lib: 1 file missing or changed, e.g. tiny_lib.py", marks=pytest.mark.nightly
        ),
        pytest.param("tiny_lib-1.0.dist-info/RECORD", None, "tiny-lib is missing", marks=pytest.mark.nightly),
        pytest.param(
            "tiny_lib-1.0.dist-info/RECORD", "", "tiny-lib: its RECORD lists no file", marks=pytest.mark.nightly
        ),
        pytest.param(
            "tiny_lib-1.0.dist-info/RECORD",
            "tiny_l",
            "tiny-lib: 1 file missing or changed, e.g. tiny_l",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_a_damaged_environment_is_made_again(
    file: str, content: str | None, wrong: str, copied: MadeEnvironment
) -> None:
    path = folder.site_packages(copied.folder) / file
    path.unlink() if content is None else path.write_text(content)
    assert create.repair(copied, NO_OPTIONS, silent) == [wrong]
    assert integrity.damage(copied) == []
    assert said_by(copied, "import tiny_lib; print(tiny_lib.VERSION)") == "1.0"
    assert [one.folder for one in folder.made()] == [copied.folder]


def test_a_repair_that_fails_leaves_the_environment_as_it_was(
    copied: MadeEnvironment, monkeypatch: pytest.MonkeyPatch, wheels: Path
) -> None:
    path = folder.site_packages(copied.folder) / "tiny_lib.py"
    path.write_text("VERSION = '1.1'\n")
    no_links(monkeypatch, wheels)
    with pytest.raises(UsageError):
        create.repair(copied, NO_OPTIONS, silent)
    assert path.read_text() == "VERSION = '1.1'\n"


@pytest.mark.nightly
def test_a_python_that_does_not_start_is_said_with_the_way_to_repair_it(copied: MadeEnvironment) -> None:
    copied.python.unlink()
    with pytest.raises(AssetError) as caught:
        create.ensure(copied.file.spec, NO_OPTIONS, silent)
    assert "does not start" in caught.value.what
    assert "peft-harness env repair tiny-lib-1.0" in caught.value.hint
    assert create.repair(copied, NO_OPTIONS, silent) == ["the Python of this environment does not start"]
    assert said_by(copied, "import tiny_lib; print(tiny_lib.VERSION)") == "1.0"


def test_a_removed_environment_is_gone(copied: MadeEnvironment) -> None:
    folder.remove(copied)
    assert left() == []


# --- declarations


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("tochao", "unknown environment 'tochao'", "did you mean `torchao`?"),
        ("tiny-lib", "unknown environment 'tiny-lib'", "a requirement with a version"),
        ("tiny lib==1", "is no requirement", "peft==0.19.1"),
        ("tiny-lib[extra]", "names no version", "peft==0.19.1"),
    ],
)
def test_a_text_that_is_neither_name_nor_requirement(text: str, what: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        table.resolve(text, table.load())
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_all_mistakes_of_a_table_are_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "environments:\n"
        "  - {name: Mine, requirements: [tiny-lib==1.0]}\n"
        "  - {name: empty, requirements: []}\n"
        "  - {name: typo, requirements: ['tiny lib==1']}\n"
    )
    with pytest.raises(SuiteError) as caught:
        table.load(file)
    text = str(caught.value)
    for part in ("mine.yaml:2", "mine.yaml:3", "mine.yaml:4", "no requirement", "in the table of environments"):
        assert part in text


def test_an_empty_table_is_not_called_a_suite(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(SuiteError) as caught:
        table.load(tmp_path / "mine.yaml")
    assert "suite" not in str(caught.value).replace(str(tmp_path), "")
    assert "start with `environments:`" in str(caught.value)


def test_every_declared_environment_names_implementations_that_exist() -> None:
    from harness.methods.registry import discover

    names = {one.name for one in discover().implementations} | {*get_args(Loop)}
    specs = table.load().values()
    assert specs
    assert {name for spec in specs for name in spec.implementations} <= names
