"""Power of the checks: what `check --self-test --power` measures and prints."""

from __future__ import annotations

import json
import sys

import pytest

from harness.cli import main
from harness.conformance.power import CHECKS
from harness.errors import Exit


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform == "win32", reason="the checks are tried in forks")
def test_the_power_of_the_checks_of_an_operation(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check", "--self-test", "--power", "--op", "nf4_dequantize", "--jobs", "1"]
    assert main([*command, "--json"]) == Exit.PASS
    found = {(one["check"], one["dtype"]): one for one in json.loads(capsys.readouterr().out)["power"]}
    assert {name for name, _ in found} <= set(CHECKS)
    outputs, rounded_once = found["outputs", "bfloat16"], found["rounded_once", "bfloat16"]
    # A single extra rounding is what `rounded_once` is for: `outputs` allows several.
    assert rounded_once["roundings"] == 1 < outputs["roundings"]
    assert found["outputs", "float32"]["scaling"] < found["outputs", "float16"]["scaling"] < outputs["scaling"] < 0.01


@pytest.mark.parametrize("options", [["--power"], ["--self-test", "--power", "--seed", "1"]])
def test_options_that_do_not_go_together_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *options]) == Exit.USAGE
    assert "--power" in capsys.readouterr().err


def test_an_unknown_target_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--self-test", "--power", "--method", "lroa"]) == Exit.USAGE
    assert "did you mean `lora`?" in capsys.readouterr().err
