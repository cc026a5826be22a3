"""Layer-wise weight updates: the same bits as the whole step, with one gradient at a time; and GaLore with 8-bit moments."""

from __future__ import annotations

import gc
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from harness.assets.table import Source
from harness.cell import lifecycle, training_phase
from harness.cell.cell_run import CellRun
from harness.cell.job import Asset, Job, JobTask
from harness.cell.measure.memory import PeakMeter, optimizer_tensors, tensor_bytes
from harness.cell.measure.phases import PhaseClock
from harness.cell.training import loop, optimizers
from harness.cell.training import model as models
from harness.cell.training.batches import Batch
from harness.cell.training_phase import WARMUP_PASSES
from harness.conformance.subject import DTYPES, configure
from harness.conformance.tolerance_constants import FOOTPRINT_LEDGER
from harness.errors import UsageError
from harness.memory_model import counting
from harness.memory_model.cell_prediction import predict
from harness.methods.registry import discover
from harness.records.record import AssetUse, Cell, Evaluation, Memory, Outcome, Training
from harness.suites.schema import SYNTHETIC

# Of projected matrices of 128 x 256 the moments have more than 4096 elements, of those of 64 x 128 fewer.
LLAMA = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
LOW = {"rank": 24, "update_gap": 2, "targets": ["k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]}
CPU = torch.device("cpu")


@pytest.mark.parametrize("wanted", [True, False])
def test_warming_up_holds_no_gradient_where_training_has_room_for_one(wanted: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    left: list[int] = []
    model[0].weight.register_hook(lambda _: left.append(sum(p.grad is not None for p in model[1].parameters())))
    with loop.drop_gradients(model.parameters(), wanted):
        model(torch.ones(3, 4)).sum().backward()
    assert (left, [p.grad is None for p in model.parameters()]) == ([0 if wanted else 2], [wanted] * 4)
    model(torch.ones(3, 4)).sum().backward()  # a training's gradients are its own
    assert all(p.grad is not None for p in model.parameters())


def trained(
    method: str, dtype: str, name: Any, implementation: str = "reference", checkpointing: bool = False, **recipe: Any
) -> tuple[dict[str, Tensor], loop.StepSamples, Any, torch.optim.Optimizer]:
    """Train a small Llama for five steps; return its weights, the samples, what steps layer by layer, the optimizer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**LLAMA), dtype=DTYPES[dtype])
    config = configure(method, LOW if method == "galore" else {})
    adapted = discover().find("method", method, implementation)(model, config, torch.Generator().manual_seed(0))
    how = Training(steps=5, lr=1e-3, weight_decay=0.1, **recipe)
    optimizer, schedule = optimizers.make(adapted, [], how, name, implementation)
    stepping = optimizers.layerwise(optimizer, how)
    ids = torch.arange(32).view(2, 16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = Batch(inputs, torch.zeros(2), (15, 15), ids.numel(), ids.numel())
    with models.checkpointing(model, checkpointing):
        samples = loop.train(
            adapted, [], [batch] * 5, optimizer, schedule, 0, lambda step, loss: None, layerwise=stepping
        )
    return {n: p.detach() for n, p in model.named_parameters()}, samples, stepping, optimizer


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("method", "name", "dtype", "implementation"),
    [
        ("galore", "adamw", "float32", "reference"),
        ("galore", "adamw-8bit", "bfloat16", "reference"),
        ("galore", "adamw-8bit", "bfloat16", "fused"),
        ("galore", "adamw-8bit", "float32", "galore-torch"),
        ("full", "adamw", "float32", "reference"),
        ("full", "adamw", "bfloat16", "reference"),  # with float32 masters
        ("full", "paged-adamw-8bit", "bfloat16", "reference"),
    ],
)
def test_layerwise_updates_are_the_whole_steps_to_the_bit(
    method: str, name: str, dtype: str, implementation: str
) -> None:
    whole, in_one, _, _ = trained(method, dtype, name, implementation)
    each, one_by_one, stepping, _ = trained(method, dtype, name, implementation, layerwise=True)
    for tensor, weight in whole.items():
        assert torch.equal(each[tensor], weight), tensor
    assert one_by_one.losses == in_one.losses
    assert min(one_by_one.gradient_norms) > 0
    if implementation != "galore-torch":  # which puts the projected gradient into the place of the gradient
        assert one_by_one.gradient_norms == in_one.gradient_norms
    masters = method == "full" and dtype == "bfloat16"
    assert stepping.most_B == 512 * 128 * (DTYPES[dtype].itemsize + 4 * masters)  # of the embedding


@pytest.mark.slow
def test_with_checkpointing_too() -> None:
    whole, _, _, _ = trained("galore", "float32", "adamw-8bit", checkpointing=True)
    each, _, _, _ = trained("galore", "float32", "adamw-8bit", checkpointing=True, layerwise=True)
    assert all(torch.equal(each[tensor], weight) for tensor, weight in whole.items())


def test_no_two_gradients_are_there_at_a_time_until_it_is_ended() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6, bias=False))
    optimizer = torch.optim.AdamW(model.parameters())
    stepping = optimizers.layerwise(optimizer, Training(steps=1, layerwise=True))
    assert stepping is not None
    there: list[int] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: there.append(sum(q.grad is not None for q in model.parameters()))
        )
    model(torch.ones(2, 6)).sum().backward()
    assert there == [0, 0, 0]
    stepping.remove()
    model(torch.ones(2, 6)).sum().backward()
    assert there[3:] == [1, 2, 3]


def test_what_needs_all_gradients_or_several_passes_is_refused() -> None:
    with pytest.raises(UsageError, match="`accumulate` is 2"):
        trained("galore", "float32", "adamw", layerwise=True, accumulate=2)
    with pytest.raises(UsageError, match="loss scale of float16"):
        trained("galore", "float16", "adamw", layerwise=True)


# Moments in 8 bits


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "fused"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_moments_are_codes_and_small_ones_float32(dtype: str, implementation: str) -> None:
    weights, samples, _, optimizer = trained("galore", dtype, "adamw-8bit", implementation)
    assert samples.losses[-1] < samples.losses[0]
    of = {name: optimizer.state[p] for name, p in zip(weights, optimizer_order(weights, optimizer), strict=True)}
    large = {"layers.0.mlp.up_proj": 24 * 256, "embed_tokens": 512 * 128, "layers.0.self_attn.q_proj": 128**2}
    for name, numel in large.items():
        state = of[f"model.{name}.weight"]
        assert (state["M"].dtype, state["V"].dtype) == (torch.uint8, torch.uint8)
        assert state["M"].numel() == numel
        assert state["M_absmax"].shape == state["V_absmax"].shape == (numel // 256,)
    for name in ("layers.0.self_attn.v_proj", "norm"):
        state = of[f"model.{name}.weight"]
        assert (state["M"].dtype, state["V"].dtype) == (torch.float32, torch.float32)
    assert "8 bits; those of fewer than 4096" in " ".join(loop.notes(optimizer))


def optimizer_order(weights: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the optimizer's own parameters in the order of `weights`, which share their memory."""
    own = {p.data_ptr(): p for group in optimizer.param_groups for p in group["params"]}
    return [own[weight.data_ptr()] for weight in weights.values()]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_narrowing_is_all_that_8_bits_change(implementation: str) -> None:
    """In the first step the moments are not narrowed yet, so it is that of 32 bits; later ones differ, and little."""
    wide, narrow = (trained("galore", "float32", name, implementation) for name in ("adamw", "adamw-8bit"))
    assert narrow[1].losses[:2] == wide[1].losses[:2]
    assert narrow[1].losses[2:] != wide[1].losses[2:]
    fell = [samples.losses[0] - samples.losses[-1] for _, samples, _, _ in (wide, narrow)]
    assert fell[1] > fell[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_a_saved_state_keeps_its_codes(implementation: str) -> None:
    _, _, _, optimizer = trained("galore", "bfloat16", "adamw-8bit", implementation)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    before = [t.clone() for t in optimizer_tensors(optimizer)]
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    after = optimizer_tensors(optimizer)
    assert [t.dtype for t in after] == [t.dtype for t in before]
    assert all(map(torch.equal, after, before))


@pytest.mark.slow
def test_the_authors_optimizer_has_8_bit_moments_in_a_cell() -> None:
    _, samples, _, optimizer = trained("galore", "float32", "adamw-8bit", "galore-torch")
    assert samples.losses[-1] < samples.losses[0]
    assert (
        optimizers.facts(optimizer)["class"] == "harness.methods.implementations.galore_torch.AnywhereGaLoreAdamW8bit"
    )
    narrow = [t for t in optimizer_tensors(optimizer) if t.dtype == torch.uint8]
    # Of each block three matrices in the subspace, and q and o; and the embedding.
    assert sum(t.numel() for t in narrow) == 2 * (4 * (3 * 24 * 256 + 2 * 128**2) + 512 * 128)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_its_bytes_are_those_predicted(name: str, dtype: str) -> None:
    optimizer = trained("galore", dtype, name)[3]
    counted = counting.count({"model_type": "llama", **LLAMA}, "causal", dtype, {"galore": [LOW]}, [])
    device, host = counted["methods"]["galore"][0]["optimizer"][name]
    assert abs(device / tensor_bytes(optimizer_tensors(optimizer)) - 1) <= FOOTPRINT_LEDGER
    assert host == 0


# Whole Cells


def lived(folder: Path, optimizer: Any, layerwise: bool) -> Memory:
    """Live a GaLore Cell of a small Llama's shape in this process; return its ledger."""
    shape = {"model_type": "llama", **LLAMA, "num_hidden_layers": 6}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    recipe = Training(steps=2, batch=1, max_tokens=16, layerwise=layerwise, checkpointing=True)
    cell = Cell(
        model="small", task=SYNTHETIC, method="galore", implementation="fused", dtype="bfloat16", optimizer=optimizer,
        config=LOW | {"rank": 32, "update_gap": 100},
        training=recipe, evaluation=Evaluation(items=0, latency=False),
    )  # fmt: skip
    use = AssetUse(name="small", source="shape:small")
    task = JobTask(name=SYNTHETIC, spec={}, labels=2, test=0, shuffle_seed=0, use=use)
    source = Source(name="small", kind="causal", source="shape:./config.json")
    work = Job(
        run="r", folder="f", attempt=1, cell=cell, data=None, task=task, device="cpu", launched=0.0,
        model=Asset(path=str(folder), source=source, use=use),
    )  # fmt: skip
    meter = PeakMeter(CPU)
    life = CellRun(work, discover(), PhaseClock(meter, lambda _: None), meter, lambda *_, **__: None, baseline_B=0)
    memory = lifecycle.measure(life, predict).memory
    assert not [check.check for check in life.checks if check.outcome is Outcome.FAIL]
    return memory


@pytest.mark.nightly
def test_a_cell_takes_less_by_what_was_predicted(tmp_path: Path) -> None:
    gc.freeze()  # each phase of a Cell collects garbage, and need not look at what torch and transformers have made
    plain, small = (lived(tmp_path / name, name, wise) for name, wise in (("adamw", False), ("adamw-8bit", True)))
    gc.unfreeze()
    for memory in (plain, small):
        expected = memory.predicted
        assert expected is not None, memory.not_predicted
        assert expected.gradients_B == memory.gradients_B
        assert abs(expected.optimizer_B - memory.optimizer_B) <= FOOTPRINT_LEDGER * memory.optimizer_B
    assert small.gradients_B == 512 * 128 * 2  # of the embedding
    assert plain.counted_peak_B is not None
    assert small.counted_peak_B is not None
    saved = plain.optimizer_B - small.optimizer_B + plain.gradients_B - small.gradients_B
    gone = plain.counted_peak_B - small.counted_peak_B
    # Not all of it: of so small a model the temporaries of one matrix's step weigh much, and now lie on its backward pass.
    assert saved / 2 < gone < saved


@pytest.mark.nightly
@pytest.mark.parametrize("layerwise", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_cell_that_has_room_for_one_gradient_warms_up_with_one(
    layerwise: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    passes: list[nn.Module] = []
    real = loop.loss_of

    def watched(model: nn.Module, batch: Batch) -> Tensor:
        def count(_: Tensor) -> None:
            if len(passes) <= WARMUP_PASSES:
                held.append(sum(p.grad is not None for p in model.parameters()))

        if not passes:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(count)
        passes.append(model)
        return real(model, batch)

    monkeypatch.setattr(loop, "loss_of", watched)
    monkeypatch.setattr(training_phase, "warms_up", lambda _: True)
    lived(tmp_path / "cell", "adamw-8bit" if layerwise else "adamw", layerwise)
    assert len(passes) > WARMUP_PASSES
    assert (max(held) <= 1) is layerwise
