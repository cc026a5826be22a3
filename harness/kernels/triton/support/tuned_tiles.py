"""Tiles of matrix products that were measured to be faster on a card than the default tile.

`peft-harness bench --crossovers` measures these tiles and writes them into the card's table. A call only reads the
table, once per process: it never searches. Each tile is one of the `CANDIDATES` for the default tile, which all add the
terms of a sum in the same order. A candidate whose result differed in any bit is never chosen. A call therefore gives
the same bits with a table and without.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from types import FunctionType
from typing import Any

import torch
import triton

from harness.kernels.card_tables import TILES, Entry, card, tables
from harness.kernels.triton.support.gemm_tiles import CANDIDATES, GemmTile

_Key = tuple[GemmTile, str, int, int]
"""The default tile, the dtype, and the output's numbers of rows and of columns, both rounded by `bucket`."""
_MEASURED = {
    "triton": "with another version of Triton",
    "kernel": "with another version of the kernel",
    "capability": "on another GPU architecture",
}
"""Key of a `stamp` -> words for the warning that tiles are ignored because their stamp differs in this key."""
_SIZES = ("m", "n", "k", "warps", "stages")


def bucket(size: int) -> int:
    """Return a number of rows or columns, rounded up to a power of two of at least 16.

    Outputs whose numbers of rows and columns are equal after rounding share a tile.
    """
    return max(16, 1 << (size - 1).bit_length())


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype in a table, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def tuned(default: GemmTile, kernel: Any, M: int, N: int, dtype: torch.dtype, device: torch.device) -> GemmTile:
    """Return the tile for an output (M, N): the one that the card's table has instead of `default`, else `default`.

    Raises ValueError for a table with a mistake.
    """
    found = _of_card(tables(card(device)), kernel, device)
    return found.get((default, name_of(dtype), bucket(M), bucket(N)), default) if found else default


def stamp(kernel: Any, device: torch.device) -> dict[str, Any]:
    """Return the stamp of a table's tiles: the Triton version, a hash of the kernel's code, and the architecture.

    Tiles are valid only for the stamp with which they were measured.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return {"triton": triton.__version__, "kernel": _code_hash(kernel), "capability": list(capability)}


def tiles(section: Entry) -> dict[_Key, GemmTile]:
    """Return the tiles in a table's section `tiles`: key -> the tile that replaces the default tile in the key.

    Raises ValueError for a wrong or missing value, for two rows with the same key, and for an unknown name in the
    section.
    """
    rows = section["rows"].items()
    found = [_row(row) for row in rows]
    section["rows"].check_distinct([key for key, _ in found], "bucket, dtype or default")
    section.check_keys(("standing", "stamp", "shapes", "rows"))
    for row in rows:
        row.check_keys(("operation", "dtype", "M", "N", "K", "default", "tile", "ratio", "refused"))
    return dict(found)


@cache
def _of_card(found: tuple[Entry, ...], kernel: Any, device: torch.device) -> Mapping[_Key, GemmTile]:
    """Return the tiles of the first table whose stamp fits this machine, or an empty dict.

    A RuntimeWarning names each earlier table that has tiles with another stamp.
    """
    for table in found:
        if TILES not in table:
            continue
        section, here = table[TILES], stamp(kernel, device)
        if section["stamp"].value == here:
            return tiles(section)
        given = section["stamp"].value
        differs = [
            how for name, how in _MEASURED.items() if not isinstance(given, dict) or given.get(name) != here[name]
        ]
        warnings.warn(
            f"{table.file}: its tiles are ignored: they were measured {' and '.join(differs)}; "
            "hint: measure the card again by `peft-harness bench --crossovers --out DIR`",
            RuntimeWarning,
            stacklevel=2,
        )
    return {}


def _row(row: Entry) -> tuple[_Key, GemmTile]:
    default, tile = _tile(row["default"]), _tile(row["tile"])
    if default not in CANDIDATES:
        raise row["default"].wrong("a tile that has candidates")
    if tile.k != default.k:
        raise row["tile"]["k"].wrong(f"{default.k} as in the default, so that a tuned tile changes no bit of a result")
    if tile not in CANDIDATES[default]:
        raise row["tile"].wrong("a candidate for the default tile")
    dtype = row["dtype"].value
    if dtype not in ("bfloat16", "float16"):
        raise row["dtype"].wrong("bfloat16 or float16")
    return (default, dtype, bucket(row["M"].integer(1)), bucket(row["N"].integer(1))), tile


def _tile(given: Entry) -> GemmTile:
    tile = GemmTile(**{name: given[name].integer(1) for name in _SIZES})
    given.check_keys(_SIZES)
    return tile


@cache
def _code_hash(kernel: Any) -> str:
    """Return a hash of the code of a kernel, of the Triton functions that it calls, and of `CANDIDATES`.

    Comments, docstrings and line numbers do not change the hash.
    """
    sources = sorted(_source(function) for function in {kernel, *_called(kernel)})
    return hashlib.sha256("\n".join([*sources, repr(CANDIDATES)]).encode()).hexdigest()[:16]


def _called(kernel: Any) -> Iterator[Any]:
    """Yield the Triton functions that a kernel calls, directly or through other functions.

    The kernel may be compiled or interpreted.
    """
    for name in kernel.fn.__code__.co_names:
        function = kernel.fn.__globals__.get(name)
        if isinstance(getattr(function, "fn", None), FunctionType):
            yield function
            yield from _called(function)


def _source(function: Any) -> str:
    """Return the code of a Triton function without its comments and docstring."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function.fn))).body
    assert isinstance(tree, ast.FunctionDef)  # noqa: S101
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    return ast.unparse(tree)
