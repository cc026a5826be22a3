"""Weights of which no product is taken: they are no part of a training's memory, and are there again to detach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.cell.measure.memory import model_tensors, tensor_bytes
from harness.cell.training.offloaded_weights import OffloadedWeights, unused
from harness.conformance.subject import adaptable_layers, configure
from harness.conformance.tolerance_constants import FOOTPRINT_LEDGER
from harness.memory_model.ledger import OWN
from harness.methods.registry import discover
from harness.records import store
from support.sandbox import ForkSandbox
from support.small_llama import METHODS, llama, off, predicted

IDS = torch.arange(32)[None]
KEEPING = [("qlora", "reference"), ("qlora", "fused"), ("qlora", "hf-peft"), ("pissa", "reference"), ("pissa", "fused")]
"""Those that keep the original weight beside their own form of it. hf-peft's PiSSA writes its residual into the weight."""


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def attached(method: str, implementation: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return a model, what attaching to it returned, and the layers under the adapters."""
    model, config = llama("float32"), configure(method, METHODS[method])
    bases = adaptable_layers(model, config)
    attach = discover().find("method", method, implementation)
    return model, attach(model, config, torch.Generator().manual_seed(0)), bases


@pytest.mark.parametrize(("method", "implementation"), KEEPING, ids=str)
def test_a_weight_that_no_product_takes(method: str, implementation: str, tmp_path: Path) -> None:
    before = logits(llama("float32"))
    model, adapted, bases = attached(method, implementation)
    adapts = logits(model)
    aside = OffloadedWeights(unused(method, adapted, bases), tmp_path)
    adds = {id(t) for t in adapted.tensors().values()}
    every = {id(t): t for t in (*model_tensors(model), *(base.weight for base in bases.values()))}
    there = tensor_bytes(t for i, t in every.items() if i not in adds)
    assert off(predicted(method, "float32")["weights"][OWN], there) <= FOOTPRINT_LEDGER
    assert torch.equal(logits(model), adapts)
    model(input_ids=IDS).logits.sum().backward()
    assert all(t.grad is not None for t in adapted.tensors().values())
    aside.restore()
    adapted.detach()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("method", "implementation", "tied"),
    [
        ("pissa", "reference", "model.embed_tokens"),  # the output layer has the same weight
        ("qlora", "hf-peft", "lm_head"),  # it takes the dense output layer out of the model, whose table is that weight
    ],
)
def test_what_another_layer_uses_stays(method: str, implementation: str, tied: str) -> None:
    model = llama("float32")
    model.lm_head.weight = model.model.embed_tokens.weight
    config = configure(method, {"rank": 4, "targets": [tied, "q_proj"]})
    bases = adaptable_layers(model, config)
    adapted = discover().find("method", method, implementation)(model, config, torch.Generator().manual_seed(0))
    assert tied in bases
    assert unused(method, adapted, bases).keys() == {f"{path}.weight" for path in bases.keys() - {tied}}


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "galore", "full"])
def test_methods_that_multiply_by_the_weight_keep_it(method: str) -> None:
    _, adapted, bases = attached(method, "reference")
    assert unused(method, adapted, bases) == {}


def test_a_full_disk_leaves_the_weights_where_they_were(tmp_path: Path) -> None:
    model, adapted, bases = attached("qlora", "reference")
    adapts, weights = logits(model), unused("qlora", adapted, bases)
    with pytest.raises(FileNotFoundError):
        OffloadedWeights(weights, tmp_path / "gone")
    assert torch.equal(logits(model), adapts)
    assert all(weight.numel() for weight in weights.values())


@pytest.mark.nightly
def test_a_cell_of_qlora_has_the_weights_that_are_predicted(fork_sandbox: ForkSandbox) -> None:
    suite = fork_sandbox.suite(
        "{id: q, method: qlora, config: {rank: 4, alpha: 8, targets: [q_proj, v_proj, down_proj]}}"
    )
    assert fork_sandbox.command("run", suite, "--out", "run").code == 0
    (record,) = store.read_run(fork_sandbox.run_folder).records
    assert record.measurements is not None
    memory = record.measurements.memory
    assert memory.predicted is not None
    assert memory.weights_B == memory.predicted.weights_B
    assert {(x.variant, bool(x.seconds)) for x in record.measurements.latency} >= {("base", True), ("unmerged", True)}
    assert not [
        path for path in fork_sandbox.run_folder.rglob("*") if "set-aside" in path.name or path.name.startswith("tmp")
    ]
