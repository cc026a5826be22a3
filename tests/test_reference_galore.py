"""GaLore against algorithm 2 written out by hand, against its own invariants, and against the authors' package."""

from __future__ import annotations

import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.conformance.subject import DTYPES, configure
from harness.conformance.tolerance import exact, noise_floor
from reference import galore
from reference.galore import GaLore, Projector, galore_step, project, project_back, projector

SHAPES = {"tall": (7, 4), "wide": (4, 7), "square": (5, 5)}
SIDES = ("std", "reverse_std", "paper", "left", "right", "full")
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


class Small(nn.Module):
    """q_proj 6 -> 9 with a bias, a norm, v_proj 9 -> 4 without a bias, head 4 -> 3."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.q_proj = nn.Linear(6, 9, dtype=dtype)
        self.norm = nn.LayerNorm(9, dtype=dtype)
        self.v_proj = nn.Linear(9, 4, bias=False, dtype=dtype)
        self.head = nn.Linear(4, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.v_proj(self.norm(torch.tanh(self.q_proj(x)))))


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def attached(model: nn.Module | None = None, **config: Any) -> Any:
    knobs = {"rank": 2, "update_gap": 3, **config}
    return galore.attach(model or Small(), configure("galore", knobs), torch.Generator())


def backward(model: nn.Module, step: int) -> None:
    dtype = next(model.parameters()).dtype
    model(draw(5, 6, seed=step, dtype=dtype)).square().sum().backward()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same(have: Tensor | dict[str, Tensor], want: Tensor | dict[str, Tensor], dtype: str = "float64") -> None:
    """Judge by the policy; `want` is in float64, and what rounding it to `dtype` loses is the noise."""
    have, want = ({"it": t} if isinstance(t, Tensor) else t for t in (have, want))
    judged = noise_floor(have, want, {n: t.to(DTYPES[dtype]) for n, t in want.items()}, dtype)
    assert judged.passed, judged


# The projector


@shapes
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [1, 2, 4, 99])
def test_the_projector_spans_the_first_singular_vectors(shape: tuple[int, int], side: str, rank: int) -> None:
    G = draw(*shape)
    basis = projector(G, rank, side)
    r = min(rank, *shape)
    for columns, gram in ((basis.P, G @ G.T), (basis.Q, G.T @ G)):
        if columns is not None:
            assert columns.shape == (len(gram), r)
            assert_same(columns.T @ columns, torch.eye(r, dtype=torch.float64))
            largest = torch.linalg.eigvalsh(gram).flip(0)[:r]
            assert_same(gram @ columns, columns * largest)


@shapes
@pytest.mark.parametrize(
    ("side", "left"),
    [
        ("std", {"tall": False, "wide": True, "square": False}),
        ("paper", {"tall": False, "wide": True, "square": True}),
        ("reverse_std", {"tall": True, "wide": False, "square": True}),
        ("left", {"tall": True, "wide": True, "square": True}),
        ("right", {"tall": False, "wide": False, "square": False}),
    ],
)
def test_which_side(shape: tuple[int, int], side: str, left: dict[str, bool]) -> None:
    basis = projector(draw(*shape), 2, side)
    want = next(left[name] for name, s in SHAPES.items() if s == shape)
    assert (basis.P is not None, basis.Q is not None) == (want, not want)


def test_full_projects_on_both_sides() -> None:
    G = draw(7, 4)
    basis = projector(G, 2, "full")
    assert basis.P is not None
    assert basis.Q is not None
    # In the bases of G itself, R is the diagonal of the singular values.
    assert_same(project(G, basis), torch.diag(torch.linalg.svdvals(G)[:2]))


def test_an_unknown_side_is_an_error() -> None:
    with pytest.raises(ValueError, match="no side 'top'; there are: std, reverse_std, paper, left, right, full"):
        projector(draw(3, 3), 1, "top")


@shapes
@pytest.mark.parametrize("side", SIDES)
def test_at_full_rank_nothing_is_lost(shape: tuple[int, int], side: str) -> None:
    G = draw(*shape)
    # On the long side even min(m, n) vectors span all that G has.
    assert_same(project_back(project(G, projector(G, 99, side)), projector(G, 99, side)), G)


@shapes
@pytest.mark.parametrize("side", SIDES)
def test_what_is_lost_is_the_tail_of_the_singular_values(shape: tuple[int, int], side: str) -> None:
    G = draw(*shape)
    basis = projector(G, 2, side)
    lost = torch.linalg.vector_norm(G - project_back(project(G, basis), basis))
    assert_same(lost, torch.linalg.vector_norm(torch.linalg.svdvals(G)[2:]))  # Eckart and Young


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_singular_vectors_are_found_in_float32_and_cast_back(dtype: str) -> None:
    G = draw(4, 7, dtype=DTYPES[dtype])
    P = projector(G, 2).P
    assert P is not None
    assert P.dtype == DTYPES[dtype]
    U = torch.linalg.svd(G.float(), full_matrices=False).U
    assert torch.equal(P, U[:, :2].to(P.dtype))


def test_singular_vectors_of_float64_stay_float64() -> None:
    P = projector(draw(40, 70), 5).P
    assert P is not None
    assert_same(P.T @ P, torch.eye(5, dtype=torch.float64))


# One step, ten steps


def by_hand(W: Tensor, gradients: list[Tensor], bases: list[Projector], knobs: dict[str, Any]) -> Tensor:
    """Algorithm 2 with the authors' eps and decay, number by number; `bases` holds the projector of every step."""
    b1, b2, eps, lr = (knobs[k] for k in ("beta1", "beta2", "eps", "lr"))
    W = W.clone()
    M: dict[tuple[int, int], float] = {}
    V: dict[tuple[int, int], float] = {}
    for t, (G, basis) in enumerate(zip(gradients, bases, strict=True), start=1):
        P = torch.eye(len(G), dtype=G.dtype) if basis.P is None else basis.P
        Q = torch.eye(G.shape[1], dtype=G.dtype) if basis.Q is None else basis.Q
        R = torch.einsum("mr,mn,ns->rs", P, G, Q)
        N = torch.zeros_like(R)
        for i in range(len(R)):
            for j in range(R.shape[1]):
                g = float(R[i, j])
                M[i, j] = b1 * M.get((i, j), 0.0) + (1 - b1) * g
                V[i, j] = b2 * V.get((i, j), 0.0) + (1 - b2) * g * g
                N[i, j] = M[i, j] / (1 - b1**t) / (math.sqrt(V[i, j] / (1 - b2**t)) + eps / math.sqrt(1 - b2**t))
        W = W - lr * knobs["scale"] * torch.einsum("mr,rs,ns->mn", P, N, Q)
        W = W - lr * knobs["weight_decay"] * W
    return W


KNOBS: dict[str, Any] = {"lr": 0.1, "scale": 0.5, "weight_decay": 0.3, "beta1": 0.7, "beta2": 0.9, "eps": 1e-2}


@shapes
@pytest.mark.parametrize("side", SIDES)
def test_ten_steps_are_the_papers(shape: tuple[int, int], side: str) -> None:
    W, gradients = draw(*shape, seed=2), [draw(*shape, seed=10 + i) for i in range(10)]
    bases = [projector(gradients[t // 3 * 3], 2, side) for t in range(10)]  # refreshed at steps 1, 4, 7, 10
    want = by_hand(W, gradients, bases, KNOBS)
    state: dict[str, Any] = {}
    for G in gradients:
        galore_step(W, G, state, rank=2, update_gap=3, side=side, **KNOBS)
    assert_same(W, want)


@pytest.mark.parametrize("gap", [1, 3, 100])
def test_the_projector_changes_at_steps_1_and_t_plus_1_and_moments_stay(gap: int) -> None:
    W, state, changed = draw(4, 7), {}, []
    for step in range(1, 8):
        before = copy.deepcopy(state)
        G = draw(4, 7, seed=step)
        galore_step(W, G, state, rank=2, update_gap=gap, **KNOBS)
        if not before or not torch.equal(before["P"], state["P"]):
            changed.append(step)
        if before:  # whether refreshed or not, they go on from what they were
            assert_same(state["M"], 0.7 * before["M"] + (1 - 0.7) * project(G, Projector(P=state["P"])))
    assert changed == list(range(1, 8, gap))


@shapes
@pytest.mark.parametrize("side", SIDES)
def test_the_sign_of_a_singular_vector_does_not_matter(shape: tuple[int, int], side: str) -> None:
    G = draw(*shape)
    basis = projector(G, 2, side)
    flip = torch.tensor([1.0, -1.0], dtype=torch.float64)
    flipped = Projector(*(None if t is None else t * flip for t in (basis.P, basis.Q)))
    results = []
    for given in (basis, flipped):
        W, state = draw(*shape, seed=2), {}
        for step in range(4):
            galore_step(W, draw(*shape, seed=step), state, rank=2, side=side, given=given, **KNOBS)
        results.append(W)
    assert torch.equal(*results)


def test_a_given_projector_is_taken_where_a_refresh_is_due_and_only_there() -> None:
    W, state = draw(4, 7), {}
    first, second = (Projector(P=torch.linalg.qr(draw(4, 2, seed=s)).Q) for s in (8, 9))
    galore_step(W, draw(4, 7), state, rank=2, update_gap=2, given=first, **KNOBS)
    galore_step(W, draw(4, 7), state, rank=2, update_gap=2, given=second, **KNOBS)
    assert state["P"] is first.P
    galore_step(W, draw(4, 7), state, rank=2, update_gap=2, given=second, **KNOBS)
    assert state["P"] is second.P


def test_the_update_stays_in_the_subspace_and_the_decay_does_not() -> None:
    G, state, W = draw(4, 7), {}, draw(4, 7, seed=2)
    before = W.clone()
    galore_step(W, G, state, rank=2, **KNOBS)
    P = state["P"]
    outside = torch.eye(4, dtype=torch.float64) - P @ P.T
    assert_same(outside @ W, (1 - 0.1 * 0.3) * (outside @ before))  # the full learning rate, not scaled by alpha


def test_scale_multiplies_the_update_alone() -> None:
    moved = {}
    for scale in (1.0, 0.25):
        W = draw(4, 7)
        galore_step(W, draw(4, 7, seed=2), {}, rank=2, **{**KNOBS, "scale": scale, "weight_decay": 0.0})
        moved[scale] = W - draw(4, 7)
    # W - W' cancels digits: half an eps of W is what either difference may be off by.
    assert_same(draw(4, 7) + moved[0.25] * 4, draw(4, 7) + moved[1.0])


def test_without_rank_it_is_adam() -> None:
    ours, theirs = draw(4, 7), nn.Parameter(draw(4, 7))
    adam = torch.optim.Adam([theirs], lr=0.1, betas=(0.7, 0.9), eps=0.0)
    state: dict[str, Any] = {}
    for step in range(5):
        theirs.grad = draw(4, 7, seed=step)
        adam.step()
        galore_step(ours, theirs.grad, state, rank=0, **{**KNOBS, "eps": 0.0, "weight_decay": 0.0})
    assert_same(ours, theirs.detach())


def test_the_gradient_is_not_changed() -> None:
    G = draw(4, 7)
    galore_step(draw(4, 7), G, {}, rank=2, **KNOBS)
    assert torch.equal(G, draw(4, 7))


@shapes
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [1, 3, 99])
def test_the_state_is_as_large_as_the_formula_says(shape: tuple[int, int], side: str, rank: int) -> None:
    state: dict[str, Any] = {}
    galore_step(draw(*shape), draw(*shape), state, rank=rank, side=side, **KNOBS)
    have = sum(t.numel() for t in state.values() if isinstance(t, Tensor))
    assert galore.state_elements(*shape, rank, side) == have
    if side == "std":
        (m, n), r = sorted(shape), min(rank, *shape)
        assert have == m * r + 2 * n * r  # table 1


# The Method


def test_everything_trains_and_the_targets_are_projected() -> None:
    adapted = attached()
    optimizer = adapted.optimizer(0.1, 0.0)
    model = adapted.model
    low, rest = optimizer.param_groups
    assert [id(p) for p in low["params"]] == [id(model.q_proj.weight), id(model.v_proj.weight)]
    assert (low["rank"], rest["rank"]) == (2, 0)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert all(p.requires_grad for p in model.parameters())
    assert adapted.tensors().keys() == dict(model.named_parameters()).keys()


def test_the_rest_may_be_frozen() -> None:
    adapted = attached(train_rest=False)
    assert adapted.tensors().keys() == {"q_proj.weight", "v_proj.weight"}
    optimizer = adapted.optimizer(0.1, 0.3)
    before = weights(adapted.model)
    backward(adapted.model, 1)
    optimizer.step()
    moved = {n for n, p in adapted.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"q_proj.weight", "v_proj.weight"}


def test_the_config_reaches_the_optimizer() -> None:
    knobs = {"rank": 3, "update_gap": 5, "scale": 0.75, "side": "paper", "beta1": 0.5, "beta2": 0.25, "eps": 0.125}
    optimizer = attached(**knobs).optimizer(0.1, 0.3)
    assert {k: optimizer.param_groups[0][k] for k in knobs} == knobs
    assert {k: optimizer.param_groups[1][k] for k in ("beta1", "beta2", "eps")} == {
        "beta1": 0.5, "beta2": 0.25, "eps": 0.125,
    }  # fmt: skip
    assert {(g["lr"], g["weight_decay"]) for g in optimizer.param_groups} == {(0.1, 0.3)}


def test_the_optimizer_takes_the_steps_of_the_function() -> None:
    adapted = attached()
    optimizer = adapted.optimizer(0.1, 0.3)
    want, states = weights(adapted.model), {n: {} for n in weights(adapted.model)}
    for step in range(5):
        backward(adapted.model, step)
        for name, p in adapted.model.named_parameters():
            rank = 2 if name in ("q_proj.weight", "v_proj.weight") else 0
            galore_step(want[name], p.grad, states[name], lr=0.1, weight_decay=0.3, rank=rank, update_gap=3)
        optimizer.step()
        optimizer.zero_grad()
    assert exact(weights(adapted.model), want).passed


def test_a_tied_weight_is_updated_once() -> None:
    model = Small()
    model.head = nn.Linear(9, 4, bias=False, dtype=torch.float64)
    model.head.weight = model.v_proj.weight
    adapted = attached(model, targets=("v_proj", "head"))
    groups = adapted.optimizer(0.1, 0.0).param_groups
    assert [id(p) for p in groups[0]["params"]] == [id(model.v_proj.weight)]
    assert {"v_proj.weight", "head.weight"} <= adapted.tensors().keys()


def test_a_group_added_later_takes_its_tensors_along() -> None:
    adapted = attached()
    optimizer = adapted.optimizer(0.1, 0.0)
    optimizer.add_param_group({"params": list(adapted.model.head.parameters()), "lr": 0.5})
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in adapted.model.parameters())
    assert {id(p) for p in optimizer.param_groups[-1]["params"]} == {id(p) for p in adapted.model.head.parameters()}
    assert (optimizer.param_groups[-1]["lr"], optimizer.param_groups[-1]["rank"]) == (0.5, 0)


def test_a_packed_weight_is_refused() -> None:
    model = Small()
    model.q_proj.weight = nn.Parameter(torch.zeros(27, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"GaLore trains the weight of q_proj itself, which is packed \(torch.uint8\)"):
        attached(model)


@pytest.mark.parametrize("train_rest", [True, False])
def test_per_layer_updates_give_the_same_numbers(train_rest: bool) -> None:
    whole, layered = attached(train_rest=train_rest), attached(train_rest=train_rest)
    optimizers = [a.optimizer(0.1, 0.3) for a in (whole, layered)]
    hooks = galore.per_layer(optimizers[1])
    for step in range(7):
        for adapted, optimizer in zip((whole, layered), optimizers, strict=True):
            backward(adapted.model, step)
            assert (adapted is layered) == all(p.grad is None for p in adapted.parameters())
            optimizer.step()
            optimizer.zero_grad()
    assert exact(weights(layered.model), weights(whole.model)).passed
    for hook in hooks:
        hook.remove()
    backward(layered.model, 1)
    assert all(p.grad is not None for p in layered.parameters())


def test_a_saved_optimizer_goes_on_as_if_nothing_had_been() -> None:
    adapted = attached()
    optimizer = adapted.optimizer(0.1, 0.3)
    for step in range(2):  # not at a refresh, so that the projector must come back too
        optimizer.zero_grad()
        backward(adapted.model, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = attached(copy.deepcopy(adapted.model))
    resumed = twin.optimizer(0.1, 0.3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for each, its in ((adapted, optimizer), (twin, resumed)):
        for step in range(2, 6):
            its.zero_grad()
            backward(each.model, step)
            its.step()
    assert exact(weights(twin.model), weights(adapted.model)).passed


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_state_has_the_gradients_dtype(dtype: str) -> None:
    adapted = attached(Small(DTYPES[dtype]))
    optimizer = adapted.optimizer(0.01, 0.1)
    backward(adapted.model, 1)
    optimizer.step()
    for state in optimizer.state.values():
        assert {t.dtype for t in state.values() if isinstance(t, Tensor)} == {DTYPES[dtype]}
    assert all(bool(p.isfinite().all()) for p in adapted.model.parameters())


def test_a_closure_may_run_backward() -> None:
    adapted = attached()
    optimizer = adapted.optimizer(0.1, 0.0)

    def closure() -> Tensor:
        loss = adapted.model(draw(5, 6)).square().sum()
        loss.backward()
        return loss

    before = weights(adapted.model)
    assert float(optimizer.step(closure).detach()) > 0
    assert not torch.equal(adapted.model.q_proj.weight, before["q_proj.weight"])


# The authors' package


def theirs(params: Any, **knobs: Any) -> Any:
    package = pytest.importorskip("galore_torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is deprecated
        return package.GaLoreAdamW(params, no_deprecation_warning=True, **knobs)


def both(dtype: torch.dtype, shape: tuple[int, int], side: str, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight after `steps`: theirs in `dtype`, ours in `dtype` with their projectors, and ours in float64."""
    W = nn.Parameter(draw(*shape, seed=2, dtype=dtype))
    group = {"params": [W], "rank": 2, "update_proj_gap": 3, "scale": 0.5, "proj_type": side}
    optimizer = theirs([group], lr=0.1, betas=(0.7, 0.9), eps=1e-2, weight_decay=0.3)
    rounded, truth = W.detach().clone(), W.detach().double()
    states: list[dict[str, Any]] = [{}, {}]
    for step in range(steps):
        W.grad = draw(*shape, seed=10 + step, dtype=dtype)
        optimizer.step()
        matrix = optimizer.state[W]["projector"].ortho_matrix  # theirs holds Q^T
        P, Qt = matrix if side == "full" else (matrix, None) if matrix.shape == (shape[0], 2) else (None, matrix)
        given = Projector(P, None if Qt is None else Qt.T)
        wide = Projector(*(None if t is None else t.double() for t in (given.P, given.Q)))
        knobs = {"rank": 2, "update_gap": 3, "side": side, **KNOBS}
        galore_step(rounded, W.grad, states[0], given=given, **knobs)
        galore_step(truth, W.grad.double(), states[1], given=wide, **knobs)
    return W.detach(), rounded, truth


@shapes
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("steps", [1, 10])
def test_the_authors_package_takes_the_same_steps(shape: tuple[int, int], side: str, dtype: str, steps: int) -> None:
    W, rounded, truth = both(DTYPES[dtype], shape, side, steps)
    judged = noise_floor({"W": W}, {"W": truth}, {"W": rounded}, dtype)
    assert judged.passed, judged


@shapes
@pytest.mark.parametrize("side", ["std", "left", "right", "full"])
def test_the_authors_package_finds_the_same_projector_in_float32(shape: tuple[int, int], side: str) -> None:
    pytest.importorskip("galore_torch")
    from galore_torch.galore_projector import GaLoreProjector

    G, ours = draw(*shape, dtype=torch.float32), projector(draw(*shape, dtype=torch.float32), 2, side)
    other = GaLoreProjector(2, proj_type=side)
    R = other.project(G, 0)
    assert torch.equal(R, project(G, ours))
    assert torch.equal(other.project_back(R), project_back(R, ours))


def test_the_authors_package_updates_the_rest_by_the_same_adam() -> None:
    mine, other = attached(targets=("q_proj",)), Small()
    low = {"rank": 2, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    rest = [p for n, p in other.named_parameters() if n != "q_proj.weight"]
    optimizers = [
        mine.optimizer(0.1, 0.3),
        theirs([{"params": rest}, {"params": [other.q_proj.weight], **low}], lr=0.1, weight_decay=0.3),
    ]
    backward(mine.model, 1)
    backward(other, 1)
    for optimizer in optimizers:
        optimizer.step()
    names = [n for n in weights(other) if n != "q_proj.weight"]
    assert_same({n: weights(other)[n] for n in names}, {n: weights(mine.model)[n] for n in names})


def test_an_optimizer_by_itself() -> None:
    p = nn.Parameter(draw(4, 7))
    optimizer = GaLore([{"params": [p], "rank": 2}], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert optimizer.step() is None
    assert torch.equal(p, draw(4, 7))  # no gradient, no step, no decay
    p.grad = draw(4, 7, seed=2)
    optimizer.step()
    want, state = draw(4, 7), {}
    galore_step(want, p.grad, state, lr=0.1, rank=2)
    assert torch.equal(p, want)
