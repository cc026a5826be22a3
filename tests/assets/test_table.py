"""The table of models and data: what it accepts, and what it says of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from harness import resources
from harness.assets import table
from harness.errors import SuiteError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_every_row_of_our_own_table_is_valid() -> None:
    ours = table.load_table(resources.data_folder("suites") / "sources.yaml")
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
        ({"source": "pip:m"}, "write one of pip:NAME==VERSION"),
        ({"source": "pip:m==1 --index-url=http://x"}, "has no known form"),
        ({"source": "ftp:m"}, "has no known form"),
        ({"source": "hub:org/m"}, "needs revision"),
        ({"source": "hub:org/m", "revision": "main"}, "needs revision"),
        ({"kind": "data"}, "needs rows"),
        ({"kind": "causal", "source": "shape:roberta-base"}, "without weights; write kind: encoder"),
        ({"kind": "causal", "source": "shape:roberta-base/2-blocks"}, "without weights; write kind: encoder"),
        ({"kind": "data", "source": "shape:./config.json"}, "write kind: causal or kind: encoder"),
        ({"rows": {"format": "csv"}}, "rows are for data"),
        ({"source": "file:x"}, "folder:PATH"),
        ({"kind": "data", "source": "folder:x", "rows": {"format": "csv"}}, "file:PATH"),
        ({"kind": "data", "rows": {"format": "hub"}}, "belong to hub sources"),
        ({"source": "made:toy-sentiment"}, "makes no model"),
        ({"kind": "decoder"}, "'encoder', 'causal' or 'data'"),
    ],
)
def test_a_wrong_row_is_refused_with_its_reason(change: dict[str, object], says: str) -> None:
    table.Source.model_validate(WHEEL)
    with pytest.raises(ValidationError, match="validation error") as caught:
        table.Source.model_validate({**WHEEL, **change})
    assert says in str(caught.value)


def test_all_mistakes_of_a_table_come_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "sources.yaml"
    for rows, expected in (
        (
            "  - name: b\n    kind: causal\n    source: made:tiny-llama\n    license: MIT\n"
            "  - name: c\n    kind: data\n    source: file:x\n    rows: {format: csv, lable: x}\n",
            [("5", "did you mean `licence`?"), ("9", "did you mean `label`?")],
        ),
        (
            "  - {name: a, kind: causal, source: made:tiny-llama}\n" * 3,
            [("3", "rename one of the two"), ("4", "rename one of the two")],
        ),
    ):
        path.write_text(f"sources:\n{rows}")
        with pytest.raises(SuiteError) as caught:
            table.load_table(path)
        assert [(problem.where.rsplit(":", 1)[1], problem.hint) for problem in caught.value.problems] == expected


def test_a_table_is_a_list_of_sources(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("sources: {a: 1}\n")
    with pytest.raises(SuiteError, match="write a list"):
        table.load_table(tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_text("sources: [a]\n")
    with pytest.raises(SuiteError, match="write keys and values"):
        table.load_table(tmp_path / "s.yaml")


def test_names_resolve_to_rows_hub_repositories_and_folders(tmp_path: Path) -> None:
    known = {"m": table.Source.model_validate({**WHEEL, "source": "folder:here"})}
    assert table.resolve("m", known, tmp_path).address == str(tmp_path / "here")
    assert table.resolve("./x", known, tmp_path).source == f"folder:{tmp_path / 'x'}"
    assert table.resolve("../x", known, tmp_path / "s").source == f"folder:{tmp_path / 'x'}"
    assert table.resolve("~/x", known, tmp_path).address == str(Path.home() / "x")
    found = table.resolve(f"org/m@{COMMIT}", known, tmp_path, kind="encoder")
    assert (found.kind, found.source, found.revision) == ("encoder", "hub:org/m", COMMIT)
    assert table.resolve("shape:roberta-base/2-blocks", {}, tmp_path).kind == "encoder"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("minilm-16", "did you mean 'minilm-l6'"),
        ("xyz", "named in the table: minilm-l6"),
        ("org/m", "write org/m@"),
        ("org/m@main", "40 hex digits"),
    ],
)
def test_an_unknown_name_gets_a_hint(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        table.resolve(name, {"minilm-l6": table.Source.model_validate(WHEEL)}, tmp_path)
    assert hint in str(caught.value)


def test_a_path_alone_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rows"):
        table.resolve("./x.csv", {}, tmp_path, kind="data")
