"""The claim ledger: how figures are read, what is refused, what each verdict is given for, what the command prints."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.claims import claim_file, compute, explain, selection, table, worker
from harness.claims.judge import ClaimVerdict, JudgedClaim, Missing, judge
from harness.claims.measure import MeasureResult
from harness.claims.measures.conformance import conforms
from harness.claims.printed_number import Rounding, agrees, parse
from harness.cli import main
from harness.errors import Exit, SuiteError
from harness.methods.registry import Registry, implements
from harness.process.supervisor import LastLines, python
from reference import lora
from support.processes import PATIENCE_S, eventually, gone
from support.sandbox import ForkSandbox

SHAPE = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
# Of two blocks 8 -> 8 and 8 -> 4 at rank 2: 2 x (2 x (8 + 8) + 2 x (8 + 4)).
TRAINED = 112


def write(folder: Path, claims: str, head: str = "paper: mine\ntitle: Mine\nversion: v1\n") -> Path:
    """Write a claim file beside a shape's config.json."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    path = folder / "mine.yaml"
    path.write_text(f"{head}claims:\n{claims}")
    return path


def line(folder: Path, printed: str, *, rank: int = 2, more: str = "", measure: str = "trainable_parameters") -> str:
    config = f"{{rank: {rank}, targets: [q_proj, v_proj]}}"
    return (
        f"  - {{id: one, sentence: 'It trains {{printed}}.', source: Table 1, tier: exact, printed: '{printed}',"
        f" measure: {measure}, with: {{model: {folder}/config.json, method: lora, config: {config}}}{more}}}\n"
    )


@pytest.mark.parametrize(
    ("text", "dimension", "value", "under"),
    [
        ("0.3M", "count", 294_912, ""),
        ("18.8M", "count", 18_874_368, "digits cut off, not rounded"),
        ("603.8M", "count", 603_979_776, None),
        ("3x", "ratio", Fraction(399, 100), None),
        ("0.4M", "count", 491_520, "digits cut off, not rounded"),
        ("35MB", "bytes", 36 * 2**20, None),
        ("36MB", "bytes", 36 * 2**20, "MB read as MiB"),
        ("36MiB", "bytes", 36 * 2**20, ""),
        ("36 MiB", "bytes", 36_000_000, None),
        ("0.28M", "count", 290_304, None),  # a million of things is no MiB
        ("< 48 GB", "bytes", 47_999_999_999, ""),
        ("< 48 GB", "bytes", 48 * 2**30 - 1, "GB read as GiB"),
        ("< 48 GB", "bytes", 48 * 2**30, None),
        (">= 3x", "ratio", 3, ""),
        ("0.83%", "share", Fraction(8325, 10**6), ""),
        ("0.67%", "share", Fraction(6650, 10**6), ""),  # half a last digit is still nearest
        ("0.67%", "share", Fraction(6649, 10**6), None),
        ("1,500.0M", "count", 1_566_913_538, None),
        ("0.127 bit", "bits", Fraction(8, 64) + Fraction(32, 64 * 256), ""),
    ],
)
def test_a_figure_comes_out_under_the_reading_that_is_named(
    text: str, dimension: str, value: Fraction, under: str
) -> None:
    assert agrees(parse(text, dimension), Fraction(value), Rounding()) == under  # type: ignore[arg-type]


def test_an_order_of_magnitude_and_a_figure_about_right() -> None:
    ten_thousand = parse("10,000x", "ratio")
    assert agrees(ten_thousand, Fraction(9285), Rounding("magnitude")) == ""
    assert agrees(ten_thousand, Fraction(37_141), Rounding("magnitude")) is None
    about = Rounding("about", Fraction(5, 100))
    assert [agrees(parse("100x", "ratio"), Fraction(n), about) for n in (94, 95, 105, 106)] == [None, "", "", None]


@pytest.mark.parametrize(
    ("text", "dimension"), [("0.3 MB", "count"), ("12 ms", "bytes"), ("much", "ratio"), ("3%", "bits")]
)
def test_a_wrong_unit_is_told(text: str, dimension: str) -> None:
    with pytest.raises(ValueError, match=r"unit|figure"):
        parse(text, dimension)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    """Return what the command exits with and prints of one file; computing takes seconds, so all share it."""
    folder = tmp_path_factory.mktemp("claims")
    ranks = "{under: rank 3, with: {config: {rank: 3}}}, {under: rank 4, with: {config: {rank: 4}}}"
    claims = [
        line(folder, str(TRAINED)),
        line(folder, str(TRAINED), rank=4).replace("id: one", "id: wider"),
        line(folder, str(2 * TRAINED), more=f", otherwise: [{ranks}]").replace("id: one", "id: other"),
        line(folder, "1").replace("v_proj", "nowhere").replace("id: one", "id: wrong"),
    ]
    done = ForkSandbox(folder, {}).command("claims", "--file", str(write(folder, "".join(claims))), "--json")
    return done.code, done.out


@pytest.mark.slow
def test_a_rank_in_the_file_changes_the_result(ledger: tuple[int, str]) -> None:
    code, printed = ledger
    one, wider, _, _ = json.loads(printed)["claims"]
    assert code == Exit.FAIL
    assert (one["verdict"], one["tried"][0]["value"]) == ("reproduced", TRAINED)
    assert (wider["verdict"], wider["tried"][0]["value"]) == ("not-reproduced", 2 * TRAINED)
    assert "= 224" in wider["how"]


@pytest.mark.slow
def test_another_reading_is_named_in_the_verdict(ledger: tuple[int, str]) -> None:
    other = json.loads(ledger[1])["claims"][2]
    assert (other["verdict"], other["under"]) == ("reproduced-under", "rank 4")
    assert [one["value"] for one in other["tried"]] == [TRAINED, TRAINED * 3 / 2, 2 * TRAINED]


def test_one_claim_that_cannot_be_computed_takes_no_other(ledger: tuple[int, str]) -> None:
    rows = json.loads(ledger[1])["claims"]
    assert [row["verdict"] for row in rows] == ["reproduced", "not-reproduced", "reproduced-under", "not-run"]
    assert re.search(r"mine\.yaml:8: could not be computed: no .* layer is named 'nowhere'", rows[3]["why"])
    assert "`peft-harness explain trainable_parameters`" in rows[3]["why"]
    assert "Error" not in rows[3]["why"]


def test_what_was_computed_is_shown_again(
    ledger: tuple[int, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "claims.json", tmp_path / "claims.html"
    file.write_text(ledger[1])
    assert main(["claims", "--show", str(file), "--html", str(page), "--json"]) == ledger[0]
    assert capsys.readouterr().out == ledger[1]
    text = page.read_text()
    assert all(f'id="{row["id"]}"' in text for row in json.loads(ledger[1])["claims"])
    assert main(["claims", "--show", str(file), "--id", "one"]) == Exit.PASS
    assert main(["claims", "--show", str(file), "--headlines"]) == Exit.USAGE
    assert "none of these claims belongs to a headline" in capsys.readouterr().err
    file.write_text(ledger[1][:-20])
    assert main(["claims", "--show", str(file)]) == Exit.USAGE
    file.write_text(ledger[1].replace('"schema": 4', '"schema": 99'))
    assert main(["claims", "--show", str(file)]) == Exit.USAGE
    said = capsys.readouterr().err
    assert "is not JSON" in said
    assert "schema 99" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"verdict": "maybe"}, "claim wider: verdict: "),
        ({"ours": 7}, "claim wider: ours: "),
        ({"tried": [{"under": ""}]}, "claim wider: tried.0.measure: "),
        ({"more": 1}, "claim wider: more: "),
        ({"id": None}, "claim number 2: id: "),
        ({"id": "one"}, "duplicate claim one"),
    ],
)
def test_a_damaged_ledger_is_told_by_claim_and_key(
    ledger: tuple[int, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str
) -> None:
    written = json.loads(ledger[1])
    written["claims"][1] |= change
    file = tmp_path / "claims.json"
    file.write_text(json.dumps(written))
    assert main(["claims", "--show", str(file)]) == Exit.USAGE
    told = capsys.readouterr().err
    assert f"{file}: {said}" in told
    assert "compute the claims again" in told
    assert "validation error" not in told


def test_headlines_have_a_page_of_their_own(
    ledger: tuple[int, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It counts what was decided at full size apart from what a rehearsal stood in for."""
    written = json.loads(ledger[1])
    one, wider, other, _ = written["claims"]
    one["headline"] = wider["headline"] = "few <parameters>"
    wider |= {"tier": "gpu-synthetic", "scale": "CPU rehearsal", "verdict": "reproduced"}
    file, page = tmp_path / "claims.json", tmp_path / "headlines.html"
    file.write_text(json.dumps(written))
    assert main(["claims", "--show", str(file), "--headlines", "--html", str(page)]) == Exit.PASS
    assert "2 claims: 2 reproduced (1 by a stand-in)" in capsys.readouterr().out
    text = " ".join(page.read_text().split())
    overview = re.search(r'<a href="#headline-1">Few &lt;parameters&gt;</a></th>(.*?)</tr>', text)
    assert overview
    cells = [re.sub(r"<[^>]+>", "", cell).strip() for cell in overview[1].split("</td>") if cell]
    assert cells == ["✓ 1 reproduced", "–", "✓ 1 reproduced", "–"]
    assert "of 2 claims in 1 headline." in text
    assert f'id="{other["id"]}"' not in text
    assert one["how"] in text


def test_a_ledger_of_schema_1_is_read(
    ledger: tuple[int, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what stood in for the paper's scale in words alone."""
    written = json.loads(ledger[1]) | {"schema": 1}
    for claim in written["claims"]:
        del claim["scale"]
    written["claims"][0]["why"] = "by a stand-in: CPU rehearsal"
    file = tmp_path / "claims.json"
    file.write_text(json.dumps(written))
    assert main(["claims", "--show", str(file), "--id", "one"]) == Exit.PASS
    assert capsys.readouterr().out.endswith("1 claim: 1 reproduced (1 by a stand-in)\n")


def test_text_names_source_printed_ours_and_verdict(ledger: tuple[int, str]) -> None:
    text = "\n".join(
        table.lines([JudgedClaim.model_validate_json(json.dumps(row)) for row in json.loads(ledger[1])["claims"]])
    )
    assert "reproduced        one: printed 112; we get 112  [Table 1]" in text
    assert "under: rank 4" in text
    assert text.endswith("4 claims: 1 reproduced, 1 reproduced-under, 1 not-reproduced, 1 not-run")


def test_text_says_what_came_out_by_a_stand_in(ledger: tuple[int, str]) -> None:
    rows = [JudgedClaim.model_validate_json(json.dumps(row)) for row in json.loads(ledger[1])["claims"]]
    small = [
        row.model_copy(update={"scale": "small scale", "why": "by a stand-in: small scale"} if row.id == "one" else {})
        for row in rows
    ]
    text = "\n".join(table.lines(small))
    after = text[text.index("reproduced        one:") :].splitlines()
    assert after[1].strip() == "by a stand-in: small scale"
    assert text.endswith("4 claims: 1 reproduced (1 by a stand-in), 1 reproduced-under, 1 not-reproduced, 1 not-run")


@pytest.mark.parametrize(
    ("verdicts", "failed", "strict", "code"),
    [
        (["reproduced", "not-run"], False, False, Exit.PASS),
        (["reproduced", "not-run"], False, True, Exit.INCONCLUSIVE),
        (["reproduced", "inconclusive"], False, True, Exit.INCONCLUSIVE),
        (["reproduced-under", "not-run"], True, False, Exit.INFRASTRUCTURE),
        (["not-reproduced", "not-run"], True, False, Exit.FAIL),
        (["not-run"], False, False, Exit.NOTHING_COMPARED),
        ([], False, False, Exit.NOTHING_COMPARED),
    ],
)
def test_exit_codes(ledger: tuple[int, str], verdicts: list[str], failed: bool, strict: bool, code: Exit) -> None:
    one = json.loads(ledger[1])["claims"][0]
    rows = [JudgedClaim.model_validate_json(json.dumps(one | {"verdict": v, "failed": failed})) for v in verdicts]
    assert selection.exit_of(rows, strict=strict) == code


def test_rows_share_what_they_do_not_say(tmp_path: Path) -> None:
    rows = ", rows: [{id: a, printed: 112, note: of this row}, {id: b, printed: 1K, source: Table 2}]"
    table = line(tmp_path, "x", more=rows).replace("printed: 'x', ", "")
    claims = claim_file.load([write(tmp_path, table)])
    assert [(c.id, c.source, c.sentence, c.note) for c in claims] == [
        ("one-a", "Table 1", "It trains 112.", "of this row"),
        ("one-b", "Table 2", "It trains 1K.", ""),
    ]


def test_every_mistake_of_a_file_is_told_at_once_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistakes = """\
  - id: a
    sentence: no source
    tier: exact
    printed: 3 GB
    measure: trainable_parameters
    with: {model: llama-7, method: lorra, config: {rank: 8}, also: 3}
  - id: a2
    sentence: a measure that nobody knows
    source: Table 1
    tier: exact
    printed: 3x
    measure: ratios
    with: {of: 3, to: 1}
  - id: b
    sentence: a config that does not fit
    source: Table 1
    tier: exact
    printed: 3x
    rounding: up
    measure: ratio
    with:
      of: {measure: trainable_parameters, with: {model: llama-7b, method: lora, config: {rank: 0, ranks: 2}}}
      to: many
      from: 2
"""
    file = write(tmp_path, mistakes, head="paper: mine\ntitle: Mine\n")
    assert main(["claims", "--file", str(file)]) == Exit.USAGE
    said = capsys.readouterr().err
    expected = [
        (":1: ", "`version` is missing"), (":4: ", "`source` is missing"), (":7: ", "'GB'"), (":9: ", "llama-7b"),
        (":9: ", "unknown method `lorra`"), (":9: ", "`also`"), (":15: ", "did you mean `ratio`?"),
        (":22: ", "unknown `rounding` 'up'"), (":25: ", "`rank` of lora"), (":25: ", "lora has no `ranks`"),
        (":26: ", "'many' is not a quantity"), (":27: ", "no argument `from`"),
    ]  # fmt: skip
    lines = said.splitlines()
    for place, words in expected:
        at = [i for i, one in enumerate(lines) if f"mine.yaml{place}" in one and words in " ".join(lines[i : i + 2])]
        assert at, f"{place}{words} is not in:\n{said}"
    assert f"{len(expected)} mistakes in the claim file" in said


def test_mistakes_of_the_shape_of_a_claim_file_come_first(tmp_path: Path) -> None:
    claims = """\
  - id: one
    sentence: s
    source: Table 1
    source: Table 2
    tier: easy
    printed: 3 GB
    surplus: 1
  - id: table
    rows:
      - 7
      - {id: !x b, printed: much, with: 7, rounding: up}
"""
    with pytest.raises(SuiteError) as caught:
        claim_file.load([write(tmp_path, claims)])
    assert [(int(p.where.rpartition(":")[2]), p.what.partition(",")[0]) for p in caught.value.problems] == [
        (8, "`source` is given twice"), (9, "`tier` is 'easy'"),
        (11, "unknown key `surplus`"), (14, "an entry of `rows` is 7"),
        (15, "`with` is 7"), (15, "the tag `!x` is not allowed here"),
    ]  # fmt: skip


def test_no_mistake_of_a_claim_file_hides_another(tmp_path: Path) -> None:
    claims = """\
  - id: one
    sentence: 'It is {printed} {nobody}.'
    source: Table 1
    tier: exact
    printed: 3 GB
    measure: ratio
    with: {of: 1, to: 1}
  - id: two
    sentence: s
    tier: exact
    printed: 3
    measure: trainable_parameter
    with: {model: llama-7, method: lora, config: {rank: 0, ranks: 2}}
  - id: table
    sentence: s
    source: Table 3
    tier: exact
    measure: trainable_parameters
    with: {model: llama-7b, method: lora}
    rows:
      - {id: a, printed: 3 GB}
      - {id: a, printed: 3}
      - {id: b, printed: much, rounding: up}
      - {id: c, printed: 4, otherwise: [{under: x, measure: ratio, with: {of: many, to: 1}}]}
  - id: two
    sentence: s
    source: Table 4
    tier: exact
    printed: 1x
    measure: ratio
    with:
      of: {measure: linear_layer, with: {x: 1}}
      to: {measure: ratio, with: {of: 1, over: 2}}
"""
    with pytest.raises(SuiteError) as caught:
        claim_file.load([write(tmp_path, claims)])
    found = [(int(p.where.rpartition(":")[2]), p.what.replace(str(tmp_path), "")) for p in caught.value.problems]
    expected = [
        (5, "the sentence has an unknown placeholder `{nobody}`"),
        (9, "'3 GB' has the unit 'GB'"), (12, "`source` is missing"),
        (16, "unknown measure `trainable_parameter`"), (17, "`model` of `trainable_parameters`: "),
        (17, "`rank` of lora: must be at least 1"), (17, "lora has no `ranks`"), (25, "'3 GB' has the unit 'GB'"),
        (26, "duplicate id `table-a`, first at /mine.yaml:25"), (27, "'much' is not a figure"),
        (27, "unknown `rounding` 'up'"), (28, "'many' is not a quantity"),
        (28, "`ratio` is in ratio, but the claim's `trainable_parameters` is in"),
        (29, "duplicate id `two`, first at /mine.yaml:12"), (36, "`linear_layers` has no argument `x`"),
        (36, "`linear_layers` needs `sides`"), (36, "unknown measure `linear_layer`"),
        (37, "`ratio` has no argument `over`"), (37, "`ratio` needs `to`"),
    ]  # fmt: skip
    assert [(line, what[: len(start)]) for (line, what), (_, start) in zip(found, expected, strict=True)] == expected


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("of: 1/0, to: 1", "'1/0' is not a quantity"),
        ("of: .inf, to: 1", "inf is not a quantity"),
        ("of: '1e999999999', to: 1", "is not a quantity"),
        ("of: [1, 2], to: 1", "write one quantity, no list"),
        ("of: {measure: parameters, with: [1]}, to: 1", "is not a quantity"),
        ("of: {measure: conforms, with: {method: lora, check: merge}}, to: 1", "`conforms` returns no number"),
        (
            "of: {measure: bytes_sum, with: {of: [{measure: ratio, with: {of: 1, to: 1}}]}}, to: 1",
            "`ratio` is in ratio",
        ),
    ],
)
def test_what_is_no_quantity_is_a_mistake_of_the_file(tmp_path: Path, argument: str, said: str) -> None:
    claim = f"  - {{id: a, sentence: s, source: t, tier: exact, printed: 1x, measure: ratio, with: {{{argument}}}}}\n"
    with pytest.raises(SuiteError, match="1 mistake") as raised:
        claim_file.load([write(tmp_path, claim)])
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("claim", "mistakes"),
    [
        ("claims: [[1], null, 7, abc, {}]", 4),
        ("claims: [{}]", len(("sentence", "source", "measure", "tier", "printed", "id"))),
        ("claims:\n  - {id: a, sentence: s, source: t, tier: exact, measure: ratio, with: {of: 1, to: 1}, rows: []}", 1),
        ("claims:\n  - {id: a, sentence: '{rang}', source: t, tier: exact, printed: 1x, measure: ratio,"
         " with: {of: 1, to: 1}}", 1),
        ("claims:\n  - {id: a, sentence: s, source: t, tier: exact, printed: 1x, measure: ratio, with: {of: 1, to: 1},"
         " otherwise: [{under: z, with: {config: abc}}]}", 1),
        ("claims:\n  - {id: a, sentence: s, source: t, tier: exact, printed: '1,,,0x', measure: ratio,"
         " with: {of: 1, to: 1}, rounding: {about: < 5%}}", 2),
        ("claims:\n  - {id: a, sentence: s, source: t, tier: exact, printed: 1K, measure: parameters,"
         " with: {model: ./nowhere}}", 1),
        ("claims:\n  - {id: a, sentence: s, source: t, tier: exact, printed: 1K, measure: parameters,"
         " with: {model: %s}}" % ("9" * 5000), 1),
    ],
)  # fmt: skip
def test_a_mistake_is_one_mistake(tmp_path: Path, claim: str, mistakes: int) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"paper: mine\ntitle: Mine\nversion: v1\n{claim}\n")
    with pytest.raises(SuiteError) as raised:
        claim_file.load([path])
    assert len(raised.value.problems) == mistakes, str(raised.value)


def test_a_model_is_a_folder_beside_the_file_too(tmp_path: Path) -> None:
    write(tmp_path, line(tmp_path, "1"))
    beside = line(tmp_path, "1").replace(f"{tmp_path}/config.json", "./")
    (claim,) = claim_file.load([write(tmp_path, beside)])
    assert claim.request.arguments["model"] == str((tmp_path / "config.json").resolve())


@pytest.mark.parametrize("written", ["0.10", "'0.10'"])
def test_the_digits_of_a_figure_count_without_quotes_too(tmp_path: Path, written: str) -> None:
    one = f"id: a, sentence: s, source: t, tier: exact, printed: {written}, measure: ratio, with: {{of: 1, to: 1}}"
    claim = f"  - {{{one}}}\n"
    (read,) = claim_file.load([write(tmp_path, claim)])
    assert judge(read, [MeasureResult(Fraction("0.104"), "")]).verdict is ClaimVerdict.REPRODUCED
    assert judge(read, [MeasureResult(Fraction("0.14"), "")]).verdict is ClaimVerdict.NOT_REPRODUCED


def test_a_reading_that_was_not_computed_might_have_come_out(tmp_path: Path) -> None:
    more = ", otherwise: [{under: rank 3, with: {config: {rank: 3}}}]"
    (claim,) = claim_file.load([write(tmp_path, line(tmp_path, "150", more=more))])
    row = judge(claim, [MeasureResult(112, ""), Missing("the process ended", failed=True)])
    assert (row.verdict, row.failed) == (ClaimVerdict.INCONCLUSIVE, True)
    assert f"not computed under rank 3: {tmp_path / 'mine.yaml'}:5: the process ended" in row.why
    assert judge(claim, [MeasureResult(112, ""), MeasureResult(168, "")]).verdict is ClaimVerdict.NOT_REPRODUCED


def test_a_torn_answer_of_a_worker_that_died_takes_no_other_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, pathlib, sys; pathlib.Path(sys.argv[3]).write_text("
        """'{"how": "", "value": "112", "most": null, "within": null}\\n{"how": "", "val'); """
        "print('no memory', flush=True); os.kill(os.getpid(), 9)"
    )
    read = LastLines._read
    monkeypatch.setattr(LastLines, "_read", lambda *both: time.sleep(0.2) or read(*both))  # a slow reader
    monkeypatch.setattr(compute, "python_module", lambda _, words, env: python(["-c", code], env, words, lifeline=True))
    text = line(tmp_path, "112") + line(tmp_path, "224", rank=4).replace("id: one", "id: two")
    one, two = compute.judged(claim_file.load([write(tmp_path, text)]))
    assert (one.verdict, two.verdict) == (ClaimVerdict.REPRODUCED, ClaimVerdict.NOT_RUN)
    assert "its worker process ended: no memory" in two.why


@pytest.mark.parametrize(
    ("found", "verdict", "said"),
    [
        (MeasureResult(150, ""), ClaimVerdict.REPRODUCED, "by a stand-in: a rehearsal"),
        (MeasureResult(200, ""), ClaimVerdict.INCONCLUSIVE, "the result differs at a smaller scale"),
        (MeasureResult(100, "", most=200), ClaimVerdict.INCONCLUSIVE, "the result is uncertain at a smaller scale"),
    ],
)
def test_nothing_is_refuted_at_a_reduced_scale(
    tmp_path: Path, found: MeasureResult, verdict: ClaimVerdict, said: str
) -> None:
    (claim,) = claim_file.load([write(tmp_path, line(tmp_path, "150", more=", scale: a rehearsal"))])
    row = judge(claim, [found])
    assert row.verdict is verdict
    assert said in row.why


def test_one_measure_that_cannot_be_taken_is_told_and_ends_nothing() -> None:
    broken = {"measure": "parameters", "with": {"model": "galore-60m", "only": ["("]}}
    nothing = {"measure": "ratio", "with": {"of": 1, "to": 0}}
    assert [worker.answer(asked)["failed"] for asked in (broken, nothing)] == [True, True]
    assert worker.answer({"measure": "ratio", "with": {"of": 1, "to": 3}})["value"] == "1/3"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM")
def test_sigterm_ends_the_children_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness.cli", "claims", "--file", str(write(tmp_path, line(tmp_path, "112")))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        children = _workers(running.pid)
        running.terminate()
        _, said = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == Exit.INFRASTRUCTURE
    assert "interrupted" in said
    assert children
    eventually(lambda: all(map(gone, children)), "what was computing is gone")


def _workers(pid: int) -> list[int]:
    """Return the processes that compute; others (git, asked for the commit) come and go before them."""
    for _ in range(600):
        children = psutil.Process(pid).children(recursive=True)
        with contextlib.suppress(psutil.Error):  # it ended while it was looked at
            if found := [child.pid for child in children if "harness.claims.worker" in child.cmdline()]:
                return found
        time.sleep(0.1)
    return []


def test_two_claims_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="duplicate id"):
        claim_file.load([write(tmp_path, line(tmp_path, "1") + line(tmp_path, "2"))])


def test_two_claims_of_one_id_in_one_line_are_refused(tmp_path: Path) -> None:
    rows = ", rows: [{id: a, printed: 112}, {id: a, printed: 113}]"
    table = line(tmp_path, "x", more=rows).replace("printed: 'x', ", "")
    with pytest.raises(SuiteError, match="duplicate id `one-a`"):
        claim_file.load([write(tmp_path, table)])


def test_tables_that_share_their_rows_want_ids_of_their_own(tmp_path: Path) -> None:
    first, second = (
        line(tmp_path, "x", more=f", rows: {rows}").replace("printed: 'x', ", "")
        for rows in ("&rows [{id: a, printed: 112}]", "*rows")
    )
    other = second.replace("id: one", "id: two")
    assert [claim.id for claim in claim_file.load([write(tmp_path, first + other)])] == ["one-a", "two-a"]
    with pytest.raises(SuiteError, match="duplicate id `one-a`"):
        claim_file.load([write(tmp_path, first + second)])


def test_what_a_paper_leaves_out_is_not_decided(tmp_path: Path) -> None:
    file = write(tmp_path, line(tmp_path, "150", more=", needs: the ranks that were learnt"))
    (claim,) = claim_file.load([file])
    between = judge(claim, [MeasureResult(TRAINED, "least", most=2 * TRAINED)])
    assert (between.verdict, between.why) == (ClaimVerdict.INCONCLUSIVE, "the ranks that were learnt")
    assert judge(claim, [MeasureResult(2 * TRAINED, "least", most=3 * TRAINED)]).verdict is ClaimVerdict.NOT_REPRODUCED


@pytest.mark.slow
def test_an_unknown_paper_and_an_unknown_id_are_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "lorra"]) == Exit.USAGE
    assert "did you mean `lora`?" in capsys.readouterr().err
    assert main(["claims", "lora", "--id", "nothing-of-this"]) == Exit.USAGE
    said = capsys.readouterr().err
    assert "no claim id begins with `nothing-of-this`" in said
    assert "`peft-harness list claims`" in said
    assert len(said) < 400  # there are hundreds of ids


@pytest.mark.slow
def test_an_id_of_another_paper_is_told_with_its_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "qlora", "--id", "lora-gpt3-r4", "--id", "qlora-kept-56b"]) == Exit.USAGE
    said = capsys.readouterr().err
    assert "2 mistakes" in said
    assert "`lora-gpt3-r4`\n    hint: claims of lora match: `peft-harness claims lora --id lora-gpt3-r4`" in said
    assert re.search(r"`qlora-kept-56b`\n    hint: did you mean .*`qlora-kept-65b`", said)


def test_the_example_that_explain_shows_is_a_claim_file(tmp_path: Path) -> None:
    text = dict(explain.topics())["claims"]()
    example = text.partition("\n\n")[2].rpartition("\n\nAn argument")[0]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(one.removeprefix("  ") for one in example.splitlines()))
    assert [claim.id for claim in claim_file.load([path])] == ["mine-params", "mine-table-r4", "mine-table-r8"]


@pytest.mark.parametrize("path", claim_file.paths(claim_file.names()), ids=lambda path: path.stem)
def test_claims_of_the_papers_hold_no_result_of_ours(path: Path) -> None:
    # What a row says of itself is printed; a verdict or a computed number could only be a copy.
    keys = {one.strip(" -").partition(":")[0] for one in path.read_text().splitlines()}
    assert not {"verdict", "computed", "expected", "ours"} & keys
    assert all(claim.source and claim.version for claim in claim_file.load([path]))


@pytest.mark.nightly
def test_a_method_that_fails_its_check_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    def attach(model: Any, config: Any, generator: Any) -> Any:
        adapted = lora.attach(model, config, generator)
        for layer in adapted.layers.values():
            layer.scaling = 2 * layer.scaling
        return adapted

    twice = implements("lora", name="twice")(attach)
    right = implements("lora", name="right")(lora.attach)
    monkeypatch.setattr("harness.methods.registry.discover", lambda: Registry((twice, right)))
    assert conforms("lora", "forward", "right").value is True
    found = conforms("lora", "forward", "twice")
    assert found.value is False
    wrong, cases = map(int, re.findall(r"(\d+) of (\d+) cases", found.how)[0])
    assert 2 * wrong == cases  # at the start, where B is zero, a scale does nothing
    with pytest.raises(ValueError, match="has no check"):
        conforms("lora", "budget")
