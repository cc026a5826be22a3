"""Rows of a data set: read, split, and made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.assets import generated, rows, table
from harness.errors import AssetError, UsageError


def read(content: str | bytes, path: Path, **how: object) -> list[rows.LabelledRow]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return rows.read(
        table.Source.model_validate({"name": "d", "kind": "data", "source": f"file:{path}", "rows": how}), path
    )


def test_valence_becomes_a_label_and_near_zero_is_dropped(tmp_path: Path) -> None:
    text = "1\t2.5\t A\tB \r\n2\t-0.5\tbad\r\n3\t0.49\tmeh\r\n4\t-0.1\tmeh\r\n\r\n"
    assert read(text, tmp_path / "d", format="valence-tsv", least=0.5) == [
        rows.LabelledRow("1", "A\tB", 1),
        rows.LabelledRow("2", "bad", 0),
    ]


def test_csv_and_jsonl_name_their_columns(tmp_path: Path) -> None:
    how = {"text": "t", "label": "y"}
    expected = [rows.LabelledRow("x", "a, b\nc", 1), rows.LabelledRow("z", "d", 0)]
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
        ("", "csv", 1, "no rows"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_by_line(
    text: str | bytes, how: str, line: int, why: str, tmp_path: Path
) -> None:
    with pytest.raises(AssetError) as caught:
        read(text, tmp_path / "d", format=how)
    assert caught.value.where == f"{tmp_path / 'd'}:{line}"
    assert why in caught.value.what


ANSWERS = {"holds": "answers", "prompt": "q", "answer": "a"}


def test_rows_may_hold_answers_or_text_and_those_that_are_too_long_are_dropped(tmp_path: Path) -> None:
    lines = '{"id": "x", "q": "1+1", "a": " 2 "}\n{"q": "12345", "a": "6"}\n{"q": "1234", "a": "5"}\n'
    expected = [rows.AnsweredRow("x", "1+1", "2"), rows.AnsweredRow("3", "1234", "5")]
    assert read(lines, tmp_path / "j", format="jsonl", longest=5, **ANSWERS) == expected
    assert read("q,a,id\n1+1,2,x\n", tmp_path / "c", format="csv", **ANSWERS) == expected[:1]
    assert read("body\nlong text\ntext\n", tmp_path / "t", format="csv", holds="text", text="body", longest=5) == [
        rows.TextRow("3", "text")
    ]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {"q": ["1+1", "2+2"], "a": ["2", "4"], "id": ["x", "y"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "p")
    expected = [rows.AnsweredRow("x", "1+1", "2"), rows.AnsweredRow("y", "2+2", "4")]
    assert read((tmp_path / "p").read_bytes(), tmp_path / "q", format="parquet", **ANSWERS) == expected
    parquet.write_table(pyarrow.table({**columns, "a": ["2", None]}), tmp_path / "n")
    for content, line, why in (
        ((tmp_path / "n").read_bytes(), 2, "the answer is empty"),
        (b"q,a\n1,2\n", 1, "not parquet"),
    ):
        with pytest.raises(AssetError) as caught:
            read(content, tmp_path / "w", format="parquet", **ANSWERS)
        assert caught.value.where == f"{tmp_path / 'w'}:{line}"
        assert why in caught.value.what


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"format": "jsonl", "prompt": "q"}, "rows hold labels, which have no prompt; write holds: answers"),
        ({"format": "jsonl", "holds": "answers", "label": "y"}, "rows hold answers, which have no label"),
        ({"format": "valence-tsv", "holds": "text"}, "valence-tsv hold labels, not text"),
        ({"format": "splits"}, "belong to lm-eval's tasks"),
    ],
)
def test_what_rows_hold_and_their_columns_agree(how: dict[str, str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        table.Source.model_validate({"name": "d", "kind": "data", "source": "file:d", "rows": how})


def test_a_training_set_of_its_own_leaves_the_other_to_the_test() -> None:
    asked = [rows.AnsweredRow(str(i), f"prompt {i}", "a") for i in range(9)]
    taught = [rows.AnsweredRow("same", "prompt 3", "b"), rows.TextRow("t", "some text")]
    train, test = rows.split(asked, 9, 0, taught)
    assert sorted(row.id for row in test) == [row.id for row in asked]
    assert train == taught[1:], "what the test asks is not learnt"
    with pytest.raises(UsageError, match="cannot test 10 of 9 rows"):
        rows.split(asked, 10, 0, taught)


def test_a_text_that_holds_what_the_test_asks_is_not_trained_on() -> None:
    asked = [rows.AnsweredRow("0", "Who wrote  Emma?", "Austen"), rows.AnsweredRow("1", "art", "x")]
    taught = [
        rows.TextRow("whole", "Q:who wrote\nEmma? A: Austen"),
        rows.TextRow("word", "It is ART."),
        rows.TextRow("part", "a party of artists"),
        rows.TextRow("begun", "Who wrote Emm"),
        rows.AnsweredRow("same", " who wrote emma? ", "Austen"),
        rows.AnsweredRow("longer", "Tell me: who wrote Emma?", "Austen"),
    ]
    train, _ = rows.split(asked, 2, 0, taught)
    assert [row.id for row in train] == ["part", "begun", "longer"]


def many() -> Iterator[rows.LabelledRow]:
    for number in range(300):
        yield rows.LabelledRow(str(number), f"text {number % 250}", number % 2)


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


def test_toy_data_are_seeded_balanced_and_need_a_majority(tmp_path: Path) -> None:
    source = table.Source.model_validate(
        {"name": "d", "kind": "data", "source": "made:toy-sentiment", "rows": {"format": "jsonl"}}
    )
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        generated.toy_sentiment(tmp_path / name)
        written.append((tmp_path / name / "rows.jsonl").read_bytes())
    assert written[0] == written[1]
    found = rows.read(source, tmp_path / "a" / "rows.jsonl")
    assert len({row.text for row in found}) == len(found) == 600
    assert sum(row.label for row in found) == 300
    good = [sum(word in generated.OPINIONS[1] for word in row.text.split()) for row in found]
    bad = [sum(word in generated.OPINIONS[0] for word in row.text.split()) for row in found]
    assert all((g > b) == bool(row.label) for g, b, row in zip(good, bad, found, strict=True))
    assert sum(min(g, b) for g, b in zip(good, bad, strict=True)) > 200, "many sentences hold both kinds"
