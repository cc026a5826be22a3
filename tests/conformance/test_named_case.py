"""The full name of a case repeats it, also a case that a search has shrunk and that no seed draws."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from harness.conformance import parity_suite
from harness.conformance.case_selection import FEW
from harness.conformance.drawing import named_case, sample
from harness.conformance.drawing.search import cases
from harness.errors import Exit
from harness.methods.registry import DTYPES
from support.sandbox import ForkSandbox

_SUITES = sorted(
    name for name in parity_suite.names() if not isinstance(parity_suite.load_plan(name), parity_suite.LoaderSuite)
)


@pytest.mark.parametrize("name", _SUITES)
def test_every_case_has_a_name_that_gives_it_back(name: str) -> None:
    plan = parity_suite.load_plan(name)
    for case in [*cases(plan, DTYPES, 20, first_seed=5), *sample.fixed(plan, FEW, DTYPES)]:
        read = named_case.read(plan, f"{case} {case.dtype}")
        assert read is not None
        assert str(read) == str(case)
        if case.drawn:
            assert read == replace(case, drawn=True)


@pytest.mark.parametrize(
    "name",
    [
        "", "float32", "rank=8 float32", "rank=8 9x24x40", "rank=8 9x24 float32", "rank=8 9x24x40 float8",
        "9x24x40 rank=8 float32",
        "rank=8 conv9d 9x24x40 float32", "rank=8 9x24x40 magnitude=vast float32", "rank=8  9x24x40 float32",
    ],
)  # fmt: skip
def test_another_text_is_no_name(name: str) -> None:
    assert named_case.read(parity_suite.load("lora"), name) is None


@pytest.mark.nightly
def test_a_case_that_is_not_drawn_is_tried_by_its_full_name(fork_sandbox: ForkSandbox) -> None:
    name = "rank=5 alpha=3.0 7x23x19 magnitude=small float32"
    asked = ("check", "reference", "--method", "lora", "--drawn", "1", "--case")
    done = fork_sandbox.command(*asked, name, "--json")
    assert done.code == Exit.PASS
    assert {f"{row['case']} {row['dtype']}" for row in json.loads(done.out)["checks"]} == {name}
    refused = fork_sandbox.command(*asked, "rank=0 7x23x19 float32")
    assert "--drawn tries any case by its full name and dtype" in refused.out
