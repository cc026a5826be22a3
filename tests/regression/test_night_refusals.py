"""`night`: a wrong input is refused before anything runs, and the hint says how to mend it."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.bench.gpu import Gpu
from harness.cli import main
from harness.errors import Exit
from harness.regression.night import run as nights


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", ""], "hint: parts: parity-bfloat16, "),
        (["--only", "ceilings,step-adalora"], "hint: repeat the option: --only ceilings --only step-adalora"),
        (["--only", "step-dora"], "hint: only a night on a GPU has it; a rehearsal has parity-bfloat16, "),
        (["--only", "ceiling_"], "hint: did you mean `ceilings`?"),
        (["--budget", "10min"], "`10min` is no time above 0; write e.g. 90s, 10m or 1h"),
    ],
)
def test_a_wrong_word_is_refused_with_what_to_write_instead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    out = tmp_path / "night"
    assert main(["night", "--device", "cpu", *words, "--out", str(out)]) == Exit.USAGE
    assert told in capsys.readouterr().err
    assert not out.exists()


def test_a_mistake_in_the_suite_of_real_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nights, "find_gpu", lambda: Gpu(name="A card"))
    suite, out = tmp_path / "own.yaml", tmp_path / "night"
    suite.write_text("suite: own\nmatrx: []\n")
    assert main(["night", "--real", str(suite), "--out", str(out)]) == Exit.USAGE
    assert f"{suite}:2" in capsys.readouterr().err
    assert not out.exists()
