"""Training in float16 and bfloat16: master weights, the loss scale, and what is said of them."""

from __future__ import annotations

import pytest
import torch

from harness.cell import outcomes
from harness.cell.measure.memory import optimizer_tensors
from harness.cell.training import loop, optimizers
from harness.cell.training.batches import Batch, Example, collate, order
from harness.conformance.comparison.tolerance_policies import exact
from support.small_encoder import Encoder, batches, nothing, setting

WORDS = [Example(f"w{i}", (1 + i % 15,), int(i % 15 < 7)) for i in range(45)]  # one word decides
ALIKE = [Example(f"w{i}", (1 + i % 15,), 1) for i in range(45)]


def batches_of(examples: list[Example], steps: int) -> list[Batch]:
    return [collate(group, 0, "right") for group in order(examples, steps, 4, seed=0)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_sixteen_bits_train(method: str, dtype: torch.dtype) -> None:
    s = setting(Encoder().to(dtype), method, steps=200)
    losses = loop.train(batches=batches_of(WORDS, 40), seed=0, report=nothing, **s).losses
    assert sum(losses[-8:]) < sum(losses[:8])
    assert {p.dtype for p in s["adapted"].parameters()} == {dtype}


def test_steps_too_small_for_sixteen_bits_add_up() -> None:
    model = Encoder().bfloat16()
    bias = model.head.bias
    with torch.no_grad():
        bias.fill_(1.0)  # its neighbours in bfloat16 are 1/128 and 1/256 away
    loop.train(batches=batches_of(ALIKE, 1), seed=0, report=nothing, **setting(model, lr=1e-3, steps=1000))
    assert bias.tolist() == [1.0, 1.0]
    loop.train(batches=batches_of(ALIKE, 20), seed=0, report=nothing, **setting(model, lr=1e-3, steps=1000))
    wrong, right = bias.tolist()
    assert wrong < 1.0 < right


def test_masters_step_as_float32_adamw_does() -> None:
    model = Encoder().half()
    s = setting(model, weight_decay=0.1)
    optimizer = s["optimizer"]
    plain = {n: p.detach().float().requires_grad_(True) for n, p in model.named_parameters()}
    oracle = torch.optim.AdamW(plain.values(), lr=1e-2, weight_decay=0.1)
    for batch in batches(3):
        optimizer.zero_grad()
        (loop.loss_of(model, batch) * optimizer.loss_scale).backward()
        for name, p in model.named_parameters():
            plain[name].grad = p.grad.float() / optimizer.loss_scale
        optimizer.step()
        oracle.step()
    want = {n: p.detach().half() for n, p in plain.items()}
    assert exact({n: p.detach() for n, p in model.named_parameters()}, want).passed
    held = optimizer_tensors(optimizer)
    assert sum(t.numel() for t in held if t.dim()) == 3 * sum(p.numel() for p in model.parameters())
    assert {t.dtype for t in held} == {torch.float32}


def test_what_a_method_writes_between_steps_stays() -> None:
    model = Encoder().bfloat16()
    s = setting(model)
    with torch.no_grad():
        model.embed.weight.zero_()
    loop.train(batches=batches(1), seed=0, report=nothing, **s)
    moved = model.embed.weight.detach().float().abs()
    assert 0 < float(moved.max()) <= float(torch.tensor(1e-2).bfloat16())  # one step of AdamW from zero


def test_overflow_takes_the_same_batch_again_with_half_the_scale() -> None:
    runs = []
    for scale in (2.0**10, 2.0**30):
        s = setting(Encoder().half())
        s["optimizer"].loss_scale = scale
        runs.append(loop.train(batches=batches(4), seed=0, report=nothing, **s))
        assert s["optimizer"].loss_scale < 2.0**30
    assert len(runs[1].losses) == 4
    assert runs[0].losses[0] == runs[1].losses[0]
    assert max(runs[1].gradient_norms) < 10  # the scale is taken out again


def test_float16_names_its_range_when_it_diverges() -> None:
    with pytest.raises(outcomes.Diverged, match="beyond float16's 65504"):
        loop.train(batches=batches(3), seed=0, report=nothing, **setting(Encoder(float("nan")).half()))


def test_float32_keeps_torchs_own_adamw() -> None:
    for kind in (torch.float32, torch.float64):
        assert type(setting(Encoder().to(kind))["optimizer"]) is torch.optim.AdamW
    assert loop.notes(setting(Encoder())["optimizer"]) == []


def test_a_step_that_is_lost_to_rounding_is_held() -> None:
    model = Encoder().bfloat16()
    bias = model.head.bias
    with torch.no_grad():
        bias.fill_(1.0)
    s = setting(model, lr=1e-3, steps=1000)
    loop.train(batches=batches_of(ALIKE, 1), seed=0, report=nothing, **s)
    assert bias.tolist() == [1.0, 1.0]
    wrong, right = optimizers.stored_value(bias, s["optimizer"]).tolist()
    assert wrong < 1.0 < right
    plain = setting(Encoder())
    parameter = plain["adapted"].parameters()[0]
    assert optimizers.stored_value(parameter, plain["optimizer"]).data_ptr() == parameter.data_ptr()


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.bfloat16, ["GaLore, the Method's own, updates 16-bit weights directly"]),
        (
            torch.float16,
            ["GaLore stored float32 master weights and moments for the trained 16-bit tensors, and the loss was"],
        ),
        (torch.float32, []),
    ],
)
def test_it_is_said_how_an_optimizer_of_the_methods_own_steps(dtype: torch.dtype, said: list[str]) -> None:
    notes = loop.notes(setting(Encoder().to(dtype), "galore")["optimizer"])
    assert [note[: len(start)] for note, start in zip(notes, said, strict=True)] == said


@pytest.mark.parametrize("name", ["reference", "galore-torch"])
def test_galore_in_float16_steps_as_in_float32(name: str) -> None:
    """Its second moments would vanish in float16, and its steps then be as large as their eps is small."""
    models = Encoder().half(), Encoder().half().float()
    half, wide = (setting(model, "galore", name, lr=1e-3) for model in models)
    named = [dict(model.named_parameters()) for model in models]
    for batch in batches(3):
        half["optimizer"].zero_grad()
        (loop.loss_of(models[0], batch) * half["optimizer"].loss_scale).backward()
        for key, p in named[0].items():
            named[1][key].grad = p.grad.float() / half["optimizer"].loss_scale
        half["optimizer"].step()
        wide["optimizer"].step()
    want = {key: p.detach() for key, p in named[1].items()}
    assert exact({key: optimizers.stored_value(p, half["optimizer"]) for key, p in named[0].items()}, want).passed
    assert optimizers.facts(half["optimizer"])["name"] == type(wide["optimizer"]).__name__
