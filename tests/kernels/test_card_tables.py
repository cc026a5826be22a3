"""The table of a card: its crossovers, its tuned tiles, and tables that are refused or ignored."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the tables are of Triton's kernels")

from harness.bench import crossovers
from harness.kernels import card_tables, crossover
from harness.kernels.triton.support import tuned_tiles
from harness.kernels.triton.support.gemm_tiles import CANDIDATES, FEW_ROWS, LARGE, LARGEST, gemm_tile
from harness.kernels.triton.support.low_rank_gemm import KERNEL

CARD = "ACME X1 (80 GB)"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_table_is_left() -> Iterator[None]:
    card_tables.tables.cache_clear()
    yield
    card_tables.tables.cache_clear()


def write_table(folder: Path, monkeypatch: pytest.MonkeyPatch, table: Any, card: str = CARD) -> Path:
    """Write a table of a card into a folder of its own, and make it the folder of the variable."""
    file = folder / card_tables.file_name(card)
    file.write_text(table if isinstance(table, str) else json.dumps(table))
    monkeypatch.setenv(card_tables.VARIABLE, str(folder))
    card_tables.tables.cache_clear()
    return file


def measured(operation: str, *rows: tuple[int, int, float]) -> dict[str, Any]:
    """Return the table of a card. rows: E, the size, and the time of the fused kernel / that of the other way."""
    size = card_tables.CROSSOVERS[operation]
    return {operation: crossovers.table(operation, [{"E": E, size: n, "ratio": ratio} for E, n, ratio in rows])}


# --- crossovers ------------------------------------------------------------------------------------------------------


def test_a_card_without_a_table_has_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = crossover.crossover_of("nf4_linear", "", 16384)
    assert 0 < default < inf
    write_table(tmp_path, monkeypatch, measured("nf4_linear", (1, 1, 2.0)))
    assert crossover.crossover_of("nf4_linear", CARD, 16384) == 0
    with pytest.warns(RuntimeWarning, match="acme-x2.json"):
        assert crossover.crossover_of("nf4_linear", "ACME X2", 16384) == default


@pytest.mark.parametrize("folder", ["mistyped", ""])
def test_a_folder_without_a_table_of_the_card_is_named_once(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(card_tables.VARIABLE, str(tmp_path / folder))
    with pytest.warns(RuntimeWarning) as said:
        assert crossover.crossover_of("lora_linear", CARD, 4096) == inf
    (one,) = said
    assert str(tmp_path / folder / card_tables.file_name(CARD)) in str(one.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert crossover.crossover_of("lora_linear", CARD, 1024) == inf


def test_while_a_card_is_measured_only_the_given_tables_and_the_default_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(tmp_path, monkeypatch, "{")
    given = card_tables.Entry(tmp_path, "", measured("lora_linear", (1024, 16, 2.0)))
    with card_tables.only_tables(given):
        assert crossover.crossover_of("lora_linear", CARD, 4096) == 15
        assert crossover.crossover_of("multi_lora_linear", CARD, 4096) == inf
        with card_tables.only_tables():
            assert crossover.crossover_of("lora_linear", CARD, 4096) == inf
    with pytest.raises(ValueError, match="is not JSON"):
        crossover.crossover_of("lora_linear", CARD, 4096)


@pytest.mark.parametrize("operation", ["multi_lora_linear", "lora_linear"])
@pytest.mark.parametrize("E", [0, 1, 100_000])
def test_by_default_triton_computes_every_size(operation: str, E: int) -> None:
    assert crossover.crossover_of(operation, "", E) == inf


def test_a_measured_table_wins_for_the_weights_that_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ((1024, 1, 2.0), (4096, 1, 0.5), (4096, 8, 0.9), (4096, 16, 1.5), (4096, 32, 0.5))
    write_table(tmp_path, monkeypatch, measured("nf4_linear", *rows))
    assert card_tables.file_name(CARD) == "acme-x1-80-gb.json"
    found = [crossover.crossover_of("nf4_linear", CARD, E) for E in (512, 1024, 4096, 9999)]
    assert found == [0, 0, 8, 8]  # 32 tokens are faster again, but not all numbers up to them
    assert crossover.crossover_of("lora_linear", CARD, 4096) == inf  # the table lacks it, so the default decides


@pytest.mark.parametrize(
    ("rows", "most"),
    [
        ([(16, 0.8), (64, 1.2), (128, 1.3)], 63),  # between two measured sizes, Triton is used
        ([(16, 1.2), (64, 0.8), (128, 1.3)], 127),
        ([(16, 0.8), (64, 0.9), (128, 0.9)], None),
        ([(16, 1.2), (64, 1.2), (128, crossovers.MARGIN)], None),  # a tie
        ([(16, 1.2), (64, 1.2), (64, 0.9), (128, 1.3), (128, 1.2)], 127),  # slower in one of two cases
        ([(16, 1.2), (64, 1.2)], 15),
    ],
)
def test_another_way_than_triton_must_be_faster_from_a_rank_on(rows: list[tuple[int, float]], most: int | None) -> None:
    table = measured("lora_linear", *((4096, rank, ratio) for rank, ratio in rows))
    assert table["lora_linear"]["rows"] == [{"E": 4096, "rank": most}]


@pytest.mark.parametrize(
    ("table", "key", "expected"),
    [
        ("{", "", "is not JSON"),
        ([], "table", "must be an object"),
        ({"lora_liner": {"rows": []}}, "lora_liner", "unknown key"),
        ('{"lora_linear": {"rows": []}, "lora_linear": {"rows": []}}', "lora_linear", "the same object has this key twice"),
        ({"card": "ACME X1 80 GB"}, "card", "must be 'ACME X1 (80 GB)'"),
        ({"lora_linear": {"rows": [{"E": 1, "rank": 8}], "row": []}}, "lora_linear.row", "unknown key"),
        ({"lora_linear": {"rows": [{"E": 1, "rank": 8, "D": 4}]}}, "lora_linear.rows[0].D", "unknown key"),
        (
            {"lora_linear": {"rows": [{"E": 1, "rank": 8}, {"E": 2, "rank": 8}, {"E": 1, "rank": 16}]}},
            "lora_linear.rows[2]", "must be a row with another E than row 0",
        ),
        ({"lora_linear": []}, "lora_linear", "must be an object with the key 'rows'"),
        ({"lora_linear": {"rows": []}}, "lora_linear.rows", "must be a list of at least one row"),
        ({"lora_linear": {"rows": {"E": 1}}}, "lora_linear.rows", "must be a list"),
        ({"lora_linear": {"rows": [{"E": 1}]}}, "lora_linear.rows[0]", "must be an object with the key 'rank'"),
        ({"lora_linear": {"rows": [{"E": 1, "rank": "8"}]}}, "lora_linear.rows[0].rank", "must be an integer"),
        ({"lora_linear": {"rows": [{"E": -1, "rank": 8}]}}, "lora_linear.rows[0].E", "must be an integer"),
        ({"lora_linear": {"rows": [{"E": True, "rank": 8}]}}, "lora_linear.rows[0].E", "must be an integer"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_refused_with_its_file_and_key(
    table: Any, key: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_table(tmp_path, monkeypatch, table)
    with pytest.raises(ValueError, match="hint: measure the card again") as caught:
        crossover.crossover_of("lora_linear", CARD, 4096)
    assert str(caught.value).startswith(": ".join(filter(None, [str(file), key, expected])))


# --- tiles -----------------------------------------------------------------------------------------------------------

OTHER = CANDIDATES[LARGE][1]


def tile(one: Any) -> dict[str, int]:
    return {name: getattr(one, name) for name in ("m", "n", "k", "warps", "stages")}


def tile_row(**changed: Any) -> dict[str, Any]:
    return {"dtype": "bfloat16", "M": 4096, "N": 1024, "default": tile(LARGE), "tile": tile(OTHER)} | changed


def tile_table(*rows: dict[str, Any], **stamp: Any) -> dict[str, Any]:
    return {"tiles": {"stamp": tuned_tiles.stamp(KERNEL, CPU) | stamp, "rows": list(rows)}}


def chosen(M: int, N: int, dtype: torch.dtype = torch.bfloat16, default: Any = LARGE) -> Any:
    return tuned_tiles.tuned(default, KERNEL, M, N, dtype, CPU)


def test_a_tuned_tile_is_used_in_its_bucket_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(4096, 1024) == LARGE
    write_table(tmp_path, monkeypatch, tile_table(tile_row()), card="")
    assert [chosen(M, N) for M, N in ((4096, 1024), (2049, 513))] == [OTHER, OTHER]
    assert [chosen(M, N) for M, N in ((2048, 1024), (4097, 1024), (4096, 512), (4096, 1025))] == [LARGE] * 4
    assert chosen(4096, 1024, torch.float16) == LARGE
    assert chosen(4096, 1024, default=LARGEST) == LARGEST


@pytest.mark.parametrize(
    ("changed", "how"),
    [
        ({"triton": "2.0.0"}, "with another version of Triton"),
        ({"kernel": "0"}, "with another version of the kernel"),
        ({"capability": [9, 0], "kernel": "0"}, "with another version of the kernel and on another GPU architecture"),
    ],
)
def test_tiles_of_another_version_or_card_are_ignored_and_this_is_said_once(
    changed: dict[str, Any], how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_table(
        tmp_path, monkeypatch, tile_table(tile_row(), **changed) | measured("lora_linear", (1, 8, 2.0)), ""
    )
    with pytest.warns(RuntimeWarning) as said:
        assert chosen(4096, 1024) == LARGE
    assert [str(one.message).partition(";")[0] for one in said] == [
        f"{file}: its tiles are ignored: they were measured {how}"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(4096, 1024) == LARGE
    assert crossover.crossover_of("lora_linear", "", 4096) == 7  # a crossover still holds


@pytest.mark.parametrize(
    ("row", "key", "expected"),
    [
        (tile_row(tile=tile(OTHER) | {"k": 32}), "tile.k", "must be 64 as in the default"),
        (tile_row(tile=tile(OTHER) | {"warps": 16}), "tile", "must be a candidate for the default tile"),
        (tile_row(default=tile(OTHER)), "default", "must be a tile that has candidates"),
        (tile_row(dtype="float32"), "dtype", "must be bfloat16 or float16"),
        (tile_row(M="4096"), "M", "must be an integer of at least 1"),
        (tile_row(columns=4), "columns", "unknown key"),
        (tile_row(tile=tile(OTHER) | {"ctas": 2}), "tile.ctas", "unknown key"),
    ],
)
def test_a_wrong_tile_is_refused(
    row: dict[str, Any], key: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_table(tmp_path, monkeypatch, tile_table(row), card="")
    with pytest.raises(ValueError, match="hint: measure the card again") as caught:
        chosen(4096, 1024)
    assert str(caught.value).startswith(f"{file}: tiles.rows[0].{key}: {expected}")


def test_two_tiles_for_one_bucket_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [tile_row(), tile_row(dtype="float16"), tile_row(M=4000, tile=tile(CANDIDATES[LARGE][0]))]
    file = write_table(tmp_path, monkeypatch, tile_table(*rows), card="")
    with pytest.raises(ValueError, match=r"tiles\.rows\[2\]: must be a row with another bucket") as caught:
        chosen(4096, 1024)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize("default", CANDIDATES)
def test_a_candidate_sums_in_the_order_of_its_default(default: Any) -> None:
    assert default not in CANDIDATES[default]
    for one in CANDIDATES[default]:
        assert one.k == default.k
        assert (one.m < 64) == (default.m < 64)  # another matrix instruction on an H100


def test_every_tile_without_a_table_has_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.kernels.triton.support.gemm_tiles._multiplies_from_shared_memory", lambda _: True)
    monkeypatch.setattr("harness.kernels.triton.support.gemm_tiles.interpreted", lambda: False)
    shapes = [(M, N) for M in (1, 17, 33, 256, 8192) for N in (16, 1024, 14336)]
    found = {gemm_tile(M, N, torch.bfloat16, CPU) for M, N in shapes}
    assert found == {*FEW_ROWS, LARGE, LARGEST}
    assert found <= CANDIDATES.keys()


KERNELS = {
    "first": "return value + 1",
    "commented": '"""A docstring."""  # and a comment\n    return value + 1',
    "changed": "return value + 2",
}


def test_the_stamp_changes_with_the_code_of_a_called_function_and_not_with_its_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {}
    for name, body in KERNELS.items():
        head = "import triton\nimport triton.language as tl\n" + "\n" * len(found)
        called = f"@triton.jit\ndef called(value):\n    {body}\n"
        kernel = "@triton.jit\ndef kernel(x):\n    tl.store(x, called(tl.load(x)))\n"
        (tmp_path / f"stamped_{name}.py").write_text(head + called + kernel)
        found[name] = tuned_tiles.stamp(import_module(f"stamped_{name}").kernel, CPU)["kernel"]
        monkeypatch.delitem(sys.modules, f"stamped_{name}")
    assert found["first"] == found["commented"] != found["changed"]
