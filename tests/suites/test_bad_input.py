"""Mistakes in suites and on the command line: each is reported with its place and a hint, and exits with 2.

A suite is written as one change to a sound suite. A row is (text to replace, its replacement, line, words): the mistake is
on that line, and its message has all the words: the key, the value and the kind of mistake. `test_messages` asserts the full
wording of a few.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.cli import main
from harness.errors import Exit, SuiteError
from harness.suites import loader

SUITE = """\
suite: small
title: A small suite
comparisons:
  - {same-losses: a, as: exact, says: the same run}
matrix:
  - model: tiny-llama
    task: toy-sentiment
    training: {steps: 4, batch: 2, lr: 1e-3}
    evaluation: {items: 8, batch: 4}
    cells:
      - id: a
        method: lora
        config: {rank: 4, alpha: 8, targets: [q_proj]}
      - id: exact
        method: lora
        dtype: float64
        config: {rank: 4, alpha: 8, targets: [q_proj]}
"""
LORA = "method: lora\n        config: {rank: 4, alpha: 8, targets: [q_proj]}"
RANK = "method: lora\n        config: {rank"
ADALORA = "method: adalora\n        config: {total_steps: 4, tinit: 1, tfinal: 1, target_rank: 2, rank"

# Nine levels of nine aliases each: 400 million values in nine lines.
LEVELS = [b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 10)]
BOMB = b"a0: &a0 [x]\n" + b"".join(LEVELS)
# Of two merges each: 67 million in 26 lines, though the keys stay one.
MERGES = b"a0: &a0 {b: 1}\n" + b"".join(b"a%d: &a%d {<<: [*a%d, *a%d]}\n" % (n, n, n - 1, n - 1) for n in range(1, 27))
DEEP = b"a0: &a0 {b: 1}\n" + b"".join(b"a%d: &a%d {b: *a%d}\n" % (n, n, n - 1) for n in range(1, 600))

NOT_YAML = {
    "half a character": ("A small", '"\\ud800" #', 2, "not YAML Unicode character escape"),
    "tab": ("    task:", "\ttask:", 7, "not YAML tab"),
    "open bracket": ("[q_proj]}\n      - id", "[q_proj\n      - id", 14, "not YAML"),
    "two documents": ("matrix:", "---\nmatrix:", 5, "not YAML document"),
    "control character": ("A small", "A \x07small", 2, "not YAML '\\x07'"),
    "unknown anchor": ("{rank: 4,", "{<<: *lora, rank: 4,", 13, "not YAML alias 'lora'"),
    "unknown anchor as a key": ("{rank: 4,", "{rank: 4, *lora : 3,", 13, "not YAML alias 'lora'"),
}
"""Nothing else can be read of these."""

SHAPE = {
    "duplicate key": ("title:", "suite:", 2, "`suite` twice 1"),
    "duplicate key inside": ("rank: 4, alpha: 8", "rank: 4, rank: 8", 13, "`rank` twice"),
    "merge of a word": ("{rank: 4,", "{<<: lora, rank: 4,", 13, "`<<` no keys"),
    "alias in itself": ("[q_proj]}\n      -", "&t [*t]}\n      -", 13, "alias itself"),
    "tag that its text does not fit": ("lr: 1e-3", "compile: !!bool maybe", 8, "no bool `!!bool`"),
    "tag of nothing": ("steps: 4", "steps: !!int ''", 8, "no int"),
    "tag": ("tiny-llama", "!env MODEL", 6, "tag `!env` not allowed"),
    "key that is a list": ("title:", "[a]:", 2, "key not a word"),
    "unknown top key": ("title:", "titel:", 2, "unknown `titel`"),
    "unknown cell key": ("dtype:", "dtpye:", 16, "unknown `dtpye`"),
    "unknown training key": ("lr:", "learning_rate:", 8, "unknown `learning_rate`"),
    "no suite name": ("suite: small\n", "", 1, "`suite` missing"),
    "suite name of another kind": ("suite: small", "suite: [a, b]", 1, "`suite` ['a', 'b']"),
    "suite name that is no word": ("suite: small", "suite: my suite", 1, "`suite` 'my suite'"),
    "scalar for a mapping": ("{items: 8, batch: 4}", "8", 9, "`evaluation` 8"),
    "scalar for a list": ("    cells:\n", "    cells: all\n    not:\n", 10, "`cells` 'all'"),
    "cell that is a word": ("      - id: exact", "      - exact\n      - id: exact", 14, "`cells` 'exact'"),
    "dtype that nobody has": ("float64", "float63", 16, "`dtype` 'float63' float64"),
    "unknown quantization": ("id: a", "id: a\n        base: {quantization: nf5}", 12, "`quantization` 'nf5' nf4"),
    "lr of zero": ("lr: 1e-3", "lr: 0", 8, "`lr` 0"),
    "lr above one": ("lr: 1e-3", "lr: 10", 8, "`lr` 10"),
    "lr in quotes": ("lr: 1e-3", "lr: '1e-3'", 8, "`lr` '1e-3'"),
    "infinite lr": ("lr: 1e-3", "lr: .inf", 8, "`lr` inf"),
    "negative steps": ("steps: 4", "steps: -4", 8, "`steps` -4"),
    "half a step": ("steps: 4", "steps: 4.5", 8, "`steps` 4.5"),
    "batch of zero": ("batch: 2", "batch: 0", 8, "`batch` 0"),
    "texts of one token": ("lr: 1e-3", "lr: 1e-3, max_tokens: 1", 8, "`max_tokens` 1"),
    "unknown optimizer": ("id: a", "id: a\n        optimizer: adam-8bit", 12, "`optimizer` 'adam-8bit' adamw-8bit"),
    "one unknown of two": ("id: a", "id: a\n        optimizer: [adamw, sgd]", 12, "an entry of `optimizer` 'sgd'"),
    "layer-wise in words": ("lr: 1e-3", "lr: 1e-3, layerwise: 'yes'", 8, "`layerwise` 'yes'"),
    "no parts": ("batch: 2,", "batch: 2, accumulate: 0,", 8, "`accumulate` 0"),
    "checkpointing in words": ("batch: 2,", "batch: 2, checkpointing: 'yes',", 8, "`checkpointing` 'yes'"),
    "ratio of zero": ("lr: 1e-3", "lr: 1e-3, lr_ratio: 0", 8, "`lr_ratio` 0"),
    "yes for a number": ("items: 8", "items: true", 9, "`items` True"),
    "latency of some": ("id: a", "id: a\n        latency: sometimes", 12, "`latency` 'sometimes' first-seed"),
    "negative seed": ("id: a", "id: a\n        seed: -1", 12, "`seed` -1"),
    "id with a comma": ("id: exact", "id: 'a,b'", 14, "`id` 'a,b'"),
    "ill-typed entry of an axis": ("id: a", "id: a\n        seed: [0, x]", 12, "an entry of `seed` 'x'"),
    "list in an axis": ("tiny-llama", "[tiny-llama, [tiny-llama]]", 6, "an entry of `model` ['tiny-llama']"),
    "half a comparison": ("as: exact, ", "", 4, "not a comparison"),
    "comparison without a sentence": (", says: the same run", "", 4, "not a comparison"),
    "source that can move": (
        "matrix:", "sources:\n  - {name: m, kind: causal, source: 'hub:org/name'}\nmatrix:", 6, "hub:org/name revision",
    ),
    "source without a kind": ("matrix:", "sources:\n  - {name: m, source: 'made:m'}\nmatrix:", 6, "`kind` missing"),
    "source of an unknown kind": (
        "matrix:", "sources:\n  - {name: m, kind: causl, source: 'made:tiny-llama'}\nmatrix:", 6, "`kind` 'causl' causal",
    ),
}  # fmt: skip
"""Mistakes of the first stage: the YAML, its keys, their types and ranges."""

MEANING = {
    "unknown server": ("id: a", "id: a\n        serve: vlm", 12, "unknown server `vlm`"),
    "server of another method": (
        LORA, LORA.replace("lora", "dora") + "\n        serve: vllm", 12, "`serve` `method: lora` dora",
    ),
    "server of a dtype": ("dtype: float64", "dtype: float64\n        serve: vllm", 16, "`vllm` not serve float64"),
    "server of an encoder": (
        "id: a", "id: a\n        model: minilm-l6\n        serve: vllm", 12, "`serve` minilm-l6 encoder",
    ),
    "server without latencies": (
        "id: a", "id: a\n        latency: never\n        serve: vllm", 12, "`serve` `latency` never",
    ),
    "server of a quantised base": (
        "id: a", "id: a\n        serve: vllm\n        base: {quantization: nf4, implementation: fused}", 13,
        "`serve` not quantised nf4",
    ),
    "unknown config key": ("4, alpha", "4, alpa", 13, "`lora` no `alpa`"),
    "schedule of another length": (
        RANK, ADALORA.replace("total_steps: 4", "total_steps: 5"), 13, "`total_steps` adalora 5 4 steps",
    ),
    "no step to prune in": (
        RANK, ADALORA.replace("tinit: 1, tfinal: 1", "tinit: 2, tfinal: 2"), 13, "`tinit` `tfinal` adalora `total_steps` 4",
    ),
    "target above the default rank": (
        RANK, ADALORA.replace(" target_rank: 2,", ""), 13, "`target_rank` adalora 8 `rank` 4",
    ),
    "schedule of the default length": (
        RANK, ADALORA.replace("total_steps: 4, tinit: 1, tfinal: 1, ", ""), 13, "`total_steps` adalora 1000 4 steps",
    ),
    "config of a method without fields": (
        "id: a\n        method: lora", "id: a\n        method: full", 13, "`full` no `rank`",
    ),
    "config that no method of the entry has": (
        RANK, "method: [full, lora]\n        config: {rnk: 1, rank", 13, "none `full`, `lora` `rnk`",
    ),
    "shared config that no method of the block has": (
        "    cells:\n", "    config: {rnk: 4}\n    cells:\n      - {method: full, id: all}\n", 10,
        "none `full`, `lora` `rnk`",
    ),
    "no method": ("        method: lora\n        config", "        config", 11, "`method` missing"),
    "no steps": ("steps: 4, ", "", 11, "`training.steps` missing"),
    "no items": ("items: 8, ", "", 11, "`evaluation.items` missing"),
    "unknown method": ("id: a\n        method: lora", "id: a\n        method: lorra", 12, "unknown method `lorra`"),
    "unknown model": ("tiny-llama", "tiny-lama", 6, "no model 'tiny-lama'"),
    "data for a model": ("tiny-llama", "movie-reviews", 6, "`movie-reviews` data set"),
    "hub model that can move": ("tiny-llama", "org/name", 6, "'org/name' not pinned"),
    "local model that is not there": ("tiny-llama", "./nowhere", 6, "no folder model ./nowhere"),
    "local model that is no model": ("tiny-llama", "./", 6, "model ./ no config.json"),
    "unknown task": ("toy-sentiment", "toy-sentimnt", 7, "unknown task `toy-sentimnt`"),
    "unknown implementation": ("id: a", "id: a\n        implementation: fusd", 12, "`fusd` lora"),
    "implementation of another method": (
        LORA, "method: full\n        implementation: fused", 13, "`fused` does not offer full",
    ),
    "dtype that the base cannot": (
        "dtype: float64", "dtype: [float64]\n        base: {quantization: nf4, implementation: bitsandbytes}", 16,
        "`bitsandbytes` does not offer nf4 float64",
    ),
    "base without implementation": (
        "id: a", "id: a\n        base: {quantization: nf4}", 12, "base nf4 no `implementation`",
    ),
    "base without quantization": (
        "id: a", "id: a\n        base: {implementation: x}", 12, "base `implementation` x no `quantization`",
    ),
    "second base without quantization": (
        "id: a", "id: a\n        base:\n          - {}\n          - {implementation: x}", 14, "x no `quantization`",
    ),
    "rank": ("{rank: 4,", "{rank: 5000,", 13, "`rank` lora at most 4096"),
    "rank of another kind": ("{rank: 4,", "{rank: four,", 13, "`rank` lora whole number 'four'"),
    "rank axis with one wrong": ("{rank: 4,", "{rank: [4, 0],", 13, "`rank` lora at least 1 0"),
    "empty rank axis": ("{rank: 4,", "{rank: [],", 13, "`rank` empty"),
    "dropout": ("{rank: 4,", "{dropout: 1.5, rank: 4,", 13, "`dropout` lora at most 0.99"),
    "not a number": ("alpha: 8,", "alpha: .nan,", 13, "`alpha` lora finite"),
    "targets as one word": ("[q_proj]", "q_proj", 13, "`targets` lora list of words"),
    "number among the targets": ("[q_proj]", "[q_proj, 3]", 13, "`targets` lora list of words"),
    "longer warm-up than training": ("steps: 4", "steps: 4, warmup: 5", 8, "`warmup` 5 4 steps"),
    "optimizer for a method with its own": (
        "method: lora\n        config: {rank: 4, alpha: 8,",
        "method: galore\n        optimizer: [adamw-8bit, paged-adamw-8bit]\n        config: {rank: 4,", 13,
        "`optimizer` paged-adamw-8bit galore",
    ),
    "optimizer for what is not trained": (
        LORA, "method: frozen\n        optimizer: paged-adamw\n        training: {steps: 0}", 13,
        "`optimizer` paged-adamw 0 steps",
    ),
    "parts that do not divide the batch": ("batch: 2,", "batch: 6, accumulate: [2, 4],", 8, "`accumulate` 4 6 examples"),
    "layer-wise updates of an adapter": ("lr: 1e-3", "lr: 1e-3, layerwise: true", 8, "`layerwise` lora"),
    "ratio of learning rates without a factor B": (
        "method: lora\n        config: {rank: 4, alpha: 8,",
        "method: vera\n        training: {lr_ratio: [1, 16]}\n        config: {rank: 4,", 13, "`lr_ratio` 16 vera factor B",
    ),
    "more items than there are": ("items: 8", "items: 66", 9, "`items` 66 toy-sentiment 64"),
    "duplicate id": ("id: exact", "id: a", 14, "duplicate id `a`"),
    "equal cells": ("dtype: float64", "dtype: float32", 14, "`exact` `a` same Cell"),
    "a value listed twice": ("id: a", "id: a\n        seed: [1, 1]", 12, "`seed` 1 2 times"),
    "a base listed twice": ("id: a", "id: a\n        base: [{}, {}]", 12, "`base` none 2 times"),
    "a quantised base listed twice": (
        "id: a", "id: a\n        base: [&q {quantization: nf4, implementation: fused}, *q]", 12,
        "`base` nf4 (fused) 2 times",
    ),
    "a method listed twice": ("method: lora", "method: [lora, lora]", 12, "`method` 'lora' 2 times"),
    "too many cells": (
        "id: a", f"id: a\n        seed: [{', '.join(map(str, range(10_001)))}]", 5, "10002 Cells 10000",
    ),
    "too many ways to train": (
        "lr: 1e-3", f"lr: [{', '.join(['1e-3'] * 200)}], lr_ratio: [{', '.join(map(str, range(1, 201)))}]", 8,
        "40000 Cells 10000",
    ),
    "comparison of nobody": ("as: exact", "as: exakt", 4, "`as` no id `exakt`"),
    "comparison with itself": ("as: exact", "as: a", 4, "itself"),
    "losses against float32": ("a, as: exact", "exact, as: a", 4, "`as` `a` not float64"),
    "losses without training": ("id: a", "id: a\n        training: {steps: 0}", 4, "`a` not train"),
    "scores on other items": (
        "{same-losses: a, as: exact, says: the same run}", "{better: exact, than: far, says: more}", 4,
        "not scored same items",
    ),
    "source of a taken name": (
        "matrix:", "sources:\n  - {name: tiny-llama, kind: causal, source: 'made:tiny-llama'}\nmatrix:", 6,
        "duplicate source `tiny-llama`",
    ),
}  # fmt: skip
"""Mistakes of the second stage: names, combinations, duplicates."""

FAR_SHAPE = """\
  - {model: [tiny-llama, 3], task: toy-sentiment, method: lora, optimizer: sgd, optimizer: adamw,
     training: {steps: 1, lr: [1e-3, abc]}, evaluation: {item: 65}}
"""
FAR_SHAPES = {
    "an entry of `model` is 3",
    "`optimizer` is given twice, first in line N",
    "`optimizer` is 'sgd', which is none of adamw, adamw-8bit, paged-adamw, paged-adamw-8bit",
    "an entry of `lr` is 'abc'",
    "unknown key `item`",
}
FAR_MEANING = """\
  - {id: far, model: [tiny-lama, tiny-llama], task: toy-sentiment, method: [lora, full], training: {steps: 1},
     evaluation: {items: 65}, config: {rank: 0}}
"""
FAR_MEANINGS = {
    "no model or data set named 'tiny-lama'",
    "`items` is 65, but toy-sentiment has 64 test items",
    "`rank` of lora must be at least 1, got 0",
}


def changed(rows: dict[str, tuple[str, str, int, str]], name: str) -> str:
    """Return the sound suite with one mistake."""
    old, new = rows[name][:2]
    assert old in SUITE
    return SUITE.replace(old, new, 1)


def mistakes(path: Path, text: str) -> list[tuple[int, str]]:
    """Return the line and the message of each mistake of a suite; each must have a hint."""
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SuiteError) as caught:
        loader.load(path)
    assert all(problem.hint for problem in caught.value.problems)
    assert [problem.where.rpartition(":")[0] for problem in caught.value.problems] == [str(path)] * len(
        caught.value.problems
    )
    return [(int(problem.where.rpartition(":")[2]), problem.what) for problem in caught.value.problems]


def has(found: list[tuple[int, str]], line: int, words: str) -> bool:
    """Say whether a message on this line has all the words."""
    return any(number == line and all(word in what for word in words.split()) for number, what in found)


def without_lines(found: list[tuple[int, str]]) -> set[str]:
    return {re.sub(r"line \d+", "line N", what) for _, what in found}


@pytest.mark.parametrize("name", NOT_YAML)
def test_a_file_that_is_not_yaml(name: str, tmp_path: Path) -> None:
    found = mistakes(tmp_path / "suite.yaml", changed(NOT_YAML, name))
    assert len(found) == 1
    assert has(found, *NOT_YAML[name][2:]), found


@pytest.mark.parametrize("name", SHAPE)
def test_a_mistake_of_shape_comes_with_those_of_other_entries(name: str, tmp_path: Path) -> None:
    found = mistakes(tmp_path / "suite.yaml", changed(SHAPE, name) + FAR_SHAPE)
    assert has(found, *SHAPE[name][2:]), found
    assert without_lines(found) >= FAR_SHAPES


@pytest.mark.slow
@pytest.mark.parametrize("name", MEANING)
def test_a_mistake_of_meaning_comes_with_those_of_other_entries(name: str, tmp_path: Path) -> None:
    found = mistakes(tmp_path / "suite.yaml", changed(MEANING, name) + FAR_MEANING)
    if name == "too many cells":  # the Cells of a wrong entry are not counted
        found += mistakes(tmp_path / "suite.yaml", changed(MEANING, name))
    assert has(found, *MEANING[name][2:]), found
    assert without_lines(found) >= FAR_MEANINGS


def test_mistakes_of_meaning_come_after_those_of_shape(tmp_path: Path) -> None:
    text = (
        SUITE.replace("title:", "titel:").replace("steps: 4", "steps: four").replace("method: lora", "method: lorra", 1)
    )
    assert mistakes(tmp_path / "suite.yaml", text) == [(2, "unknown key `titel`"), (8, "`steps` is 'four'")]
    text = text.replace("titel:", "title:").replace("steps: four", "steps: 4")
    assert mistakes(tmp_path / "suite.yaml", text) == [(12, "unknown method `lorra`")]


def test_a_duplicate_id_hides_no_other_mistake(tmp_path: Path) -> None:
    text = SUITE.replace("id: exact\n        method: lora", "id: a\n        method: lorra")
    found = mistakes(tmp_path / "suite.yaml", text)
    assert has(found, 14, "duplicate id `a`")
    assert has(found, 15, "unknown method `lorra`")


def test_the_sound_suite_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE, encoding="utf-8")
    assert len(loader.load(path).entries) == 2


@pytest.mark.parametrize(
    ("rows", "name", "message"),
    [
        (
            NOT_YAML,
            "unknown anchor",
            "13: not YAML: found undefined alias 'lora'\n    hint: write the value out, or define",
        ),
        (SHAPE, "unknown cell key", "16: unknown key `dtpye`\n    hint: did you mean `dtype`?"),
        (SHAPE, "unknown training key", "8: unknown key `learning_rate`\n    hint: keys here: steps, batch, lr, "),
        (SHAPE, "no suite name", "1: `suite` is missing\n    hint: add `suite:`"),
        (SHAPE, "lr of zero", "8: `lr` is 0\n    hint: write more than 0"),
        (
            SHAPE,
            "source that can move",
            "6: hub:org/name needs revision\n    hint: write the 40 hex digits of a commit",
        ),
        (MEANING, "rank", "13: `rank` of lora must be at most 4096, got 5000\n    hint: the default is 8"),
        (MEANING, "no steps", "11: `training.steps` is missing\n    hint: add it here or to the block"),
        (MEANING, "no items", "11: `evaluation.items` is missing\n    hint: add it here or to the block"),
    ],
)
def test_messages(
    rows: dict[str, tuple[str, str, int, str]], name: str, message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "suite.yaml"
    path.write_text(changed(rows, name), encoding="utf-8")
    code, printed = run(capsys, "plan", str(path))
    assert code == Exit.USAGE
    assert f"  {path}:{message}" in printed
    count = printed.count("\n    hint: ")
    assert printed.startswith(f"peft-harness: {count} mistake{'s' if count > 1 else ''} in the suite\n")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Run the command; return its exit code and its message, which must be all it prints."""
    code = main(argv)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert printed.err.count("peft-harness: ") == 1
    assert printed.err.startswith("peft-harness: ")
    return code, printed.err


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"", 1, "the file is empty"),
        (b"# nothing but talk\n", 1, "the file is empty"),
        (b"- a\n- b\n", 1, "expected keys and values, got a list"),
        (b"suite\n", 1, "expected keys and values, got `suite`"),
        (b"suite: a\ntitle: caf\xe9\n", 2, "byte 0xe9 is not UTF-8"),
        ("suite: a\n".encode("utf-16"), 1, "byte 0xff is not UTF-8"),
        (b"suite: a\nmatrix: []\n", 2, "`matrix` is empty"),
        (b"a: " + b"[" * 6000, 1, "not readable as YAML: nested too deeply"),
        (BOMB, 1, "more than 200000 values"),
        (MERGES, 1, "more than 200000 values"),
        (DEEP, 1, "nested too deeply once aliases are followed"),
    ],
)
def test_files_that_are_no_suite(
    content: bytes, line: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "suite.yaml"
    path.write_bytes(content)
    code, printed = run(capsys, "run", str(path))
    assert code == Exit.USAGE
    assert f"{path}:{line}: {message}" in printed
    assert "hint: " in printed


def test_mistakes_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = SUITE.replace("title:", "titel:").replace("steps: 4", "steps: -4").replace("items: 8", "item: 8")
    text = text.replace("id: a\n", "id: a\n        methd: lora\n").replace("float64", "float63")
    assert [line for line, _ in mistakes(tmp_path / "suite.yaml", text)] == [2, 8, 9, 12, 17]
    text = SUITE.replace("tiny-llama", "tiny-lama").replace("items: 8", "items: 650").replace("{rank: 4", "{rank: 0", 1)
    assert [line for line, _ in mistakes(tmp_path / "suite.yaml", text.replace("as: exact", "as: exakt"))] == [
        4,
        6,
        9,
        13,
    ]


def test_a_key_that_is_given_three_times_is_reported_twice(tmp_path: Path) -> None:
    text = SUITE.replace("lr: 1e-3}", "lr: 1e-3, lr: 1e-3, lr: 1e-3}")
    assert [line for line, _ in mistakes(tmp_path / "suite.yaml", text)] == [8]  # both are on one line, and equal
    text = SUITE.replace("title: A small suite", "title: A small suite\ntitle: B\ntitle: C")
    assert mistakes(tmp_path / "suite.yaml", text) == [
        (3, "`title` is given twice, first in line 2"),
        (4, "`title` is given twice, first in line 2"),
    ]


def test_a_value_that_cannot_be_read_is_reported_once(tmp_path: Path) -> None:
    text = SUITE.replace("steps: 4", "steps: !env STEPS").replace("method: lora", "method: !env METHOD", 1)
    assert mistakes(tmp_path / "suite.yaml", text) == [
        (8, "the tag `!env` is not allowed here"),
        (12, "the tag `!env` is not allowed here"),
    ]


def test_all_mistakes_of_an_axis_are_reported(tmp_path: Path) -> None:
    text = SUITE.replace("lr: 1e-3", "lr: [1e-3, abc, 7, [1e-4]]").replace("tiny-llama", "[3, tiny-llama, 4]")
    assert mistakes(tmp_path / "suite.yaml", text) == [
        (6, "an entry of `model` is 3"),
        (6, "an entry of `model` is 4"),
        (8, "an entry of `lr` is 'abc'"),
        (8, "an entry of `lr` is 7"),
        (8, "an entry of `lr` is [0.0001]"),
    ]


def test_all_mistakes_of_meaning_of_one_entry_are_reported(tmp_path: Path) -> None:
    text = SUITE.replace("batch: 2,", "batch: 6, accumulate: 4, lr_ratio: 8,")
    base = "{quantization: nf4, implementation: bitsandbytes}"
    galore = f"id: a\n        optimizer: paged-adamw\n        base: {base}\n        method: galore"
    text = text.replace("id: a\n        method: lora", galore).replace("{rank: 4, alpha: 8,", "{rank: 4,", 1)
    found = mistakes(tmp_path / "suite.yaml", text.replace("a, as: exact", "exact, as: a"))
    assert [(line, what.partition(",")[0]) for line, what in found] == [
        (4, "`as` names `a`"),
        (8, "`accumulate` is 4"),
        (8, "`lr_ratio` is 8"),
        (12, "`optimizer` is paged-adamw"),
        (13, "base nf4 has frozen weights in 4 bits"),
    ]


def test_all_that_layerwise_updates_cannot_be_combined_with_is_reported(tmp_path: Path) -> None:
    layerwise = "batch: 2, accumulate: [1, 2], compile: true,\n      layerwise: [false, true],"
    text = SUITE.replace("batch: 2,", layerwise).replace("{rank: 4, alpha: 8,", "{rank: 4,", 1)
    text = text.replace("id: a\n        method: lora", "id: a\n        dtype: float16\n        method: [full, galore]")
    found = [
        (line, what) for line, what in mistakes(tmp_path / "suite.yaml", text) if what.startswith("`layerwise` is")
    ]
    assert {line for line, _ in found} == {9}
    for part in ("`accumulate` is 2", "`compile` is true", "dtype is float16", "lora does not train"):
        assert any(part in what for _, what in found), part


def test_an_incomplete_entry_is_not_checked_further(tmp_path: Path) -> None:
    text = SUITE.replace("steps: 4, ", "").replace("items: 8, ", "").replace("{rank: 4", "{rank: 0", 1)
    assert mistakes(tmp_path / "suite.yaml", text + FAR_MEANING.replace("tiny-lama, ", "")) == [
        (line, f"`{key}` is missing") for line in (11, 14) for key in ("evaluation.items", "training.steps")
    ] + [
        (19, "`items` is 65, but toy-sentiment has 64 test items"),
        (19, "`rank` of lora must be at least 1, got 0"),
    ]  # fmt: skip


def test_a_mistake_in_a_block_is_reported_once(tmp_path: Path) -> None:
    assert len(mistakes(tmp_path / "suite.yaml", SUITE.replace("tiny-llama", "tiny-lama"))) == 1


def test_a_shared_key_may_belong_to_an_unknown_method(tmp_path: Path) -> None:
    text = SUITE.replace("    cells:\n", "    config: {total_steps: 4}\n    cells:\n")
    assert mistakes(tmp_path / "suite.yaml", text.replace("method: lora", "method: [adalroa, lora]", 1)) == [
        (13, "unknown method `adalroa`")
    ]


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (["rnu", "smoke"], "No such command 'rnu'", "see `peft-harness --help`"),
        (["run"], "run: Missing argument 'SUITE'", "see `peft-harness run --help`"),
        (["run", "smoke", "--onyl", "x"], "No such option '--onyl'", "see `peft-harness run --help`"),
        (["run", "smoke", "--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'", "--help"),
        (["run", "smoke", "--timeout", "0"], "0 is not a number of seconds above 0", "--help"),
        (["run", "smoke", "--timeout", "soon"], "'soon' is not a valid float", "--help"),
        (["plan", "smoke", "quick"], "Got unexpected extra argument", "see `peft-harness plan --help`"),
        (["plan", "smok"], "SUITE: no suite `smok`", "did you mean `smoke`?"),
        (["plan", "sources"], "SUITE: no suite `sources`", "quick, sentinels, serve, smoke"),
        (["plan", "nowhere.yaml"], "SUITE: no file `nowhere.yaml`", "name a .yaml file, or one of"),
        (["plan", "./smok.yaml"], "SUITE: no file `./smok.yaml`", "did you mean `smoke`?"),
        (["plan", "."], "SUITE: no suite `.`", "name a .yaml file"),
        (["plan", "smoke", "--only", "metod=lora"], "--only metod=lora: unknown key `metod`", "did you mean `method`?"),
        (["plan", "smoke", "--only", "dora"], "--only dora: no Cell fits", "choose from the Cells above"),
        (["plan", "smoke", "--only", ""], "    id=lora-float64 ", "choose from the Cells above"),
        (["plan", "smoke", "--only", "method=lora,method=lor"], "no Cell fits `method=lor`", "did you mean `lora`?"),
        (["plan", "smoke", "--only", "lora,nope"], "no Cell fits `nope`", "remove this term"),
        (["plan", "smoke", "--only", "=lora"], "`=lora` has no key", "write key=value, or one word"),
        (
            ["fit", "~nobody-of-this-name/m", "--memory", "1GiB"],
            "is no path: Could not",
            "write ./path, /path or ~/path",
        ),
        (
            ["gate", "a", "--baseline", "b", "--seed", "0"],
            "--seed needs --pairs",
            "see `peft-harness gate --help`",
        ),
        (
            ["gate", "a", "--baseline", "b", "--memory-bytes", "9" * 5000],
            "is no size that a machine can have",
            "--help",
        ),
        (
            ["gate", "--pairs", "a", "b", "--memory-bytes", "0"],
            "--memory-bytes needs --baseline",
            "see `peft-harness gate --help`",
        ),
        (
            ["gate", "--pairs", "reference", "fused", "--cores", "4096"],
            "--cores: 4096 cores requested",
            "give at most",
        ),
        (["report"], "Missing argument 'RUN...'", "see `peft-harness report --help`"),
        (["report", "no-such-run"], "no run 'no-such-run'", "`peft-harness run quick` first"),
        (["list", "method"], "'method' is not one of 'methods'", "see `peft-harness list --help`"),
        (["explain", "lorra"], "explain: no entry `lorra`", "did you mean `lora`?"),
        (["explain", "9"], "explain: no entry `9`", "`peft-harness list` shows most names"),
    ],
)
def test_bad_command_line(
    argv: list[str],
    message: str,
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed = run(capsys, *argv)
    assert code == Exit.USAGE
    assert message in printed
    assert hint in printed.partition("hint: ")[2]
