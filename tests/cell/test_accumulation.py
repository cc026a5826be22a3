"""A batch in parts, and blocks computed twice: the losses and gradients of the whole batch, for less memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from harness.assets import generated
from harness.cell.training import loop, optimizers
from harness.cell.training import model as models
from harness.cell.training.batches import Batch, Example, collate
from harness.conformance.comparison.tolerance_policies import exact, noise_floor
from harness.conformance.subject import DTYPES, configure
from harness.errors import UsageError
from harness.methods.registry import discover
from harness.records.record import Training
from support.small_encoder import EXAMPLES, Encoder, batches, nothing, setting

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
# Longer and longer texts, whose answers differ in length within every pair: a mean of means would weigh them wrongly.
UNEVEN = [Example(f"t{i}", tuple(range(5, 9 + 2 * i)), 0, answer) for i, answer in enumerate((1, 3, 1, 4, 2, 1, 5, 1))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generated.tiny_llama(path := tmp_path_factory.mktemp("tiny-llama"))
    return path


def one_step(
    folder: Path, batch: Batch, dtype: str, accumulate: int, who: str = "reference", checkpointing: bool = False
) -> tuple[dict[str, Tensor], Any]:
    """Take one step of LoRA on the tiny model; return its loss and its gradients, and the samples."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    config = configure("lora", {"rank": 4, "targets": TARGETS})
    adapted = discover().find("method", "lora", who)(model, config, torch.Generator().manual_seed(0))
    warm = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in adapted.tensors().items():  # B is zero at the start, and A then has no gradient
            if name.endswith(".B"):
                tensor.copy_(torch.randn(tensor.shape, generator=warm, dtype=torch.float64) * 0.1)
    optimizer, schedule = optimizers.make(adapted, [], Training(steps=1, lr=1e-3))
    with models.checkpointing(model, checkpointing):
        samples = loop.train(adapted, [], [batch], optimizer, schedule, 0, nothing, accumulate)
    found = {"loss": torch.tensor(samples.losses[0], dtype=torch.float64)}
    found |= {name: tensor.grad.clone() for name, tensor in adapted.tensors().items() if tensor.grad is not None}
    return found, samples


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("who", ["reference", "fused"])
def test_parts_have_the_loss_and_the_gradients_of_the_whole(
    folder: Path, who: str, dtype: str, accumulate: int
) -> None:
    batch = collate(UNEVEN, 0, "left")
    truth, whole = one_step(folder, batch, "float64", 1)
    rounded, _ = one_step(folder, batch, dtype, 1)
    parts, samples = one_step(folder, batch, dtype, accumulate, who)
    assert len(parts) == 1 + 2 * 2 * len(TARGETS)
    judged = noise_floor(parts, truth, rounded, dtype)
    assert judged.passed, judged
    assert samples.tokens == whole.tokens
    assert samples.padded_tokens < whole.padded_tokens  # a part of short texts is not padded for long ones elsewhere


def test_parts_hold_every_text_once_without_needless_padding() -> None:
    for side, examples in (("left", UNEVEN), ("right", EXAMPLES[:8])):
        batch = collate(examples, 0, side)
        parts = batch.parts(4)
        assert [len(part.labels) for part in parts] == [2] * 4
        texts = [ids[mask.bool()].tolist() for part in parts for ids, mask in rows(part)]
        assert texts == [list(example.tokens) for example in examples]
        assert [part.real_tokens for part in parts] == [int(p.inputs["attention_mask"].sum()) for p in parts]
        for part, pair in zip(parts, pairs(examples), strict=True):
            whole = collate(pair, 0, side)
            assert exact(part.inputs, whole.inputs).passed
            assert (part.answers, part.padded_tokens) == (whole.answers, whole.padded_tokens)
    assert batch.parts(1) == [batch]


def rows(batch: Batch) -> zip[tuple[Tensor, Tensor]]:
    return zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)


def pairs(examples: Sequence[Example]) -> list[Sequence[Example]]:
    return [examples[i : i + 2] for i in range(0, len(examples), 2)]


def test_an_encoder_learns_the_same_from_parts() -> None:
    runs = {}
    for accumulate in (1, 4):
        for dtype in (torch.float64, torch.float32):
            s = setting(Encoder().to(dtype))
            samples = loop.train(batches=batches(6), seed=0, report=nothing, accumulate=accumulate, **s)
            runs[accumulate, dtype] = {
                "losses": torch.tensor(samples.losses),
                "norms": torch.tensor(samples.gradient_norms),
            }
    truth, rounded = runs[1, torch.float64], runs[1, torch.float32]
    judged = noise_floor(runs[4, torch.float32], truth, rounded, "float32")
    assert judged.passed, judged


def test_a_methods_own_term_counts_once_a_step() -> None:
    gradients = []
    for accumulate in (1, 4):
        s = setting(Encoder().double(), lr=1e-3)
        weight = s["adapted"].model.embed.weight
        s["adapted"].regularizer = lambda weight=weight: 1000 * weight.square().sum()
        loop.train(batches=batches(1), seed=0, report=nothing, accumulate=accumulate, **s)
        gradients.append({"embed": weight.grad.clone()})
    judged = noise_floor(gradients[1], gradients[0], gradients[0], "float64")
    assert judged.passed, judged


def test_float16_parts_that_overflow_are_all_taken_again() -> None:
    """The loss scale is halved until no part overflows, and the gradient is that of the whole batch."""
    norms = []
    for accumulate in (1, 4):
        s = setting(Encoder(256.0).half())
        norms.append(loop.train(batches=batches(1), seed=0, report=nothing, accumulate=accumulate, **s).gradient_norms)
        assert s["optimizer"].loss_scale < 1024
    wide = setting(Encoder(256.0).half().double())
    truth = {"norm": torch.tensor(loop.train(batches=batches(1), seed=0, report=nothing, **wide).gradient_norms)}
    judged = noise_floor({"norm": torch.tensor(norms[1])}, truth, {"norm": torch.tensor(norms[0])}, "float16")
    assert judged.passed, judged


# Checkpointing


@pytest.mark.parametrize("accumulate", [1, 4])
def test_checkpointing_changes_no_number_of_the_reference(folder: Path, accumulate: int) -> None:
    batch = collate(UNEVEN, 0, "left")
    plain, _ = one_step(folder, batch, "float32", accumulate)
    again, _ = one_step(folder, batch, "float32", accumulate, checkpointing=True)
    assert exact(again, plain).passed


def test_checkpointing_keeps_fused_within_the_noise(folder: Path) -> None:
    """Its siblings are then computed one by one, which rounds otherwise."""
    batch = collate(UNEVEN, 0, "left")
    truth, rounded = (one_step(folder, batch, dtype, 1)[0] for dtype in ("float64", "float32"))
    judged = noise_floor(one_step(folder, batch, "float32", 1, "fused", True)[0], truth, rounded, "float32")
    assert judged.passed, judged


def test_checkpointing_computes_each_block_twice_and_ends_with_its_context(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = collate(UNEVEN, 0, "left")

    def passes(wanted: bool) -> int:
        calls.clear()
        with models.checkpointing(model, wanted):
            loop.loss_of(model, batch).backward()
        return len(calls)

    assert [passes(wanted) for wanted in (False, True, False)] == [1, 2, 1]


def test_a_model_without_checkpointing_is_refused_with_a_hint() -> None:
    with (
        pytest.raises(UsageError, match="Encoder does not support gradient checkpointing") as refused,
        models.checkpointing(Encoder(), True),
    ):
        pass
    assert "checkpointing: false" in refused.value.hint
    with models.checkpointing(SimpleNamespace(), False):
        pass
