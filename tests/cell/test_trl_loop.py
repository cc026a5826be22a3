"""trl's SFTTrainer as a training loop: the same losses and weights as the harness's own loop, and a model left as it was."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

pytest.importorskip("trl", reason="an optional dependency: pip install trl")

from harness.cell.loop_checks import checks
from harness.cell.loop_checks.observed_training import RECIPE, Trainee, attached, batches
from harness.cell.training import loop, loops, optimizers, trl_loop
from harness.cell.training.counted_step import step_peak
from harness.conformance.comparison.tolerance_policies import exact
from harness.conformance.findings import loop_settings
from harness.conformance.findings.outcomes import CheckStatus
from harness.errors import Unsupported
from harness.methods.registry import Registry, discover
from harness.methods.spec import Adapted

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def registry() -> Registry:
    return discover()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "implementation", "names"),
    [
        ("lora", "reference", ("losses", "weights")),
        ("lora", "fused", ("losses", "weights")),
        ("dora", "reference", ("losses", "weights")),
        ("dora", "fused", tuple(checks.CHECKS)),
        ("adalora", "reference", ("gradients", "method_steps")),
    ],
)
def test_sfttrainer_trains_as_the_harness_does(
    method: str, implementation: str, names: tuple[str, ...], registry: Registry
) -> None:
    trainee = Trainee(method, implementation, "float32", registry)
    evidence = checks.ComparedTrainings(trainee, loops.find("trl").train, checks.ReferenceTrainings(trainee))
    found = {name: checks.outcome_of("trl", name, evidence) for name in names}
    assert {name: one.status for name, one in found.items()} == dict.fromkeys(names, CheckStatus.PASS), found


def trained(adapted: Adapted, optimizer: torch.optim.Optimizer, accumulate: int = 1) -> loop.StepSamples:
    schedule = optimizers.schedule(optimizer, RECIPE)
    return trl_loop.train(adapted, [], batches(RECIPE)[:2], optimizer, schedule, 0, lambda *_: None, accumulate)


def test_the_model_is_left_as_it_was_and_every_step_is_measured(registry: Registry) -> None:
    adapted = attached(Trainee("lora", "reference", "float32", registry))
    model = adapted.model
    before = {**vars(model)}, model.config.to_dict(), model.generation_config.to_dict()
    optimizer, _ = optimizers.make(adapted, [], RECIPE)
    samples = trained(adapted, optimizer, accumulate=2)
    assert vars(model).keys() == before[0].keys()
    assert model.forward.__func__ is type(model).forward
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before[1:]
    assert [len(values) for values in (samples.losses, samples.step_seconds, samples.gradient_norms)] == [2, 2, 2]
    assert samples.tokens == [batch.real_tokens for batch in batches(RECIPE)[:2]]
    assert samples.outside_seconds is not None
    assert all(p.grad is not None for p in adapted.parameters())  # the memory ledger reads them


def test_a_counted_step_changes_neither_weights_nor_float32_masters(registry: Registry) -> None:
    """accelerate would load the masters as bfloat16."""
    adapted = attached(Trainee("lora", "reference", "bfloat16", registry))
    optimizer, _ = optimizers.make(adapted, [], RECIPE)
    trained(adapted, optimizer)
    before = {name: t.clone() for name, t in adapted.tensors().items()}
    peak = step_peak(adapted, [], batches(RECIPE)[:2], optimizer, 2, trl_loop.step)
    assert peak is not None
    assert exact(adapted.tensors(), before).passed
    states = list(optimizer.state.values())
    assert states
    assert {state["master"].dtype for state in states} == {torch.float32}


def test_an_adapter_of_the_output_layer_is_refused(registry: Registry) -> None:
    """SFTTrainer multiplies by the layer's weight itself: the adapter would be ignored."""
    adapted = attached(Trainee("lora", "reference", "float32", registry))
    layer = next(iter(adapted.layers.values()))
    adapted.model.set_output_embeddings(layer)
    with pytest.raises(Unsupported, match="output layer"):
        trl_loop.refuse(adapted, batches(RECIPE))


def test_variables_of_a_launcher_do_not_change_training(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses() -> list[float]:
        adapted = attached(Trainee("lora", "reference", "float32", registry))
        return trained(adapted, optimizers.make(adapted, [], RECIPE)[0]).losses

    alone = losses()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert losses() == alone
    assert (os.environ["ACCELERATE_MIXED_PRECISION"], os.environ["WORLD_SIZE"]) == ("bf16", "2")


def test_several_gpus_are_refused(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFTTrainer would use DataParallel."""
    monkeypatch.setattr(trl_loop.SFTConfig, "n_gpu", property(lambda _: 2))
    adapted = attached(Trainee("lora", "reference", "float32", registry))
    with pytest.raises(Unsupported, match="2 visible GPUs"):
        trained(adapted, optimizers.make(adapted, [], RECIPE)[0])


@pytest.mark.parametrize("where", ["a module", "an attribute"])
def test_dropout_of_the_model_is_refused(where: str, registry: Registry) -> None:
    adapted = attached(Trainee("lora", "reference", "float32", registry))
    attention = adapted.model.model.layers[1].self_attn
    if where == "a module":
        attention.drop = nn.Dropout(0.1)
    else:
        attention.attention_dropout = 0.1
    with pytest.raises(Unsupported, match=r"model\.layers\.1\.self_attn.*is above 0"):
        trl_loop.refuse(adapted, batches(RECIPE))


def test_the_table_names_every_default_that_the_loop_switches_off() -> None:
    defaults = loops.find("trl").defaults
    off = {name for name, value in trl_loop.ALIGNED.items() if defaults[name] != value}
    tried = {name for one in loop_settings.load("trl") for name, value in one.config.items() if defaults[name] == value}
    assert off
    assert off <= tried
