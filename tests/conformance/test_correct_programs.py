"""Programs that are right, and that a check once failed."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from harness.conformance import parity_suite
from harness.conformance.execution import suite_run
from harness.methods.registry import Implementation, discover
from harness.records.record import Outcome
from reference import galore


def outcomes(mine: Implementation, check: str, config: dict[str, Any], dtype: str, **shape: int) -> set[Outcome]:
    of = parity_suite.CaseShape.model_validate({"tokens": 9, "in": shape["inputs"], "out": shape["outputs"]})
    case = parity_suite.MethodCase(config, "linear", of, dtype)
    return {one.result.outcome for one in suite_run.run_case(mine, parity_suite.load(mine.target), case, only=[check])}


@pytest.mark.parametrize("name", ["reference", "fused"])
@pytest.mark.parametrize(("rank", "dtype"), [(48, "bfloat16"), (47, "float16"), (46, "float16")])
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 48), (48, 130)])
def test_a_small_residual_may_be_rounded_as_the_product_in_float32_says(
    name: str, rank: int, dtype: str, inputs: int, outputs: int
) -> None:
    """At nearly full rank, PiSSA's residual is the difference of two numbers that are hundreds of times as large."""
    mine = discover().find("method", "pissa", name)
    config = {"rank": rank, "alpha": 16.0}
    assert outcomes(mine, "residual", config, dtype, inputs=inputs, outputs=outputs) == {Outcome.PASS}


def test_an_optimizer_may_step_other_parameters_before_it_refuses_a_gradient() -> None:
    def attach(model: nn.Module, config: galore.Config, generator: Any) -> Any:
        adapted: Any = galore.attach(model, config, generator)
        make = adapted.optimizer

        def other_groups_first(lr: float, weight_decay: float) -> Any:
            optimizer = make(lr, weight_decay)
            optimizer.param_groups.reverse()
            return optimizer

        adapted.optimizer = other_groups_first
        return adapted

    mine = Implementation("mine", "method", "galore", attach)
    assert outcomes(mine, "closure", {"rank": 3}, "float32", inputs=40, outputs=24) == {Outcome.PASS}
