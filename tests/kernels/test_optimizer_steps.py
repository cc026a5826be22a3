"""Our optimizers' steps and what they stand on, where the conformance engine does not look."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.kernels.torch import galore_step
from harness.kernels.torch.dynamic_quantize import dynamic_map, dynamic_quantize, nearest, tables
from harness.kernels.torch.multi_lora_linear import multi_lora_linear
from harness.kernels.torch.optimizers.adamw8bit import AdamW8bit
from harness.kernels.torch.optimizers.paged import Paged, bytes_of, is_paged
from harness.kernels.torch.support import range_finder
from harness.kernels.torch.support.dropout import keep_mask
from harness.kernels.torch.support.range_finder import leading_svd, leading_vectors, orthonormal
from harness.methods.implementations.fused.methods.galore import GaLore
from reference import pissa
from reference.galore import GaLore as ReferenceGaLore
from reference.galore import Projector, projector
from reference.operations.dynamic_map import dynamic_map as reference_map
from reference.operations.dynamic_map import quantize_blockwise
from reference.operations.multi_lora import multi_lora_linear as multi_lora_reference

ROWS, COLUMNS, RANK = 96, 80, 8
EVERY = torch.arange(1, COLUMNS + 1, dtype=torch.float64)
SPECTRA = {"flat": 1 - EVERY / 1000, "slow": EVERY**-0.5, "fast": 0.5**EVERY}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _basis(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    Q: Tensor = torch.linalg.qr(drawn).Q
    return Q


def _matrix(spectrum: Tensor, generator: torch.Generator) -> Tensor:
    """Draw (ROWS, COLUMNS) with these singular values, in float32."""
    S = spectrum[:, None] * _basis(COLUMNS, len(spectrum), generator).T
    return (_basis(ROWS, len(spectrum), generator) @ S).float()


# Singular vectors


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
def test_leading_svd_is_as_exact_as_lapacks(spectrum: Tensor, wide: bool, generator: torch.Generator) -> None:
    W = _matrix(spectrum, generator)
    W = W.T.contiguous() if wide else W

    def seen(U: Tensor, S: Tensor, V: Tensor) -> dict[str, Tensor]:
        return {"S": S, "U U^T": U @ U.T, "V V^T": V @ V.T, "U S V^T": (U * S) @ V.T, "U^T U": U.T @ U}

    truth, rounded = (seen(U, S, Vt.T) for U, S, Vt in (pissa.exact_svd(W.double(), RANK), pissa.exact_svd(W, RANK)))
    judgement = noise_floor(seen(*leading_svd(W, RANK)), truth, rounded, "float32")
    assert judgement.passed, judgement


@pytest.mark.parametrize("left", [False, True], ids=["shorter side", "longer side"])
def test_a_singular_gradient_still_has_an_orthonormal_basis(left: bool, generator: torch.Generator) -> None:
    W = _matrix(SPECTRA["fast"][:3], generator)
    U, V = leading_vectors(W, RANK, left, not left)
    vectors = U if left else V
    assert vectors is not None
    eye = {"gram": torch.eye(RANK, dtype=torch.float64)}
    lapack = torch.linalg.svd(W, full_matrices=False)
    other = lapack.U[:, :RANK] if left else lapack.Vh[:RANK].T
    judgement = noise_floor({"gram": vectors.T @ vectors}, eye, {"gram": other.T @ other}, "float32")
    assert judgement.passed, judgement


def test_a_basis_of_columns_that_are_nearly_dependent_is_orthonormal(generator: torch.Generator) -> None:
    Y = _matrix(SPECTRA["fast"][:30], generator)[:, :40]
    Q, householder = orthonormal(Y), torch.linalg.qr(Y).Q
    eye = {"gram": torch.eye(40, dtype=torch.float64)}
    judgement = noise_floor({"gram": Q.T @ Q}, eye, {"gram": householder.T @ householder}, "float32")
    assert judgement.passed, judgement


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("niter", [1, 4])
def test_the_range_finder_equals_the_reference_for_the_same_sketch(
    spectrum: Tensor, niter: int, generator: torch.Generator
) -> None:
    W, sketch = _matrix(spectrum, generator), torch.randn(COLUMNS, RANK, generator=generator)

    def reference(W: Tensor) -> dict[str, Tensor]:
        # The same draw for both: `randomised_svd` draws its sketch itself.
        U, S, Vt = pissa.fast_svd(W, RANK, niter, torch.Generator().manual_seed(3))
        return {"S": S, "U S V^T": (U * S) @ Vt}

    sketch = torch.randn(COLUMNS, RANK, generator=torch.Generator().manual_seed(3), dtype=torch.float64).float()
    U, S, V = range_finder.randomised_svd(W, sketch, niter)
    truth, rounded = reference(W.double()), reference(W)
    judgement = noise_floor({"S": S, "U S V^T": (U * S) @ V.T}, truth, rounded, "float32")
    assert judgement.passed, judgement


def test_power_iterations_bring_the_range_finder_nearer(generator: torch.Generator) -> None:
    W, sketch = _matrix(SPECTRA["slow"], generator), torch.randn(COLUMNS, RANK, generator=generator)
    missed = []
    for niter in range(3):
        Q = range_finder.range_finder(W, sketch, niter)
        missed.append(float((W - Q @ (Q.T @ W)).norm()))
    assert missed[0] > missed[1] > missed[2]


# GaLore's refresh


@pytest.mark.parametrize("side", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("tall", [True, False])
def test_the_randomised_refresh_equals_the_references_cold_and_warm(
    tall: bool, spectrum: Tensor, side: str, generator: torch.Generator
) -> None:
    drawn = [_matrix(spectrum, generator) for _ in range(2)]
    before, now = drawn if tall else [G.T for G in drawn]
    for old in (Projector(), projector(before, RANK, side)):
        wide = Projector(*(None if t is None else t.double() for t in (old.P, old.Q)))
        truth = _spans(projector(now.double(), RANK, side, 2, wide))
        rounded = _spans(projector(now, RANK, side, 2, old))
        judgement = noise_floor(
            _spans(Projector(*galore_step.refreshed(now, RANK, side, 2, old.P, old.Q))), truth, rounded, "float32"
        )
        assert judgement.passed, judgement


def test_a_warm_start_captures_more_of_the_gradient(generator: torch.Generator) -> None:
    old = _matrix(SPECTRA["slow"], generator)
    now = old + 0.001 * torch.randn(ROWS, COLUMNS, generator=generator) / COLUMNS
    error = {}
    for name, basis in (("cold", None), ("warm", leading_svd(old, RANK)[2])):
        Q = galore_step.refreshed(now, RANK, "std", 1, None, basis)[1]
        assert Q is not None
        error[name] = float((now - now @ Q @ Q.T).norm())
    assert error["warm"] < error["cold"]


@pytest.mark.parametrize("side", ["std", "reverse_std", "full"])
def test_the_exact_refresh_spans_the_references_subspace(side: str, generator: torch.Generator) -> None:
    G = _matrix(SPECTRA["slow"], generator)
    truth, rounded = (_spans(basis) for basis in (projector(G.double(), RANK, side), projector(G, RANK, side)))
    judgement = noise_floor(_spans(Projector(*galore_step.refreshed(G, RANK, side))), truth, rounded, "float32")
    assert judgement.passed, judgement


def _spans(basis: Projector) -> dict[str, Tensor]:
    """Return the projections on the spaces that the columns span, which hang on no sign and no turn."""
    return {name: t @ t.T for name, t in (("P", basis.P), ("Q", basis.Q)) if t is not None}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("shape", [(96, 80), (80, 96), (5, 3)], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_a_matrix_that_is_not_finite_has_no_singular_vectors(bad: float, shape: tuple[int, int], wide: bool) -> None:
    W = torch.randn(shape, dtype=torch.float64 if wide else torch.float32)
    W[1, 2] = bad
    for find in (lambda: leading_svd(W, 2), *(lambda at=at: leading_vectors(W, 2, at, not at) for at in (True, False))):
        with pytest.raises(ValueError, match="no singular vectors"):
            find()


# GaLore's optimizer


@pytest.fixture(params=[GaLore, ReferenceGaLore], ids=["fused", "reference"])
def either(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize(
    ("knob", "words"),
    [
        ({"rank": -1}, "rank .*at least 0, got -1"),
        ({"rank": 2.5}, "rank .*at least 0, got 2.5"),
        ({"update_gap": 0}, "update_gap .*at least 1, got 0"),
        ({"niter": -1}, "niter .*at least 0, got -1"),
        ({"niter": 1.0}, "niter .*at least 0, got 1.0"),
        ({"lr": -0.1}, "lr .*at least 0, got -0.1"),
        ({"lr": torch.nan}, "lr .*at least 0, got nan"),
        ({"weight_decay": -1}, "weight_decay .*at least 0, got -1"),
        ({"scale": torch.inf}, "scale .*at least 0, got inf"),
        ({"eps": -1e-8}, "eps .*at least 0, got -1e-08"),
        ({"beta2": 1.0}, "beta2 .*at least 0 and below 1, got 1.0"),
        ({"side": "top"}, "side 'top'; .*: std"),
    ],
    ids=str,
)
def test_options_out_of_range_are_rejected(either: Any, knob: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        either([{"params": [nn.Parameter(torch.ones(3, 3))], **knob}], 0.1)
    if "lr" in knob:
        with pytest.raises(ValueError, match=words):
            either([nn.Parameter(torch.ones(3, 3))], **knob)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)], ids=str)
def test_groups_with_a_rank_reject_parameters_that_are_no_matrices(either: Any, shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.ones(shape))
    with pytest.raises(
        ValueError, match=rf"rank 2 has a parameter of shape {re.escape(str(shape))};.* put it in a group"
    ):
        either([{"params": [p], "rank": 2}], 0.1)
    either([p], 0.1)


def test_a_rejected_group_changes_no_other(either: Any) -> None:
    first, second = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimizer = either([first, second], 0.1)
    for wrong in ({"params": [first, second * 2]}, {"params": [first], "rank": -1}, {"params": [first, "second"]}):
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(wrong)
        assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [[id(first), id(second)]]
    groups = optimizer.param_groups
    optimizer.add_param_group({"params": first, "rank": 2})
    assert [[id(p) for p in group["params"]] for group in groups] == [[id(second)], [id(first)]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("shape", [(96, 80), (5, 3)], ids=str)
@pytest.mark.parametrize("niter", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_not_finite_raises_and_changes_nothing(
    either: Any, bad: float, shape: tuple[int, int], niter: int, dtype: torch.dtype
) -> None:
    p = nn.Parameter(torch.ones(shape, dtype=dtype))
    p.grad = torch.ones_like(p)
    p.grad[1, 2] = bad
    words = rf"gradient of a parameter of shape {re.escape(str(shape))} .*skip the step"
    with pytest.raises(ValueError, match=words):
        either([{"params": [p], "rank": 2, "niter": niter}], 0.1).step()
    assert torch.equal(p, torch.ones_like(p))


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 256), nn.Tanh(), nn.Linear(256, 96))


def _galore(model: nn.Sequential, **low: Any) -> GaLore:
    weights = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() == 1]
    return GaLore([{"params": weights, "rank": 16, "update_gap": 2, **low}, {"params": biases}], 0.01, weight_decay=0.1)


def _train(model: nn.Module, step: Callable[[], Any], generator: torch.Generator, steps: int = 5) -> list[float]:
    losses = []
    for _ in range(steps):
        x = torch.randn(32, 96, generator=generator)
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("low", [{}, {"niter": 1}, {"bits": 8}], ids=str)
def test_galore_learns(low: dict[str, Any], generator: torch.Generator) -> None:
    model = _network()
    losses = _train(model, _galore(model, **low).step, generator, steps=25)
    assert max(losses[-5:]) < min(losses[:5])


def _eight_bit_galore(model: nn.Sequential) -> torch.optim.Optimizer:
    return _galore(model, bits=8)


def _adamw8bit(model: nn.Sequential) -> torch.optim.Optimizer:
    return AdamW8bit(model.parameters(), lr=0.01)


@pytest.mark.parametrize("make", [_eight_bit_galore, _adamw8bit])
def test_a_saved_8_bit_state_continues_exactly(
    make: Callable[[nn.Sequential], torch.optim.Optimizer],
) -> None:
    model, other = _network(), _network()
    optimizer = make(model)
    _train(model, optimizer.step, torch.Generator().manual_seed(1), steps=3)
    other.load_state_dict(model.state_dict())
    resumed = make(other)
    resumed.load_state_dict(optimizer.state_dict())
    codes = [t for state in resumed.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert any(t.dtype == torch.uint8 for t in codes)
    for one, by in ((model, optimizer), (other, resumed)):
        _train(one, by.step, torch.Generator().manual_seed(2), steps=3)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# 8-bit codes


@pytest.mark.parametrize("signed", [True, False])
def test_two_look_ups_equal_a_search_next_to_every_edge(signed: bool) -> None:
    of = tables(torch.device("cpu"), signed)
    edges = (torch.arange(1 << 16, dtype=torch.int32) << 16).view(torch.float32)
    edges = torch.cat([edges[edges.abs() <= 1], of.midpoints[:-1]])
    if not signed:
        edges = edges[edges >= 0]
    up, down = (torch.nextafter(edges, torch.tensor(to)) for to in (2.0, -2.0))
    x = torch.cat([edges, up, down if signed else down.clamp(min=0)])
    assert torch.equal(nearest(x, of).long(), torch.bucketize(x, of.midpoints[:-1]))


@pytest.fixture
def other_defaults() -> Iterator[Callable[[], None]]:
    """Yield what sets torch's defaults to what nobody expects, where no table is made yet."""

    def change() -> None:
        for made in (tables, dynamic_map):
            made.cache_clear()
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")

    yield change
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    for made in (tables, dynamic_map):
        made.cache_clear()


@pytest.mark.parametrize("signed", [True, False])
def test_codes_do_not_depend_on_torch_s_defaults(
    signed: bool, other_defaults: Callable[[], None], generator: torch.Generator
) -> None:
    x = torch.randn(3000, generator=generator)
    x = x if signed else x.abs()
    want = quantize_blockwise(x, reference_map(signed))
    other_defaults()
    codes, absmax = dynamic_quantize(x, 256, signed)
    assert torch.equal(codes, want[0])
    assert torch.equal(absmax, want[1])


@pytest.mark.parametrize("make", [_eight_bit_galore, _adamw8bit])
def test_steps_do_not_depend_on_torch_s_defaults(
    make: Callable[[nn.Sequential], torch.optim.Optimizer],
    other_defaults: Callable[[], None],
    generator: torch.Generator,
) -> None:
    model, other = _network(), _network()
    gradients = [torch.randn(p.shape, generator=generator) for p in model.parameters()]

    def steps(one: nn.Sequential) -> None:
        optimizer = make(one)
        for p, g in zip(one.parameters(), gradients, strict=True):
            p.grad = g
        optimizer.step()
        for state in optimizer.state.values():
            state["step"] = 256  # from here on bfloat16 does not count
        optimizer.step()
        optimizer.step()

    steps(model)
    other_defaults()
    steps(other)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# Paged


SIZES = (100_000, 300, 150_000, 120_000, 100_000)
LARGEST = 2 * 4 * 150_000
TOTAL = 2 * 4 * sum(n for n in SIZES if n >= 100_000)


def _params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(n, generator=generator)) for n in SIZES]


def _steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], seed: int, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("budget", [0, LARGEST, 2 * LARGEST, 3 * LARGEST - 1, TOTAL - 1, TOTAL], ids=str)
def test_a_budget_is_respected_and_changes_no_value(budget: int) -> None:
    plain, paged = _params(), _params()
    _steps(torch.optim.AdamW(plain, lr=0.1), plain, seed=1)
    optimizer = Paged(torch.optim.AdamW(paged, lr=0.1), budget)
    _steps(optimizer, paged, seed=1)
    for mine, theirs in zip(paged, plain, strict=True):
        assert torch.equal(mine, theirs)
    assert optimizer.resident <= optimizer.peak <= max(budget, LARGEST)
    places = optimizer.where()
    assert set(places) == {p for p in paged if p.numel() >= 100_000}
    moved = optimizer.bytes_in
    _steps(optimizer, paged, seed=2, steps=1)
    on_host = sum(
        bytes_of({n: t for n, t in optimizer.state[p].items() if is_paged(t)}) for p in paged if places.get(p) == "host"
    )
    assert optimizer.bytes_in - moved == on_host
    assert on_host == 0 if budget >= TOTAL else on_host > 0
    if budget > 2 * LARGEST:
        assert "device" in places.values()


def test_a_paged_8_bit_optimizer_steps_like_the_plain_one() -> None:
    plain, paged = _params(), _params()
    _steps(AdamW8bit(plain), plain, seed=1)
    optimizer = Paged(AdamW8bit(paged), budget=0)
    _steps(optimizer, paged, seed=1)
    assert optimizer.peak == 2 * 150_000
    for mine, theirs in zip(paged, plain, strict=True):
        assert torch.equal(mine, theirs)


def test_a_loaded_paged_state_continues_exactly() -> None:
    first, second = _params(), _params()
    optimizer = Paged(torch.optim.AdamW(first), budget=LARGEST)
    _steps(optimizer, first, seed=1)
    with torch.no_grad():
        for to, p in zip(second, first, strict=True):
            to.copy_(p)
    resumed = Paged(torch.optim.AdamW(second), budget=0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch itself would share `step`
    assert set(resumed.where().values()) == {"host"}
    _steps(optimizer, first, seed=2)
    _steps(resumed, second, seed=2)
    for mine, theirs in zip(second, first, strict=True):
        assert torch.equal(mine, theirs)


class Watched(AdamW8bit):
    """Knows the most bytes of large states that it held at the end of one load, all of them on the device."""

    most = 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        held = sum(bytes_of({n: t for n, t in s.items() if is_paged(t)}) for s in self.state.values())
        self.most = max(self.most, held)


@pytest.mark.parametrize("budget", [0, 250_000], ids=str)
def test_the_budget_holds_while_states_are_loaded(budget: int) -> None:
    first, second = _params(), _params()
    saved = AdamW8bit(first)
    _steps(saved, first, seed=1)
    inner = Watched(second)
    optimizer = Paged(inner, budget)
    _steps(optimizer, second, seed=3, steps=1)  # states of its own, which give way
    optimizer.load_state_dict(saved.state_dict())
    largest = LARGEST // 4
    assert inner.most == largest
    assert optimizer.resident <= optimizer.peak == max(budget // largest, 1) * largest
    assert optimizer.state_dict()["state"].keys() == saved.state_dict()["state"].keys()
    for mine, theirs in zip(second, first, strict=True):
        assert optimizer.state[mine].keys() == saved.state[theirs].keys()
        for name, value in saved.state[theirs].items():
            assert torch.equal(torch.as_tensor(optimizer.state[mine][name]), torch.as_tensor(value))
            assert not isinstance(value, Tensor) or optimizer.state[mine][name].dtype == value.dtype


def test_a_state_of_other_groups_changes_nothing() -> None:
    params = _params()
    optimizer = Paged(torch.optim.AdamW(params), budget=LARGEST)
    _steps(optimizer, params, seed=1, steps=1)
    before, places = copy.deepcopy(list(optimizer.state.values())), optimizer.where()
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(torch.optim.AdamW(params[:2]).state_dict())
    assert optimizer.where() == places
    for now, then in zip(optimizer.state.values(), before, strict=True):
        assert all(torch.equal(now[name], then[name]) for name in then)


def test_states_made_before_paging_count_in_the_peak() -> None:
    params = _params()
    inner = torch.optim.AdamW(params)
    _steps(inner, params, seed=1, steps=1)
    optimizer = Paged(inner, budget=0)
    assert set(optimizer.where().values()) == {"host"}
    assert optimizer.peak == TOTAL


def test_a_failed_step_mixes_no_pages() -> None:
    class Failing(torch.optim.AdamW):
        failing: nn.Parameter | None = None

        def step(self, closure: Any = None) -> Any:
            if self.param_groups[0]["params"][0] is self.failing:
                raise RuntimeError("as asked")
            return super().step(closure)

    params = _params()
    inner = Failing(params)
    optimizer = Paged(inner, budget=2 * LARGEST)
    _steps(optimizer, params, seed=1, steps=1)
    before = [optimizer.state[p]["exp_avg"].clone() for p in params]
    inner.failing = params[2]
    with pytest.raises(RuntimeError, match="as asked"):
        _steps(optimizer, params, seed=2, steps=1)
    after = [optimizer.state[p]["exp_avg"] for p in params]
    assert not torch.equal(after[0], before[0])  # was updated
    for mine, theirs in zip(after[2:], before[2:], strict=True):
        assert torch.equal(mine, theirs)
    assert optimizer.param_groups[0]["params"] == params


# Dropout


def test_dropout_of_0_and_1_equals_that_of_torch(generator: torch.Generator) -> None:
    x = torch.randn(33, 7, generator=generator)
    for p in (0.0, 1.0):
        mask, kept = keep_mask(x, p)
        assert torch.equal(x * mask / kept, nn.functional.dropout(x, p))


def test_dropout_scales_up_by_exactly_1_over_1_minus_p() -> None:
    assert keep_mask(torch.empty(1000), 0.1)[1] == 1 - 0.1


@pytest.mark.parametrize("p", [0.999, 0.99999, 1 - 1e-9, 1 - 1e-12])
def test_dropout_near_1_has_a_nonzero_probability(p: float, generator: torch.Generator) -> None:
    torch.manual_seed(0)
    mask, kept = keep_mask(torch.empty(1000), p)
    assert 0 < kept < 1
    assert mask.count_nonzero() < 500
    assert (mask / kept).isfinite().all()


# Several adapters


def _adapters(ranks: tuple[int, ...], generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    draw = {"generator": generator, "dtype": torch.float64, "requires_grad": True}
    return [torch.randn(r, 6, **draw) for r in ranks], [torch.randn(4, r, **draw) for r in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("ids", [[1, 1, 0, -1], [1, 0, -1, 1]], ids=["sorted", "mixed"])
def test_multi_lora_is_twice_differentiable(ids: list[int], generator: torch.Generator) -> None:
    As, Bs = _adapters((2, 3), generator)
    x = torch.randn(4, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    W = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, W: Tensor, *adapters: Tensor) -> Tensor:
        return multi_lora_linear(x, W, adapters[:2], adapters[2:], [0.5, 2.0], ids)

    assert torch.autograd.gradcheck(call, (x, W, *As, *Bs))
    assert torch.autograd.gradgradcheck(call, (x, W, *As, *Bs))


def test_nan_in_one_adapter_affects_only_its_sequences(generator: torch.Generator) -> None:
    As, Bs = _adapters((2, 3), generator)
    with torch.no_grad():
        As[1].fill_(torch.nan)
    x = torch.randn(3, 2, 6, generator=generator, dtype=torch.float64)
    y = multi_lora_linear(x, torch.eye(4, 6, dtype=torch.float64), As, Bs, [1.0, 1.0], torch.tensor([0, 1, -1]))
    assert [bool(one.isnan().any()) for one in y] == [False, True, False]
    assert torch.equal(y[2], x[2, :, :4])


def test_an_empty_batch_has_an_empty_output_and_zero_gradients(generator: torch.Generator) -> None:
    As, Bs = _adapters((2, 3), generator)
    x, W = torch.empty(0, 3, 6, dtype=torch.float64, requires_grad=True), torch.ones(4, 6).double().requires_grad_()
    y = multi_lora_linear(x, W, As, Bs, [1.0, 1.0], [])
    assert y.shape == multi_lora_reference(x, linear(x, W), As, Bs, [1.0, 1.0], []).shape == (0, 3, 4)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert torch.equal(W.grad, torch.zeros_like(W))


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.zeros(2, 1, dtype=torch.long), r"got .*\(2, 1\)"),
        ([[0], [1]], r"got .*\(2, 1\)"),
        ([0, 1, 1], r"got .*\(3,\)"),
        ([0, 0.5], r"got torch.float32; .*long\(\)"),
        (torch.tensor([0.0, torch.nan]), "got torch.float32"),
    ],
    ids=str,
)
def test_invalid_ids_are_rejected_like_in_the_reference(ids: Any, words: str, generator: torch.Generator) -> None:
    As, Bs = _adapters((2, 3), generator)
    x, W = torch.ones(2, 3, 6).double(), torch.ones(4, 6).double()
    with pytest.raises(ValueError, match=words):
        multi_lora_linear(x, W, As, Bs, [1.0, 1.0], ids)
    with pytest.raises(ValueError, match=words):
        multi_lora_reference(x, linear(x, W), As, Bs, [1.0, 1.0], ids)


@pytest.mark.parametrize("ids", [[0, 2], [0, -2]])
def test_an_id_without_an_adapter_is_rejected(ids: list[int], generator: torch.Generator) -> None:
    As, Bs = _adapters((2, 3), generator)
    with pytest.raises(ValueError, match="0 to 1"):
        multi_lora_linear(torch.ones(2, 1, 6, dtype=torch.float64), torch.ones(4, 6).double(), As, Bs, [1.0, 1.0], ids)
