"""The table of `fit`: its columns add up, and it fits the terminal."""

from __future__ import annotations

import random
from typing import Any

import pytest

from harness import console
from harness.memory_model.size_units import UNITS
from harness.report import fit_table

PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits")


def row(ledger: dict[str, int | None], **more: Any) -> dict[str, Any]:
    facts = {"method": "lora", "base": "none", "optimizer": "adamw", "because": "", "rank": 8, "trainable": 10**7,
             "batch": 2, "longest": 512, "untouched": "", "no_peak": ""}  # fmt: skip
    return facts | {"ledger": ledger} | more


def document(rows: list[dict[str, Any]], memory_B: int, unit: str) -> dict[str, Any]:
    return {
        "model": "m", "source": "s", "parameters": 10, "memory_B": memory_B, "unit": unit, "dtype": "bfloat16",
        "tokens": 512, "targets": ["q"], "gradient_checkpointing": False, "layerwise_updates": False,
        "activations_known": True, "checked": True, "rows": rows, "left_out": [],
    }  # fmt: skip


def drawn(seed: int, unit: str) -> dict[str, Any]:
    """Return a document with rows of random sizes, of which some do not fit, and some need less than their parts."""
    dice, memory_B = random.Random(seed), 24 * UNITS[unit]
    rows = []
    for _ in range(20):
        sizes = [dice.choice([0, 1, int(10 ** dice.uniform(0, 12))]) * UNITS[unit] // 10**9 for _ in PARTS]
        needed = max(1, int(sum(sizes) * dice.uniform(0.5, 1.5)))
        ledger: dict[str, int | None] = {f"{part}_B": size for part, size in zip(PARTS, sizes, strict=True)}
        if dice.random() < 0.2:
            ledger |= {"activations_B": None, "logits_B": None}
        rows.append(row(ledger | {"host_B": 0, "left_B": memory_B - needed}))
    return document(rows, memory_B, unit)


@pytest.mark.parametrize("unit", ["GiB", "GB", "MiB"])
@pytest.mark.parametrize("seed", range(20))
def test_the_printed_columns_add_up(seed: int, unit: str) -> None:
    found = drawn(seed, unit)
    lines = fit_table.lines(found)
    start = next(n for n, line in enumerate(lines) if line.startswith("  method"))
    names = lines[start].split()
    sizes = names[names.index("weights") :]
    assert sizes[-2:] == ["needed", "free"]
    for line, one in zip(lines[start + 1 :], found["rows"], strict=False):
        texts = line.split()[-len(sizes) :]
        *parts, needed, free = (0 if text == "-" else int(text.replace(",", "").replace(".", "")) for text in texts)
        assert sum(parts) == needed
        assert needed + free == 24_00
        assert (
            0 <= needed * UNITS[unit] - 100 * (found["memory_B"] - one["ledger"]["left_B"]) < UNITS[unit]
        )  # rounded up
        assert (free >= 0) == (one["ledger"]["left_B"] >= 0)
        for part, size in zip(sizes, parts, strict=False):
            if part != "other":
                assert abs(100 * (one["ledger"][f"{part}_B"] or 0) / UNITS[unit] - size) <= 1


def test_a_narrow_terminal_shows_the_result_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = drawn(1, "GiB")
    wide = fit_table.lines(found)
    for width, hidden in ((80, True), (200, False)):
        monkeypatch.setattr(fit_table, "terminal_width", lambda width=width: width)
        lines = fit_table.lines(found)
        table = [line for line in lines if line.startswith("  ")]
        assert max(map(len, table)) <= width
        assert ("weights" not in table[0]) == hidden
        assert {"needed", "free"} <= set(table[0].split())
        assert lines[-1].startswith("7 columns with the parts of the memory") == hidden
    assert lines == wide


def test_the_width_is_that_of_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "71")
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert console.terminal_width() is None
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert console.terminal_width() == 71
