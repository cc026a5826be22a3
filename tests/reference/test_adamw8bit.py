"""8-bit AdamW against Adam by hand, against AdamW in full precision, and against bitsandbytes' CPU kernels."""

from __future__ import annotations

import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import exact, noise_floor
from harness.conformance.subject import DTYPES
from reference.operations import adamw8bit
from reference.operations.adamw8bit import AdamW8bit, adamw8bit_step, init_state, moments
from reference.operations.dynamic_map import dynamic_map, quantize_blockwise
from support.two_layer_model import draw

N = 4096 + 300  # the last block is short
KNOBS: dict[str, Any] = {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.3}


# A moment is two products and a sum, then a division: 8 halves of an eps are more than all their roundings.
ROUNDINGS = 4 * torch.finfo(torch.float32).eps


def warm(p: Tensor) -> dict[str, Tensor]:
    """A state that a run could be in: codes of random moments."""
    state = init_state(p)
    for name, value, signed in (("m", draw(N, seed=7), True), ("v", draw(N, seed=8).square(), False)):
        state[name], state[f"{name}_absmax"] = quantize_blockwise(value, dynamic_map(signed))
    return state


def by_formula(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW, one number at a time."""
    (b1, b2), lr, eps, decay = KNOBS["betas"], KNOBS["lr"], KNOBS["eps"], KNOBS["weight_decay"]
    rows = []
    for w, d, a, b in zip(p.tolist(), g.tolist(), m.tolist(), v.tolist(), strict=True):
        first, second = b1 * a + (1 - b1) * d, b2 * b + (1 - b2) * d * d
        update = (first / (1 - b1**t)) / (math.sqrt(second / (1 - b2**t)) + eps)
        rows.append((w - lr * decay * w - lr * update, first, second))
    return tuple(torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))  # type: ignore[return-value]


def torchs(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int) -> Tensor:
    """The step of torch's AdamW in float32."""
    wide = nn.Parameter(p.float())
    wide.grad = g.float()
    optimizer = torch.optim.AdamW([wide], **KNOBS)
    optimizer.state[wide] = {"step": torch.tensor(t - 1.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.step()
    return wide.detach()


def assert_same(have: Tensor, want: Tensor) -> None:
    judged = noise_floor({"it": have}, {"it": want}, {"it": want}, "float64")
    assert judged.passed, judged


# One step


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [1, 2, 50])
def test_one_step_is_adamw_on_the_decoded_state(dtype: str, step: int) -> None:
    p, g = (draw(N, seed=s, dtype=DTYPES[dtype]) for s in (2, 3))
    state = warm(p)
    want, m, v = by_formula(p, g, *moments(state, torch.float64), step)
    rounded = torchs(p, g, *moments(state), step).to(DTYPES[dtype])
    adamw8bit_step(p, g, state, step=step, **KNOBS)
    assert p.dtype == DTYPES[dtype]
    judged = noise_floor({"p": p}, {"p": want}, {"p": want if dtype == "float64" else rounded}, dtype)
    assert judged.passed, judged
    for name, value, signed in (("m", m, True), ("v", v, False)):
        # A value that float32 puts on the other side of a midpoint may take the neighbour's code.
        codes, absmax = quantize_blockwise(value, dynamic_map(signed))
        assert bool(((state[f"{name}_absmax"] - absmax).abs() <= ROUNDINGS * absmax).all())
        assert not bool(near_misses(state[name], codes, value, absmax, dynamic_map(signed)).any())


def near_misses(have: Tensor, want: Tensor, value: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    """Mask codes that differ although the value lies further from the midpoint than float32 rounds a few operations."""
    scaled = value / absmax.double().repeat_interleave(256)[: len(value)]
    between = (code.double()[have.long()] + code.double()[want.long()]) / 2
    far = (scaled - between).abs() > ROUNDINGS * scaled.abs()
    return (have != want) & (far | ((have.int() - want.int()).abs() > 1))


def test_the_state_is_stored_as_the_nearest_code_of_the_new_moments() -> None:
    # Exact numbers: betas of 1/2, moments that are the map's own values.
    p, g = torch.zeros(4096), torch.zeros(4096)
    g[0], g[1], g[256] = 1.0, -0.5, 4.0
    state = init_state(p)
    adamw8bit_step(p, g, state, step=1, lr=0.0, betas=(0.5, 0.5))
    assert state["m_absmax"].tolist() == [0.5, 2.0] + [0.0] * 14
    assert state["v_absmax"].tolist() == [0.5, 8.0] + [0.0] * 14
    m, v = moments(state)
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    half = signed[(signed + 0.5).abs().argmin()]
    quarter = unsigned[(unsigned - 0.25).abs().argmin()]
    assert [float(x) for x in m[[0, 1, 2, 256]]] == [0.5, float(half) / 2, 0.0, 2.0]
    assert [float(x) for x in v[[0, 1, 2, 256]]] == [0.5, float(quarter) / 2, 0.0, 8.0]


def test_the_parameter_moves_by_the_moments_before_they_are_rounded() -> None:
    # From zero states one step is AdamW's in full precision, whatever the codes then lose.
    p, g = draw(N), draw(N, seed=2)
    full = nn.Parameter(p.clone())
    full.grad = g
    torch.optim.AdamW([full], **KNOBS).step()
    adamw8bit_step(p, g, init_state(p), step=1, **KNOBS)
    assert_same(p, full.detach())


def test_a_zero_block_stays_zero() -> None:
    p, state = draw(4096, dtype=torch.float32), init_state(draw(4096))
    g = torch.zeros(4096)
    g[300:400] = draw(100, dtype=torch.float32)
    for step in range(1, 6):
        adamw8bit_step(p, g, state, step=step, lr=0.1)
    start = draw(4096, dtype=torch.float32)
    assert torch.equal(p[:300], start[:300])  # also 256 .. 300, which share a block with gradients that are not zero
    assert torch.equal(p[400:], start[400:])
    assert not torch.equal(p[300:400], start[300:400])


def test_a_two_dimensional_parameter_is_read_row_by_row() -> None:
    flat, square = draw(4096), draw(4096).view(64, 64)
    states = [init_state(flat), init_state(square)]
    adamw8bit_step(flat, draw(4096, seed=2), states[0], step=1, **KNOBS)
    adamw8bit_step(square, draw(4096, seed=2).view(64, 64), states[1], step=1, **KNOBS)
    assert torch.equal(square.flatten(), flat)
    assert exact(states[1], states[0]).passed


def test_a_transposed_parameter_and_gradient() -> None:
    plain, turned = draw(64, 65), draw(64, 65).T.contiguous().T
    states = [init_state(plain), init_state(turned)]
    adamw8bit_step(plain, draw(64, 65, seed=2), states[0], step=1, **KNOBS)
    adamw8bit_step(turned, draw(64, 65, seed=2).T.contiguous().T, states[1], step=1, **KNOBS)
    assert torch.equal(turned, plain)
    assert exact(states[1], states[0]).passed


# The optimizer


@pytest.mark.parametrize(("numel", "dtype"), [(4095, torch.float32), (4096, torch.uint8)])
def test_small_tensors_have_32_bit_states(numel: int, dtype: torch.dtype) -> None:
    state = init_state(torch.zeros(numel))
    assert state["m"].dtype == state["v"].dtype == dtype
    assert adamw8bit.state_bytes(numel) == sum(t.nbytes for t in state.values())


def test_the_optimizer_passes_its_minimum_size() -> None:
    p = nn.Parameter(draw(100, dtype=torch.float32))
    p.grad = draw(100, dtype=torch.float32)
    optimizer = AdamW8bit([p], min_8bit_size=100)
    optimizer.step()
    assert optimizer.state[p]["m"].dtype == torch.uint8


def test_a_small_tensor_is_plain_adamw() -> None:
    ours, theirs = (nn.Parameter(draw(9, 5)) for _ in range(2))
    pair = [AdamW8bit([ours], **KNOBS), torch.optim.AdamW([theirs], **KNOBS)]
    for step in range(10):
        for p, optimizer in zip((ours, theirs), pair, strict=True):
            p.grad = draw(9, 5, seed=step)
            optimizer.step()
    assert_same(ours.detach(), theirs.detach())


def test_a_saved_optimizer_continues_exactly() -> None:
    # In bfloat16, whose copy of a float32 absmax would not be the same.
    params = [nn.Parameter(draw(*shape, dtype=torch.bfloat16)) for shape in ((64, 70), (5,))]
    optimizer = AdamW8bit([{"params": params[:1]}, {"params": params[1:], "lr": 0.2}], **KNOBS)

    def run(params: list[nn.Parameter], optimizer: AdamW8bit, steps: range) -> None:
        for step in steps:
            for p in params:
                p.grad = draw(*p.shape, seed=step, dtype=torch.bfloat16)
            optimizer.step()

    run(params, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = copy.deepcopy(params)
    resumed = AdamW8bit([{"params": others[:1]}, {"params": others[1:]}])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(params, optimizer, range(3, 6))
    run(others, resumed, range(3, 6))
    assert all(map(torch.equal, others, params))
    for p, other in zip(params, others, strict=True):
        assert exact(only_tensors(resumed.state[other]), only_tensors(optimizer.state[p])).passed
        assert resumed.state[other]["m"].dtype == optimizer.state[p]["m"].dtype


def only_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {n: t for n, t in state.items() if isinstance(t, Tensor)}


def test_a_closure_may_run_backward_and_parameters_without_gradients_do_not_step() -> None:
    p, idle = nn.Parameter(draw(5000)), nn.Parameter(draw(7))
    optimizer = AdamW8bit([p, idle], lr=0.1)

    def closure() -> Tensor:
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) is not None
    assert not torch.equal(p, draw(5000))
    assert torch.equal(idle, draw(7))


# bitsandbytes


@pytest.fixture
def functional() -> Any:
    return pytest.importorskip("bitsandbytes.functional")


def on_the_grid(value: Tensor, signed: bool) -> Tensor:
    """The codes of bitsandbytes' CPU kernel: value / absmax goes to one of 65,536 numbers first, then to the nearest."""
    flat = value.flatten().float()
    absmax = torch.nn.functional.pad(flat, (0, -len(flat) % 256)).view(-1, 256).abs().amax(dim=1)
    scaled = flat * (1 / absmax).repeat_interleave(256)[: len(flat)]
    bin_ = ((scaled.clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5).int()
    code = dynamic_map(signed)
    return torch.bucketize(-1 + 2 * bin_.float() / 65535, (code[:-1] + code[1:]) / 2).to(torch.uint8)


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_bitsandbytes(functional: Any, signed: bool) -> None:
    assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("step", [1, 2, 50])
def test_one_step_of_bitsandbytes_from_the_same_state(functional: Any, dtype: str, step: int) -> None:
    p, g = (draw(N, seed=s, dtype=DTYPES[dtype]) for s in (2, 3))
    state = warm(p)
    truth, m, v = by_formula(p, g, *moments(state, torch.float64), step)
    theirs, other = p.clone(), {n: t.clone() for n, t in state.items()}
    functional.optimizer_update_8bit_blockwise(
        "adam", g, theirs, other["m"], other["v"], *KNOBS["betas"], 0.0, 0.0, KNOBS["eps"], step, KNOBS["lr"],
        dynamic_map(True), dynamic_map(False), other["m_absmax"], other["v_absmax"], KNOBS["weight_decay"],
    )  # fmt: skip
    adamw8bit_step(p, g, state, step=step, **KNOBS)
    judged = noise_floor({"p": theirs}, {"p": truth}, {"p": p}, dtype)
    assert judged.passed, judged
    for name, value, signed in (("m", m, True), ("v", v, False)):
        absmax = state[f"{name}_absmax"]
        assert bool(((other[f"{name}_absmax"] - absmax).abs() <= ROUNDINGS * absmax).all())
        # Theirs are the codes of the grid; the grid of values that float32 rounded otherwise may lie one bin off.
        scaled = value / absmax.repeat_interleave(256)[:N].double()
        low, high = (on_the_grid_near(scaled, signed, by) for by in (-1, 1))
        assert bool(((low <= other[name]) & (other[name] <= high)).all())
        apart = int((other[name] != state[name]).sum())
        assert 0 < apart < N / 10  # they do part, here and there; by how much, the next test says


def on_the_grid_near(scaled: Tensor, signed: bool, by: int) -> Tensor:
    """The code of the grid's value for `scaled` moved by a few float32 units of 1."""
    bin_ = ((scaled + by * ROUNDINGS).clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5
    code = dynamic_map(signed)
    return torch.bucketize(-1 + 2 * bin_.int().float() / 65535, (code[:-1] + code[1:]) / 2).to(torch.uint8)


@pytest.mark.parametrize(("signed", "furthest"), [(True, 4), (False, 7)])
def test_bitsandbytes_codes_differ_only_for_known_reasons(functional: Any, signed: bool, furthest: int) -> None:
    x = draw(1 << 18, dtype=torch.float32)
    x = x if signed else x.square()
    theirs = functional.quantize_blockwise(x, dynamic_map(signed), blocksize=256)[0]
    ours, absmax = quantize_blockwise(x, dynamic_map(signed))
    assert torch.equal(theirs, on_the_grid(x, signed))  # the whole of the reason, to the last code
    apart = theirs != ours
    assert bool(apart.any())
    # They part only where the grid is coarser than the map: within half a bin of a midpoint, or below the first bin.
    steps = (theirs.int() - ours.int()).abs()
    assert int(steps.max()) <= furthest
    scaled = (x / absmax.repeat_interleave(256)).double()
    code = dynamic_map(signed).double()
    half_bin = 1 / 65535 + ROUNDINGS
    assert bool(
        ((code[theirs.long()] - scaled).abs() <= (code[ours.long()] - scaled).abs() + 2 * half_bin)[apart].all()
    )


def test_bitsandbytes_has_32_bit_states_for_small_tensors_too(functional: Any) -> None:
    import bitsandbytes

    for numel in (4095, 4096):
        pair = [nn.Parameter(draw(numel, dtype=torch.float32)) for _ in range(2)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizers = [AdamW8bit([pair[0]], **KNOBS), bitsandbytes.optim.AdamW8bit([pair[1]], **KNOBS)]
        for p, optimizer in zip(pair, optimizers, strict=True):
            p.grad = draw(numel, seed=2, dtype=torch.float32)
            optimizer.step()
        assert optimizers[0].state[pair[0]]["m"].dtype == optimizers[1].state[pair[1]]["state1"].dtype
        truth = by_formula(draw(numel), draw(numel, seed=2), torch.zeros(numel), torch.zeros(numel), 1)[0]
        judged = noise_floor({"p": pair[1].detach()}, {"p": truth}, {"p": pair[0].detach()}, "float32")
        assert judged.passed, judged
