"""What people get wrong, one row each: one message with place and mend, the documented exit code, no traceback.

Suites are written as one change to a sound suite: (what to replace, by what) -> (line, message, mend).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli import main
from harness.errors import Exit, SuiteError
from harness.suites import loader

SUITE = """\
suite: small
title: A small suite
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
comparisons:
  - {same-losses: a, as: exact, says: the same run}
"""

# Nine levels of nine aliases each: 400 million values in nine lines.
LEVELS = [b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 10)]
BOMB = b"a0: &a0 [x]\n" + b"".join(LEVELS)
# Of two merges each: 67 million in 26 lines, though the keys stay one.
MERGES = b"a0: &a0 {b: 1}\n" + b"".join(b"a%d: &a%d {<<: [*a%d, *a%d]}\n" % (n, n, n - 1, n - 1) for n in range(1, 27))
DEEP = b"a0: &a0 {b: 1}\n" + b"".join(b"a%d: &a%d {b: *a%d}\n" % (n, n, n - 1) for n in range(1, 600))

# name: (replaced, by, line, message, mend)
BAD_SUITES = {
    "tab": ("    task:", "\ttask:", 5, "not YAML: found character '\\t'", "indent with spaces"),
    "open bracket": ("[q_proj]}\n      - id", "[q_proj\n      - id", 12, "not YAML", "mend the YAML here"),
    "duplicate key": ("title:", "suite:", 2, "`suite` is given twice, first in line 1", "keep one"),
    "duplicate key inside": ("rank: 4, alpha: 8", "rank: 4, rank: 8", 11, "`rank` is given twice", "keep one"),
    "unknown top key": ("title:", "titel:", 2, "unknown key `titel`", "did you mean `title`?"),
    "unknown cell key": ("dtype:", "dtpye:", 14, "unknown key `dtpye`", "did you mean `dtype`?"),
    "unknown training key": ("lr:", "learning_rate:", 6, "unknown key `learning_rate`", "keys here: steps, batch, lr"),
    "unknown config key": ("4, alpha", "4, alpa", 11, "`lora` has no `alpa`", "did you mean `alpha`?"),
    "schedule of another length": (
        "method: lora\n        config: {rank",
        "method: adalora\n        config: {total_steps: 5, tinit: 1, tfinal: 1, target_rank: 2, rank",
        11,
        "`total_steps` of adalora is 5, and the training has 4 steps",
        "write `total_steps: 4`",
    ),
    "no step to prune in": (
        "method: lora\n        config: {rank",
        "method: adalora\n        config: {total_steps: 4, tinit: 2, tfinal: 2, target_rank: 2, rank",
        11,
        "`tinit` 2 and `tfinal` 2 of adalora leave no step of `total_steps` 4 to prune in",
        "below 4 together",
    ),
    "target above the rank": (  # the default target, 8
        "method: lora\n        config: {rank",
        "method: adalora\n        config: {total_steps: 4, tinit: 1, tfinal: 1, rank",
        11,
        "`target_rank` of adalora is 8, above its `rank` of 4",
        "write at most 4",
    ),
    "schedule of the default length": (
        "method: lora\n        config: {rank",
        "method: adalora\n        config: {target_rank: 2, rank",
        11,
        "`total_steps` of adalora is 1000, and the training has 4 steps",
        "write `total_steps: 4`",
    ),
    "config of a method without knobs": (
        "id: a\n        method: lora",
        "id: a\n        method: full",
        11,
        "`full` has no `rank`",
        "keys: none",
    ),
    "config that no method of the entry has": (
        "method: lora\n        config: {rank",
        "method: [full, lora]\n        config: {rnk: 1, rank",
        11,
        "none of `full`, `lora` has a `rnk`",
        "did you mean `rank`?",
    ),
    "shared config that no method of the block has": (
        "    cells:\n",
        "    config: {rnk: 4}\n    cells:\n      - {method: full, id: all}\n",
        8,
        "none of `full`, `lora` has a `rnk`",
        "did you mean `rank`?",
    ),
    "no suite name": ("suite: small\n", "", 1, "`suite` is missing", "add `suite:`"),
    "suite name of another kind": ("suite: small", "suite: [a, b]", 1, "`suite` is ['a', 'b']", "write a word"),
    "suite name that is no word": ("suite: small", "suite: my suite", 1, "`suite` is 'my suite'", "write letters"),
    "no matrix": ("matrix:", "matrix: []\nmore:", 3, "`matrix` is empty", "give it a value"),
    "scalar for a mapping": ("{items: 8, batch: 4}", "8", 7, "`evaluation` is 8", "write keys and values"),
    "scalar for a list": ("cells:\n", "cells: all\nnot:\n", 8, "`cells` is 'all'", "write a list"),
    "cell that is a word": ("      - id: exact", "      - exact\n      - id: exact", 12, "`cells` is 'exact'", "keys"),
    "no method": ("        method: lora\n        config", "        config", 9, "`method` is missing", "add it here"),
    "no steps": ("steps: 4, ", "", 9, "`training.steps` is missing", "add it here or to the block"),
    "unknown method": ("id: a\n        method: lora", "id: a\n        method: lorra", 10, "method `lorra`", "`lora`"),
    "unknown model": ("tiny-llama", "tiny-lama", 4, "no model or data set named 'tiny-lama'", "did you mean 'tiny"),
    "data for a model": ("tiny-llama", "movie-reviews", 4, "`movie-reviews` is a data set", "models: minilm-l6"),
    "hub model that can move": ("tiny-llama", "org/name", 4, "hub name 'org/name' is not pinned", "40 hex digits"),
    "local model that is not there": (
        "tiny-llama",
        "./nowhere",
        4,
        "no folder for model ./nowhere",
        "correct its path",
    ),
    "local model that is no model": ("tiny-llama", "./", 4, "model ./ has no config.json", "save_pretrained(FOLDER)"),
    "unknown task": ("toy-sentiment", "toy-sentimnt", 5, "unknown task `toy-sentimnt`", "did you mean `toy-"),
    "unknown implementation": ("id: a", "id: a\n        implementation: fusd", 10, "`fusd` of lora", "`fused`"),
    "implementation of another method": (
        "id: a\n        method: lora\n        config: {rank: 4, alpha: 8, targets: [q_proj]}",
        "id: a\n        method: full\n        implementation: fused",
        11,
        "`fused` does not offer full, only adalora",
        "who offers full: reference",
    ),
    "dtype that nobody has": ("float64", "float63", 14, "`dtype` is 'float63'", "did you mean `float64`?"),
    "dtype that the base cannot": (
        "dtype: float64",
        "dtype: [float64]\n        base: {quantization: nf4, implementation: bitsandbytes}",
        14,
        "`bitsandbytes` does not offer nf4 in float64",
        "it offers",
    ),
    "base without implementation": ("id: a", "id: a\n        base: {quantization: nf4}", 10, "no `impl", "bitsand"),
    "base without quantization": ("id: a", "id: a\n        base: {implementation: x}", 10, "no `quantization`", "add"),
    "unknown quantization": ("id: a", "id: a\n        base: {quantization: nf5}", 10, "is 'nf5'", "`nf4`"),
    "rank": ("{rank: 4,", "{rank: 5000,", 11, "at most 4096", "default is 8"),
    "rank of another kind": ("{rank: 4,", "{rank: four,", 11, "must be a whole number, got 'four'", "the default is 8"),
    "rank axis with one wrong": ("{rank: 4,", "{rank: [4, 0],", 11, "must be at least 1, got 0", "the default is 8"),
    "empty rank axis": ("{rank: 4,", "{rank: [],", 11, "`rank` is an empty list", "leave it out"),
    "dropout": ("{rank: 4,", "{dropout: 1.5, rank: 4,", 11, "`dropout` of lora must be at most 0.99", "default is 0.0"),
    "not a number": ("alpha: 8,", "alpha: .nan,", 11, "`alpha` of lora must be finite", "the default is 16.0"),
    "targets as one word": ("[q_proj]", "q_proj", 11, "`targets` of lora must be a list of words", "[q_proj, v_proj]"),
    "lr of zero": ("lr: 1e-3", "lr: 0", 6, "`lr` is 0", "write more than 0"),
    "lr above one": ("lr: 1e-3", "lr: 10", 6, "`lr` is 10", "write at most 1"),
    "lr in quotes": ("lr: 1e-3", "lr: '1e-3'", 6, "`lr` is '1e-3'", "without quotes"),
    "infinite lr": ("lr: 1e-3", "lr: .inf", 6, "`lr` is inf", "write a"),
    "negative steps": ("steps: 4", "steps: -4", 6, "`steps` is -4", "write at least 0"),
    "half a step": ("steps: 4", "steps: 4.5", 6, "`steps` is 4.5", "write a whole number"),
    "batch of zero": ("batch: 2", "batch: 0", 6, "`batch` is 0", "write at least 1"),
    "texts of one token": ("lr: 1e-3", "lr: 1e-3, max_tokens: 1", 6, "`max_tokens` is 1", "write at least 4"),
    "longer warm-up than training": ("steps: 4", "steps: 4, warmup: 5", 6, "`warmup` is 5", "shorten it"),
    "optimizer that nobody has": ("id: a", "id: a\n        optimizer: adam-8bit", 10, "is 'adam-8bit'", "`adamw-8bit`"),
    "optimizer axis with one wrong": (
        "id: a",
        "id: a\n        optimizer: [adamw, sgd]",
        10,
        "an entry of `optimizer` is 'sgd'",
        "paged-adamw-8bit",
    ),
    "optimizer for a method with its own": (
        "method: lora\n        config: {rank: 4, alpha: 8,",
        "method: galore\n        optimizer: [adamw-8bit, paged-adamw-8bit]\n        config: {rank: 4,",
        11,
        "`optimizer` is paged-adamw-8bit, and galore steps by its own, GaLore",
        "give galore an entry with `optimizer: adamw` or `adamw-8bit`",
    ),
    "optimizer for what is not trained": (
        "method: lora\n        config: {rank: 4, alpha: 8, targets: [q_proj]}",
        "method: frozen\n        optimizer: paged-adamw\n        training: {steps: 0}",
        11,
        "`optimizer` is paged-adamw, and nothing is trained in 0 steps",
        "write `optimizer: adamw`",
    ),
    "parts that do not divide the batch": (
        "batch: 2,",
        "batch: 6, accumulate: [2, 4],",
        6,
        "`accumulate` is 4, which does not divide the batch of 6 examples",
        "write one of 1, 2, 3, 6",
    ),
    "layer-wise updates of an adapter": (
        "lr: 1e-3",
        "lr: 1e-3, layerwise: true",
        6,
        "`layerwise` is true, and lora does not train the model's own weights",
        "leave `layerwise` out for lora; it is for full and galore",
    ),
    "layer-wise in words": ("lr: 1e-3", "lr: 1e-3, layerwise: 'yes'", 6, "`layerwise` is 'yes'", "write true or false"),
    "no parts": ("batch: 2,", "batch: 2, accumulate: 0,", 6, "`accumulate` is 0", "write at least 1"),
    "checkpointing in words": ("batch: 2,", "batch: 2, checkpointing: 'yes',", 6, "is 'yes'", "write true or false"),
    "ratio of learning rates without a factor B": (
        "method: lora\n        config: {rank: 4, alpha: 8,",
        "method: vera\n        training: {lr_ratio: [1, 16]}\n        config: {rank: 4,",
        11,
        "`lr_ratio` is 16, and vera trains no factor B",
        "write `lr_ratio: 1` for vera; those that do: adalora, dora, lora, pissa, qlora",
    ),
    "ratio of zero": ("lr: 1e-3", "lr: 1e-3, lr_ratio: 0", 6, "`lr_ratio` is 0", "write more than 0"),
    "more items than there are": ("items: 8", "items: 65", 7, "`items` is 65, but toy-sentiment has 64", "at most 64"),
    "yes for a number": ("items: 8", "items: true", 7, "`items` is True", "write a whole number"),
    "latency of some": ("id: a", "id: a\n        latency: sometimes", 10, "`latency` is 'sometimes'", "first-seed"),
    "negative seed": ("id: a", "id: a\n        seed: -1", 10, "`seed` is -1", "write at least 0"),
    "duplicate id": ("id: exact", "id: a", 12, "a second id `a`, first at", "rename"),
    "id with a comma": ("id: exact", "id: 'a,b'", 12, "`id` is 'a,b'", "write letters"),
    "equal cells": ("dtype: float64", "dtype: float32", 12, "`exact` and `a` hold the same Cell", "the other is at"),
    "axis with ill-typed entries": (
        "id: a",
        "id: a\n        seed: [0, x]",
        10,
        "an entry of `seed` is 'x'",
        "whole number",
    ),
    "list for an entry of an axis": (
        "tiny-llama",
        "[tiny-llama, [tiny-llama]]",
        4,
        "an entry of `model` is ['tiny-llama']",
        "write a word",
    ),
    "a value listed twice": ("id: a", "id: a\n        seed: [1, 1]", 10, "`seed` lists 1 2 times", "listed twice"),
    "a base listed twice": ("id: a", "id: a\n        base: [{}, {}]", 10, "`base` lists none 2 times", "listed twice"),
    "a quantised base listed twice": (
        "id: a",
        "id: a\n        base: [&q {quantization: nf4, implementation: fused}, *q]",
        10,
        "`base` lists nf4 (fused) 2 times",
        "listed twice",
    ),
    "a method listed twice": ("method: lora", "method: [lora, lora]", 10, "`method` lists 'lora' 2 times", "twice"),
    "too many cells": (
        "id: a",
        f"id: a\n        seed: [{', '.join(map(str, range(10_001)))}]",
        3,
        "10002 Cells; the most is 10000",
        "split the suite",
    ),
    "too many ways to train": (
        "lr: 1e-3",
        f"lr: [{', '.join(['1e-3'] * 200)}], lr_ratio: [{', '.join(map(str, range(1, 201)))}]",
        6,
        "40000 Cells; the most is 10000",
        "shorten a list",
    ),
    "comparison of nobody": ("as: exact", "as: exakt", 17, "`as` names no id: `exakt`", "did you mean `exact`?"),
    "comparison with itself": ("as: exact", "as: a", 17, "a comparison of a thing with itself", "different ids"),
    "half a comparison": ("as: exact, ", "", 17, "not a comparison", "write {better: ID, than: ID"),
    "comparison without a sentence": (", says: the same run", "", 17, "not a comparison", "says: SENTENCE"),
    "losses against float32": ("a, as: exact", "exact, as: a", 17, "`as` names `a`, which is not float64", "float64"),
    "losses without training": ("id: a", "id: a\n        training: {steps: 0}", 18, "`a` does not train", "that train"),
    "scores on other items": (
        "method: lora\n        dtype: float64\n        config: {rank: 4, alpha: 8, targets: [q_proj]}\n"
        "comparisons:\n  - {same-losses: a, as: exact,",
        "method: full\n        evaluation: {items: 5}\ncomparisons:\n  - {better: a, than: exact,",
        16,
        "not scored on the same items",
        "one `items`",
    ),
    "source that can move": (
        "matrix:",
        "sources:\n  - {name: m, kind: causal, source: 'hub:org/name'}\nmatrix:",
        4,
        "needs revision, the 40 hex digits",
        "suites/sources.yaml",
    ),
    "source of a taken name": (
        "matrix:",
        "sources:\n  - {name: tiny-llama, kind: causal, source: 'made:tiny-llama'}\nmatrix:",
        4,
        "a second source named `tiny-llama`",
        "rename",
    ),
    "source without a kind": ("matrix:", "sources:\n  - {name: m, source: 'made:m'}\nmatrix:", 4, "`kind` is", "add"),
    "unknown anchor": ("{rank: 4,", "{<<: *lora, rank: 4,", 11, "`*lora` stands for nothing", "write the value out"),
    "anchor that is nearly known": ("[q_proj]}\n", "&all [q_proj], init: *al}\n", 11, "no `&al` is above it", "`all`?"),
    "merge of a word": ("{rank: 4,", "{<<: lora, rank: 4,", 11, "`<<` merges something that has no keys", "*anchor"),
    "alias in itself": ("[q_proj]}\n      -", "&t [*t]}\n      -", 11, "an alias that contains itself", "write"),
    "alias in itself, given twice": (
        "title:",
        "a: &a {b: *a}\na: &c {b: *c}\nb:",
        2,
        "an alias that contains itself",
        "write",
    ),
    "unknown anchor as a key": (
        "{rank: 4,",
        "{rank: 4, *lora : 3,",
        11,
        "`*lora` stands for nothing",
        "write the value",
    ),
    "tag that its text does not fit": (
        "lr: 1e-3",
        "compile: !!bool maybe",
        6,
        "no bool, after the tag `!!bool`",
        "leave",
    ),
    "tag of nothing": ("steps: 4", "steps: !!int ''", 6, "a text that is no int", "leave the tag out"),
    "tag": ("tiny-llama", "!env MODEL", 4, "a tag, `!env`, which is not allowed", "write a plain value"),
    "key that is a list": ("title:", "[a]:", 2, "a key that is not a word", "write `key: value`"),
    "two documents": ("matrix:", "---\nmatrix:", 3, "not YAML: but found another document", "mend the YAML"),
    "half a character": ("A small", '"\\ud800" #', 2, "half a character", "write the character itself"),
    "control character": ("A small", "A \x07small", 2, "not YAML", "take the character out"),
}


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Run the command; return its exit code and what it said, which must be one message and all there is."""
    code = main(argv)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert printed.err.count("peft-harness: ") == 1
    assert printed.err.startswith("peft-harness: ")
    return code, printed.err


@pytest.mark.parametrize("name", BAD_SUITES)
def test_bad_suite(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, line, message, hint = BAD_SUITES[name]
    assert old in SUITE
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.replace(old, new, 1), encoding="utf-8")
    code, said = run(capsys, "plan", str(path))
    assert code == Exit.USAGE
    found = re.findall(r"^  (\S+):(\d+): (.*)\n    hint: (.*)$", said, re.MULTILINE)
    assert len(found) == int(re.search(r"(\d+) mistakes? in the suite", said)[1]), f"a problem has no hint: {said}"
    assert any(
        (where, number) == (str(path), str(line)) and message in what and hint in how
        for where, number, what, how in found
    ), said


FAR = """\
  - model: [tiny-lama, 3]
    task: toy-sentiment
    method: lora
    optimizer: adamw
    optimizer: sgd
    training: {steps: 1, lr: [1e-3, abc]}
    evaluation: {item: 65}
    config: {rank: 0}
"""
FAR_MISTAKES = {
    "no model or data set named 'tiny-lama'",
    "an entry of `model` is 3",
    "an entry of `lr` is 'abc'",
    "`optimizer` is given twice, first in line N",
    "unknown key `item`",
    "`items` is 65, but toy-sentiment has 64 test items",
    "`rank` of lora must be at least 1, got 0",
}
# Of what is no YAML nothing can be read, nor of what stands under a key that nobody knows.
HIDING = {name for name, row in BAD_SUITES.items() if "not YAML" in row[3]} | {"no matrix", "scalar for a list"}


def mistakes(path: Path, text: str) -> list[tuple[int, str]]:
    """Return the line of each mistake of a suite, and what it is."""
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SuiteError) as caught:
        loader.load(path)
    assert all(problem.hint for problem in caught.value.problems)
    return [(int(problem.where.rpartition(":")[2]), problem.what) for problem in caught.value.problems]


@pytest.mark.parametrize("name", sorted(BAD_SUITES.keys() - HIDING))
def test_no_mistake_hides_those_of_another_entry(name: str, tmp_path: Path) -> None:
    text = SUITE.replace(*BAD_SUITES[name][:2], 1)
    alone, both = (
        {re.sub(r"line \d+", "line N", what) for _, what in mistakes(tmp_path / "suite.yaml", written)}
        for written in (text, text.replace("comparisons:", f"{FAR}comparisons:", 1))
    )
    assert both == alone | FAR_MISTAKES


TAKEN_OUT = {
    "a key that is misspelt behind a bad value": (
        "base: [5, {quantisation: nf4, implementation: fused}]",
        ["an entry of `base` is 5", "unknown key `quantisation`"],
    ),
    "a key that is misspelt between others": (
        "base: [5, {quantisation: nf4}, {implementation: x}]",
        [
            "an entry of `base` is 5",
            "base has an `implementation`, x, but no `quantization`",
            "base nf4 has no `implementation`",
            "unknown key `quantisation`",
        ],
    ),
    "what a later value lacks, as it was taken out": (
        "base: [5, {}, {quantization: zzz, implementation: fused}]",
        ["`quantization` is 'zzz', which is none of none, nf4, nf4-dq", "an entry of `base` is 5"],
    ),
    "what the value behind it lacks": (
        "base: [5, {implementation: fused}]",
        ["an entry of `base` is 5", "base has an `implementation`, fused, but no `quantization`"],
    ),
    "all of an inner list, and a part of the next": (
        "config: {targets: [[*a], [*b, q_proj]]}",
        ["`*a` stands for nothing: no `&a` is above it", "`*b` stands for nothing: no `&b` is above it"],
    ),
    "a value of a key that is misspelt": (
        "trainig: {steps: *a}",
        ["`*a` stands for nothing: no `&a` is above it", "unknown key `trainig`"],
    ),
    "what an unknown anchor might have brought": (
        "*a : 3",
        ["`*a` stands for nothing: no `&a` is above it"],
    ),
}


@pytest.mark.parametrize("name", TAKEN_OUT)
def test_what_is_taken_out_leaves_the_rest_in_its_place(name: str, tmp_path: Path) -> None:
    written, found = TAKEN_OUT[name]
    needed = "training: {steps: 1}, " if "steps" not in written else ""
    text = f"""\
suite: small
matrix:
  - {{model: tiny-llama, task: toy-sentiment, {needed}evaluation: {{items: 8}}, method: lora,
     {written}}}
"""
    assert mistakes(tmp_path / "suite.yaml", text) == [(4, what) for what in found]


def test_mistakes_come_in_one_order_whatever_python_hashes(tmp_path: Path) -> None:
    """Values that cannot be read are a set, and where two emptied lists once met, its order decided on a traceback."""
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.replace("[q_proj]", "[[*a], [*b, q_proj], [*c], [*d, *e]]", 1), encoding="utf-8")
    command = [sys.executable, "-m", "harness.cli", "plan", str(path)]
    said = {
        subprocess.run(
            command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=False
        ).stderr
        for seed in ("1", "2", "3")
    }
    (told,) = said
    assert "5 mistakes in the suite" in told


def test_an_unknown_anchor_hides_no_mistake_of_what_it_was_to_be_merged_into(tmp_path: Path) -> None:
    entry = "  - {<<: *nix, id: c, method: loar, model: nope, config: {rank: -3}}\ncomparisons:"
    sources = "sources:\n  - {<<: *nix, name: a, kind: causl}\n  - {<<: *nix, name: b}\nmatrix:"
    text = SUITE.replace("comparisons:", entry).replace("matrix:", sources).replace("tiny-llama", "[tiny-llama, a, b]")
    assert mistakes(tmp_path / "suite.yaml", text) == [
        (4, "`*nix` stands for nothing: no `&nix` is above it"),
        (4, "`kind` is 'causl', which is none of encoder, causal, data"),
        (5, "`*nix` stands for nothing: no `&nix` is above it"),
        (19, "`*nix` stands for nothing: no `&nix` is above it"),
        (19, "`rank` of lora must be at least 1, got -3"),
        (19, "no model or data set named 'nope'"),
        (19, "unknown method `loar`"),
    ]


def test_nothing_in_the_place_of_a_collection_does_not_hide_it(tmp_path: Path) -> None:
    text = SUITE.replace("cells:\n", "cells:\n    cells:\n").replace(
        "training: {steps: 4, ", "training:\n    training: {"
    )
    assert mistakes(tmp_path / "suite.yaml", text.replace("rank: 4", "rank: 0", 1)) == [
        (7, "`training` is given twice, first in line 6"),
        (10, "`cells` is given twice, first in line 9"),
        (11, "`training.steps` is missing"),
        (13, "`rank` of lora must be at least 1, got 0"),
        (14, "`training.steps` is missing"),
    ]


def test_a_scalar_in_the_place_of_a_collection_does_not_hide_it(tmp_path: Path) -> None:
    # What the keys lack is no mistake: perhaps the scalar was meant.
    text = SUITE.replace("training: {steps: 4, ", "training: 5\n    training: {").replace("lr: 1e-3", "lr: 7")
    assert mistakes(tmp_path / "suite.yaml", text) == [
        (7, "`lr` is 7"),
        (7, "`training` is given twice, first in line 6"),
    ]


def test_a_key_that_is_given_three_times_is_told_twice(tmp_path: Path) -> None:
    text = SUITE.replace("lr: 1e-3}", "lr: 1e-3}\n    training:\n      steps: 4\n      steps: 5")
    assert mistakes(tmp_path / "suite.yaml", text) == [
        (7, "`training` is given twice, first in line 6"),
        (9, "`steps` is given twice, first in line 6"),
    ]


def test_a_key_that_is_given_twice_hides_nothing_of_either(tmp_path: Path) -> None:
    text = """\
suite: one
suite: my suite
matrix:
  - model: tiny-llama
    task: toy-sentiment
    training: {steps: 1, lr: 7}
    training: {lr: 8, batch: 0}
    evaluation: {items: 8}
    cells:
      - {id: a, method: lorra}
    cells:
      - {id: b, method: lora, seed: 0, seed: 1}
      - {id: c, method: lora, config: {rank: 0}, config: {rank: 1, alpa: 2}}
comparisons:
  - {better: b, than: c, says: more}
matrix:
  - {model: tiny-lama, task: toy-sentiment, method: [full, 3], training: {steps: 1}, evaluation: {items: 65}}
comparisons:
  - {better: b, than: d, says: more}
"""
    assert mistakes(tmp_path / "suite.yaml", text) == [
        (2, "`suite` is given twice, first in line 1"),
        (6, "`lr` is 7"),
        (7, "`batch` is 0"),
        (7, "`training` is given twice, first in line 6"),
        (10, "unknown method `lorra`"),
        (11, "`cells` is given twice, first in line 9"),
        (12, "`seed` is given twice, first in line 12"),
        (13, "`config` is given twice, first in line 13"),
        (13, "`lora` has no `alpa`"),
        (13, "`rank` of lora must be at least 1, got 0"),
        (16, "`matrix` is given twice, first in line 3"),
        (17, "`items` is 65, but toy-sentiment has 64 test items"),
        (17, "an entry of `method` is 3"),
        (17, "no model or data set named 'tiny-lama'"),
        (18, "`comparisons` is given twice, first in line 14"),
        (19, "`than` names no id: `d`"),
    ]


def test_an_ill_typed_entry_of_an_axis_hides_no_other(tmp_path: Path) -> None:
    axes = """\
    training:
      steps: 4
      batch: [x, 6]
      accumulate:
        - many
        - 4
      lr:
        - 1e-3
        - "abc"
        - 7
        - [1e-4]
"""
    text = SUITE.replace("    training: {steps: 4, batch: 2, lr: 1e-3}\n", axes).replace("[q_proj]", "[q_proj, 3]", 1)
    text = text.replace("model: tiny-llama", "model: [3, tiny-lama, 4, tiny-llama]")
    text = text.replace("dtype: float64", "dtype: [1, float32]")
    assert mistakes(tmp_path / "suite.yaml", text) == [
        (4, "an entry of `model` is 3"),
        (4, "an entry of `model` is 4"),
        (4, "no model or data set named 'tiny-lama'"),
        (8, "an entry of `batch` is 'x'"),
        (10, "an entry of `accumulate` is 'many'"),
        (11, "`accumulate` is 4, which does not divide the batch of 6 examples"),
        (14, "an entry of `lr` is 'abc'"),
        (15, "an entry of `lr` is 7"),
        (16, "an entry of `lr` is [0.0001]"),
        (21, "`targets` of lora must be a list of words, got ['q_proj', 3]"),
        (24, "an entry of `dtype` is 1, which is none of float64, float32, bfloat16, float16"),
        (27, "`as` names `exact`, which is not float64"),
    ]


def test_what_was_taken_out_is_told_once(tmp_path: Path) -> None:
    # With the default in its place, `exact` would be the same Cell as `a`, and no float64 for the comparison.
    assert mistakes(tmp_path / "suite.yaml", SUITE.replace("float64", "float63")) == [
        (14, "`dtype` is 'float63', which is none of float64, float32, bfloat16, float16")
    ]


def test_a_model_whose_source_is_wrong_is_not_unknown_too(tmp_path: Path) -> None:
    sources = "sources:\n  - {name: mine, kind: causl, source: 'made:tiny-llama'}\nmatrix:"
    text = SUITE.replace("matrix:", sources).replace("model: tiny-llama", "model: [mine, tiny-lama]")
    assert mistakes(tmp_path / "suite.yaml", text) == [
        (4, "`kind` is 'causl', which is none of encoder, causal, data"),
        (6, "no model or data set named 'tiny-lama'"),
    ]


def test_a_block_s_mistake_hides_nothing_of_a_cell_that_overrides_it(tmp_path: Path) -> None:
    text = SUITE.replace("steps: 4", "steps: -4").replace("id: a\n", "id: a\n        training: {steps: 0}\n")
    assert mistakes(tmp_path / "suite.yaml", text) == [
        (6, "`steps` is -4"),
        (18, "`a` does not train, so it has no losses"),
    ]


def test_a_comparison_without_a_sentence_is_judged_all_the_same(tmp_path: Path) -> None:
    text = SUITE.replace("as: exact, says: the same run", "as: [a, exakt]")
    assert mistakes(tmp_path / "suite.yaml", text) == [
        (17, "`as` names `a`, which is not float64"),
        (17, "`as` names no id: `exakt`"),
        (17, "a comparison of a thing with itself"),
        (17, "not a comparison"),
    ]


def test_a_shared_key_may_be_of_a_method_that_was_taken_out(tmp_path: Path) -> None:
    text = SUITE.replace("    cells:\n", "    config: {total_steps: 4}\n    cells:\n")
    assert mistakes(tmp_path / "suite.yaml", text.replace("method: lora", "method: [3, lora]", 1)) == [
        (11, "an entry of `method` is 3")
    ]


def test_a_misspelt_key_is_read_as_the_one_that_is_meant(tmp_path: Path) -> None:
    text = SUITE.replace("matrix:", "matirx:").replace("cells:", "cell:").replace("steps: 4", "step: -4")
    assert mistakes(tmp_path / "suite.yaml", text.replace("method: lora", "method: lorra", 1)) == [
        (3, "unknown key `matirx`"),
        (6, "`steps` is -4"),
        (6, "unknown key `step`"),
        (8, "unknown key `cell`"),
        (10, "unknown method `lorra`"),
    ]


def test_the_sound_suite_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE, encoding="utf-8")
    assert len(loader.load(path).entries) == 2


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"", 1, "the file is empty"),
        (b"# nothing but talk\n", 1, "the file is empty"),
        (b"- a\n- b\n", 1, "expected keys and values, got a list"),
        (b"suite\n", 1, "expected keys and values, got `suite`"),
        (b"suite: a\ntitle: caf\xe9\n", 2, "byte 0xe9 is not UTF-8"),
        ("suite: a\n".encode("utf-16"), 1, "byte 0xff is not UTF-8"),
        (b"a: " + b"[" * 5000, 1, "not YAML that can be read: nested too deeply"),
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
    code, said = run(capsys, "run", str(path))
    assert code == Exit.USAGE
    assert f"{path}:{line}: {message}" in said
    assert "hint: " in said


def test_every_mistake_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    changes = ["titel:", "tiny-lama", "steps: -4", "items: 650", "id: a\n        methd: lora", "{rank: 0", "as: exakt"]
    text = SUITE
    for old, new in zip(
        ["title:", "tiny-llama", "steps: 4", "items: 8", "id: a", "{rank: 4", "as: exact"], changes, strict=True
    ):
        text = text.replace(old, new, 1)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SuiteError) as caught:
        loader.load(path)
    assert [int(p.where.rpartition(":")[2]) for p in caught.value.problems] == [2, 4, 6, 7, 10, 12, 18]


def test_mistakes_of_how_it_is_trained_come_all_at_once(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    text = SUITE.replace("batch: 2,", "batch: 6, accumulate: 4, lr_ratio: 8,", 1)
    text = text.replace("id: a", "id: a\n        optimizer: paged-adamw", 1).replace(
        "method: lora", "method: galore", 1
    )
    path.write_text(text.replace("{rank: 4, alpha: 8,", "{rank: 4,", 1), encoding="utf-8")
    with pytest.raises(SuiteError) as caught:
        loader.load(path)
    assert [(int(p.where.rpartition(":")[2]), p.what.partition(",")[0]) for p in caught.value.problems] == [
        (6, "`accumulate` is 4"),
        (6, "`lr_ratio` is 8"),
        (10, "`optimizer` is paged-adamw"),
    ]
    assert all(p.hint for p in caught.value.problems)


def test_all_that_layerwise_updates_cannot_be_with_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    text = SUITE.replace(
        "batch: 2,", "batch: 2, accumulate: [1, 2], compile: true,\n      layerwise: [false, true],", 1
    )
    text = text.replace(
        "id: a\n        method: lora", "id: a\n        dtype: float16\n        method: [full, galore]", 1
    )
    path.write_text(text.replace("{rank: 4, alpha: 8,", "{rank: 4,", 1), encoding="utf-8")
    with pytest.raises(SuiteError) as caught:
        loader.load(path)
    said = [p for p in caught.value.problems if p.what.startswith("`layerwise` is true, and ")]
    assert {p.where.rpartition(":")[2] for p in said} == {"7"}
    for part in ("`accumulate` is 2", "`compile` is true", "dtype is float16", "lora does not train"):
        assert sum(part in p.what for p in said) >= 1, part
    assert all(p.hint for p in said)


def test_what_is_missing_hides_no_other_mistake(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    text = SUITE.replace("steps: 4, batch: 2,", "batch: 6, accumulate: 4, lr_ratio: 8,", 1).replace("items: 8, ", "", 1)
    base = "{quantization: nf4, implementation: bitsandbytes}"
    galore = f"id: a\n        optimizer: paged-adamw\n        base: {base}\n        method: galore"
    text = text.replace("id: a\n        method: lora", galore, 1).replace("{rank: 4, alpha: 8,", "{rank: 4,", 1)
    text = text.replace("a, as: exact", "exact, as: a")
    path.write_text(text + "  - {better: a, than: exact, says: more}\n", encoding="utf-8")
    with pytest.raises(SuiteError) as caught:
        loader.load(path)
    assert [(int(p.where.rpartition(":")[2]), p.what.partition(",")[0]) for p in caught.value.problems] == [
        (6, "`accumulate` is 4"),
        (6, "`lr_ratio` is 8"),
        (9, "`evaluation.items` is missing"),
        (9, "`training.steps` is missing"),
        (10, "`optimizer` is paged-adamw"),
        (11, "base nf4 keeps frozen weights in 4 bits"),
        (14, "`evaluation.items` is missing"),
        (14, "`training.steps` is missing"),
        (19, "`as` names `a`"),
    ]
    assert all(p.hint for p in caught.value.problems)


def test_a_batch_that_was_taken_out_is_not_divided(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.replace("batch: 2,", "batch: 0, accumulate: 5,", 1), encoding="utf-8")
    with pytest.raises(SuiteError) as caught:
        loader.load(path)
    assert [p.what for p in caught.value.problems] == ["`batch` is 0"]


def test_a_mistake_in_a_block_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.replace("tiny-llama", "tiny-lama"), encoding="utf-8")
    with pytest.raises(SuiteError) as caught:
        loader.load(path)
    assert len(caught.value.problems) == 1


def test_a_wrong_value_is_not_also_missing(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.replace("steps: 4", "steps: four").replace("items: 8", "items: []"), encoding="utf-8")
    with pytest.raises(SuiteError) as caught:
        loader.load(path)
    assert [p.what for p in caught.value.problems] == ["`steps` is 'four'", "`items` is []"]


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
        (["plan", "sources"], "SUITE: no suite `sources`", "quick, sentinels, smoke"),
        (["plan", "nowhere.yaml"], "nowhere.yaml:1: cannot read: No such file", "name a readable YAML file"),
        (["plan", "."], "SUITE: no suite `.`", "name a .yaml file"),
        (["plan", "smoke", "--only", "metod=lora"], "--only metod=lora: unknown key `metod`", "did you mean `method`?"),
        (["plan", "smoke", "--only", "dora"], "--only dora: no Cell fits", "id=lora-float64"),
        (["plan", "smoke", "--only", ""], "no Cell fits", "id=lora-float64"),
        (["plan", "smoke", "--only", "method=lora,method=lor"], "no Cell fits `method=lor`", "did you mean `lora`?"),
        (["plan", "smoke", "--only", "lora,nope"], "no Cell fits `nope`", "leave that term out"),
        (["plan", "smoke", "--only", "=lora"], "`=lora` names no key", "write key=value, or a word alone"),
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
            "--cores: 4096 cores are asked for",
            "ask for at most",
        ),
        (["report"], "Missing argument 'RUN...'", "see `peft-harness report --help`"),
        (["report", "no-such-run"], "no run 'no-such-run'", "`peft-harness run quick` first"),
        (["list", "method"], "'method' is not one of 'methods'", "see `peft-harness list --help`"),
        (["explain", "lorra"], "explain: nothing is called `lorra`", "did you mean `lora`?"),
        (["explain", "9"], "explain: nothing is called `9`", "`list measures` show names"),
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
    code, said = run(capsys, *argv)
    assert code == Exit.USAGE
    assert message in said
    assert hint in said.partition("hint: ")[2]
