"""Checks of loaders with several adapters: what a loader does not offer is no failure, and a mistake is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.conformance import parity_suite
from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.conformance.execution import suite_run
from harness.conformance.findings.outcomes import CheckOutcome
from harness.methods.loader import ADAPTER_FILES, Loader
from harness.methods.reference_loader import ReferenceLoader
from harness.methods.registry import Implementation, discover
from harness.records.record import Outcome
from reference.adapter_file import AdapterSettings, combine


class OnlyLoads(Loader):
    """A program that loads adapters and computes logits, and offers nothing else."""

    def __init__(self, base_folder: Path, dtype: str) -> None:
        self.inner = ReferenceLoader(base_folder, dtype)

    def load(self, folder: Path, name: str) -> None:
        self.inner.load(folder, name)

    def logits(self, prompts: Sequence[Sequence[int]], name: str | None) -> list[Tensor]:
        return self.inner.logits(prompts, name)


class SumsOneWay(ReferenceLoader):
    """A program with two ways of adding adapters up. One of them raises, the other is a bit off."""

    combinations = ("broken", "off")

    def combine(self, names: Sequence[str], weights: Sequence[float], new_name: str, way: str) -> None:
        if way == "broken":
            raise RuntimeError("no such way")
        super().combine(names, [weight + 1e-3 for weight in weights], new_name, way)


def outcomes(loader: Callable[[Path, str], Loader], adapter: str) -> dict[str, CheckOutcome]:
    implementation = Implementation("mine", "loader", ADAPTER_FILES, loader, dtypes=("float32",))
    plan, case = parity_suite.load_plan(ADAPTER_FILES), parity_suite.LoaderCase(adapter, "float32")
    return {one.check: one for one in suite_run.run_case(implementation, plan, case)}


def test_operations_that_a_loader_does_not_offer_are_unsupported() -> None:
    found = outcomes(OnlyLoads, "plain")
    assert {name for name, one in found.items() if one.result.outcome is Outcome.PASS} == {
        "logits",
        "switch",
        "renamed",
    }
    others = [one.result for one in found.values() if one.result.outcome is not Outcome.PASS]
    assert all(one.outcome is Outcome.SKIPPED and one.detail.startswith("unsupported: ") for one in others)


@pytest.mark.slow
def test_a_way_of_adding_up_that_raises_hides_no_wrong_number_of_another_way() -> None:
    found = outcomes(SumsOneWay, "plain")["combine_two"].result
    assert (found.outcome, found.tensor.partition(",")[0]) == (Outcome.FAIL, "off sum")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["dora", "tied_head", "modules_to_save"])
def test_unmerging_says_whether_the_base_is_restored_to_the_last_bit(adapter: str) -> None:
    found = outcomes(ReferenceLoader, adapter)
    assert {name for name, one in found.items() if one.result.outcome is not Outcome.PASS} == set()
    assert found["merge_undone"].result.detail == "restored to the last bit"


@pytest.mark.nightly
def test_the_reference_passes_every_check_with_every_adapter() -> None:
    found = suite_run.run(discover(only=["reference"]).find("loader", ADAPTER_FILES, "reference"))
    assert {(one.case, one.dtype, one.check) for one in found if one.result.outcome is not Outcome.PASS} == set()


def test_a_sum_adds_the_changes_of_the_weights_up() -> None:
    W, m = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 1
    A, B = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    start, keys = "base_model.model.layer", ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    tensors = {f"{start}.{key}": tensor for key, tensor in zip(keys, (A, B, m), strict=True)}
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(3, 4, bias=False, dtype=torch.float64)})
    model["layer"].weight.data.copy_(W)
    lora = AdapterSettings(r=2, lora_alpha=6, target_modules=["layer"])
    dora = AdapterSettings(r=2, lora_alpha=2, target_modules=["layer"], use_dora=True)
    V = W + B @ A
    update = m[:, None] * V / V.norm(dim=1, keepdim=True) - W
    combine(model, [(lora, {key: tensors[key] for key in list(tensors)[:2]}, 0.5), (dora, tensors, -2.0)])
    expected = {"W": W + 0.5 * 3 * B @ A - 2 * update}
    assert noise_floor({"W": model["layer"].weight.data}, expected, expected, "float64").passed
