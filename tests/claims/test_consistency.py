"""Figures of one table are read by one convention; a figure that needs another is no plain `reproduced-under`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.errors import Exit
from support.claim_verdicts import verdicts
from support.sandbox import ForkSandbox

CUT = "digits cut off, not rounded"
CLAIMS = """\
paper: mine
title: Mine
version: v1
claims:
  - {id: size, sentence: It is so., source: Table 1, tier: exact, measure: bytes_sum, rows: [
      {id: a, printed: 144KB, with: {of: [147456]}}, {id: b, printed: 72KB, with: {of: [73728]}},
      {id: decimal, printed: 98KB, with: {of: [98304]}}, {id: both, printed: 2MB, with: {of: [2359296]}},
      {id: text, source: "section 1, Table 1", printed: 98KB, with: {of: [98304]}}]}
  - {id: count, sentence: It is so., source: "Table 2a, of others", tier: exact, measure: count_sum, rows: [
      {id: cut, printed: 18.8M, with: {of: [18874368]}}, {id: a, printed: 1.7M, with: {of: [1671168]}},
      {id: both, printed: 4.7M, with: {of: [4718592]}},
      {id: b, source: Tables 2b and 9, printed: 2.4M, with: {of: [2384064]}},
      {id: alone, source: Table 7, printed: 18.8M, with: {of: [18874368]}}]}
  - {id: reading, sentence: It is so., source: tables 9 and 3, tier: exact, measure: count_sum, rows: [
      {id: own, printed: 10, with: {of: [10]}, otherwise: [{under: twice, with: {of: [20]}}]},
      {id: a, printed: 40, with: {of: [20]}, otherwise: [{under: twice, with: {of: [40]}}]},
      {id: b, printed: 60, with: {of: [30]}, otherwise: [
        {under: thrice, with: {of: [60]}}, {under: twice, with: {of: [60]}}]}]}
  - {id: another, sentence: It is so., source: Table 3, tier: exact, printed: 5, measure: count_sum, with: {of: [5]}}
"""
KIB = "KB read as KiB"
VERDICTS = {
    "size-a": ("reproduced-under", KIB), "size-b": ("reproduced-under", KIB), "size-decimal": ("reproduced-mixed", ""),
    "size-both": ("reproduced", ""), "size-text": ("reproduced", ""),
    "count-cut": ("reproduced-mixed", CUT), "count-a": ("reproduced", ""), "count-both": ("reproduced", ""),
    "count-b": ("reproduced", ""), "count-alone": ("reproduced-under", CUT),
    "reading-own": ("reproduced-mixed", ""), "reading-a": ("reproduced-under", "twice"),
    "reading-b": ("reproduced-under", "twice"), "another": ("reproduced", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("claims") / "mine.yaml"
    path.write_text(CLAIMS)
    return path


def computed(file: Path, *options: str) -> dict[str, Any]:
    done = ForkSandbox(file.parent, {}).command("claims", "--file", str(file), "--json", *options)
    assert done.code == Exit.PASS, done.err
    return dict(json.loads(done.out))


@pytest.fixture(scope="module")
def ledger(file: Path) -> dict[str, Any]:
    return computed(file)


def test_the_convention_of_most_figures_is_the_tables(ledger: dict[str, Any]) -> None:
    assert {row["id"]: (row["verdict"], row["under"]) for row in ledger["claims"]} == VERDICTS


def test_a_figure_outside_the_convention_names_one_inside(ledger: dict[str, Any]) -> None:
    why = {row["id"]: row["why"] for row in ledger["claims"] if row["why"]}
    start = "outside the convention of Table"
    assert why == {
        "size-decimal": f"{start} 1: it needs another unit than size-a, which agrees under: {KIB}",
        "count-cut": f"{start} 2: it needs another rounding than count-a, which agrees as printed",
        "reading-own": f"{start} 9: it needs another reading than reading-a, which agrees under: twice",
    }


def test_a_verdict_does_not_depend_on_which_claims_are_asked_for(file: Path, ledger: dict[str, Any]) -> None:
    asked = computed(file, "--id", "size-decimal", "--id", "reading-a")["claims"]
    assert asked == [row for row in ledger["claims"] if row["id"] in ("size-decimal", "reading-a")]


def test_terminal_and_page_show_it(ledger: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, page = tmp_path / "claims.json", tmp_path / "page.html"
    written.write_text(json.dumps(ledger))
    assert main(["claims", "--show", str(written), "--html", str(page)]) == Exit.PASS
    printed = capsys.readouterr().out
    why = f"outside the convention of Table 1: it needs another unit than size-a, which agrees under: {KIB}"
    assert "\n  reproduced-mixed  size-decimal: printed 98KB; we get 98.3 KB = 96 KiB" in printed
    assert f"\n                    {why}\n" in printed
    assert printed.endswith("14 claims: 6 reproduced, 5 reproduced-under, 3 reproduced-mixed\n")
    shown = page.read_text()
    assert "3 reproduced-mixed" in shown
    assert shown.count(why) >= 2  # in the table, and among what is not reproduced as stated


def test_sizes_in_veras_table_1() -> None:
    found = verdicts("vera", ("vera-t1-bytes-base-lora", "vera-t1-bytes-base-vera", "vera-t1-bytes-gpt3"))
    words = {name.removeprefix("vera-t1-bytes-"): (row.verdict.value, row.under) for name, row in found.items()}
    pair = "with the frozen, shared pair A and B, although it is generated from a seed; MB read as MiB"
    assert words.pop("gpt3-lora-r256") == ("reproduced-mixed", "a GB of 1,000 MiB")
    assert [words.pop(f"gpt3-vera-r{rank}") for rank in (1, 16, 256)] == [("reproduced-mixed", pair)] * 3
    assert words.pop("base-lora-r16") == ("reproduced", "")  # 2MB, which 2.36 MB and 2.25 MiB round to
    units = {"lora-r1": "KB", "lora-r256": "MB", "vera-r1": "KB", "vera-r16": "KB", "vera-r256": "KB"}
    binary = {f"base-{name}": f"{unit} read as {unit[0]}iB" for name, unit in units.items()}
    binary |= {"gpt3-lora-r1": "MB read as MiB", "gpt3-lora-r16": "MB read as MiB"}
    assert words == {name: ("reproduced-under", under) for name, under in binary.items()}
