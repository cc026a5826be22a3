"""GaLore against algorithm 2 written out by hand, against its own invariants, and against the authors' package."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.conformance.subject import DTYPES
from reference import galore
from reference.galore import Projector, galore_step, project, project_back, projector
from support.two_layer_model import draw

SHAPES = {"tall": (7, 4), "wide": (4, 7), "square": (5, 5)}
SIDES = ("std", "reverse_std", "paper", "left", "right", "full")
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


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
@pytest.mark.parametrize("side", SIDES)
def test_enough_iterations_of_a_randomised_svd_find_the_exact_projector(shape: tuple[int, int], side: str) -> None:
    G = draw(10 * shape[0], 10 * shape[1])
    # The two largest stand far from the rest: subspaces are as exact as the gap after them is wide, on any machine's LAPACK.
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    G = U * torch.cat([10 * S[:2], S[2:]]) @ Vt
    exact, found = (projector(G, 2, side, niter) for niter in (0, 60))
    for have, want in ((found.P, exact.P), (found.Q, exact.Q)):
        assert (have is None) == (want is None)
        if have is not None:
            assert_same(have @ have.T, want @ want.T)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (40, 40)], ids=str)
def test_more_iterations_and_a_warm_start_reduce_the_error(shape: tuple[int, int], side: str) -> None:
    G = draw(*shape)
    before = projector(G + 0.1 * draw(*shape, seed=2), 4, side)

    def lost(niter: int, old: Projector | None = None) -> float:
        basis = projector(G, 4, side, niter, old)
        return float((G - project_back(project(G, basis), basis)).norm())

    assert lost(1) > lost(2) > lost(8) >= lost(0) * (1 - torch.finfo(torch.float64).eps)
    assert lost(1, before) < lost(1)


def test_random_vectors_are_the_same_at_every_refresh_and_a_torch_seed_does_not_matter() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(projector(draw(60, 40), 4, niter=1).Q)
    assert torch.equal(*found)


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
def test_sides_by_shape(shape: tuple[int, int], side: str, left: dict[str, bool]) -> None:
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
    with pytest.raises(ValueError, match="unknown side 'top'; known: std, reverse_std, paper, left, right, full"):
        projector(draw(3, 3), 1, "top")


@shapes
@pytest.mark.parametrize("side", SIDES)
def test_full_rank_is_exact(shape: tuple[int, int], side: str) -> None:
    G = draw(*shape)
    # On the long side even min(m, n) vectors span all that G has.
    assert_same(project_back(project(G, projector(G, 99, side)), projector(G, 99, side)), G)


@shapes
@pytest.mark.parametrize("side", SIDES)
def test_the_projection_error_is_the_tail_of_the_singular_values(shape: tuple[int, int], side: str) -> None:
    G = draw(*shape)
    basis = projector(G, 2, side)
    error = torch.linalg.vector_norm(G - project_back(project(G, basis), basis))
    assert_same(error, torch.linalg.vector_norm(torch.linalg.svdvals(G)[2:]))  # Eckart and Young


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


def by_formula(W: Tensor, gradients: list[Tensor], bases: list[Projector], options: dict[str, Any]) -> Tensor:
    """Algorithm 2 with the authors' eps and decay, number by number; `bases` holds the projector of every step."""
    b1, b2, eps, lr = (options[k] for k in ("beta1", "beta2", "eps", "lr"))
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
        W = W - lr * options["scale"] * torch.einsum("mr,rs,ns->mn", P, N, Q)
        W = W - lr * options["weight_decay"] * W
    return W


KNOBS: dict[str, Any] = {"lr": 0.1, "scale": 0.5, "weight_decay": 0.3, "beta1": 0.7, "beta2": 0.9, "eps": 1e-2}


@shapes
@pytest.mark.parametrize("side", SIDES)
def test_ten_steps_are_the_papers(shape: tuple[int, int], side: str) -> None:
    W, gradients = draw(*shape, seed=2), [draw(*shape, seed=10 + i) for i in range(10)]
    bases = [projector(gradients[t // 3 * 3], 2, side) for t in range(10)]  # refreshed at steps 1, 4, 7, 10
    want = by_formula(W, gradients, bases, KNOBS)
    state: dict[str, Any] = {}
    for G in gradients:
        galore_step(W, G, state, rank=2, update_gap=3, side=side, **KNOBS)
    assert_same(W, want)


@pytest.mark.parametrize("side", SIDES)
def test_a_randomised_refresh_starts_from_the_previous_projector(side: str) -> None:
    W, gradients, state = draw(60, 40, seed=2), [draw(60, 40, seed=10 + i) for i in range(6)], {}
    for G in gradients:
        galore_step(W, G, state, rank=4, update_gap=3, side=side, niter=1, **KNOBS)
    before = projector(gradients[0], 4, side, 1)
    want = projector(gradients[3], 4, side, 1, before)
    for have, basis in ((state.get("P"), want.P), (state.get("Q"), want.Q)):
        assert (have is None and basis is None) or torch.equal(have, basis)


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


def test_a_given_projector_is_used_only_at_a_refresh() -> None:
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


def test_rank_0_is_adam() -> None:
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


# The authors' package


def theirs(params: Any, **options: Any) -> Any:
    package = pytest.importorskip("galore_torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is deprecated
        return package.GaLoreAdamW(params, no_deprecation_warning=True, **options)


def both(dtype: torch.dtype, shape: tuple[int, int], side: str, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight after `steps`: theirs in `dtype`, ours in `dtype` with their projectors, and ours in float64."""
    W = nn.Parameter(draw(*shape, seed=2, dtype=dtype))
    group = {"params": [W], "rank": 2, "update_proj_gap": 3, "scale": 0.5, "proj_type": side}
    optimizer = theirs([group], lr=0.1, betas=(0.7, 0.9), eps=1e-2, weight_decay=0.3)
    rounded, truth = W.detach().clone(), W.detach().clone().double()
    states: list[dict[str, Any]] = [{}, {}]
    for step in range(steps):
        W.grad = draw(*shape, seed=10 + step, dtype=dtype)
        optimizer.step()
        matrix = optimizer.state[W]["projector"].ortho_matrix  # theirs holds Q^T
        P, Qt = matrix if side == "full" else (matrix, None) if matrix.shape == (shape[0], 2) else (None, matrix)
        given = Projector(P, None if Qt is None else Qt.T)
        wide = Projector(*(None if t is None else t.double() for t in (given.P, given.Q)))
        options = {"rank": 2, "update_gap": 3, "side": side, **KNOBS}
        galore_step(rounded, W.grad, states[0], given=given, **options)
        galore_step(truth, W.grad.double(), states[1], given=wide, **options)
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
