"""Measures: optimizer states of GaLore and Adam, and properties of GaLore's step."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

from harness.claims import attached_model
from harness.claims.measure import Config, Count, MeasureResult, Method, Model, Positive, Quantity, measure
from harness.claims.measures.arithmetic import written
from harness.claims.measures.parameters import fitting

Side = Literal["std", "reverse_std", "paper", "left", "right", "full"]
"""Rule that selects the projected side of a matrix. `std`, the rule of the authors' code: left for a matrix with fewer
rows than columns, otherwise right. `reverse_std`: the other side. `paper`: as `std`, but left for a square matrix.
`full`: both."""


@measure("bytes")
def optimizer_bytes(
    model: Model,
    method: Method,
    config: Config = {},
    moments: Quantity = 2,
    projectors: Quantity = 2,
    also: list[str] | None = None,
) -> MeasureResult:
    """Bytes of the optimizer's states: Adam's two moments per trainable number, and GaLore's projectors.

    If GaLore projects a matrix, the moments have the smaller size of the projected gradient. moments, projectors: bytes
    per number. also: regular expressions; parameters of the model whose names match one of them train too.
    """
    states = _states(model, method, config, also)
    in_moments = sum(number * moments_of_one for (_, moments_of_one, _), number in states.items())
    in_projectors = sum(number * projector for (_, _, projector), number in states.items())
    how = f"moments {in_moments:,} x {written(Fraction(moments))} B"
    if in_projectors:
        shapes = [f"{number} of {shape}" for (shape, _, projector), number in states.items() if projector]
        how += f" + projectors {in_projectors:,} x {written(Fraction(projectors))} B; projected: {', '.join(shapes)}"
    return MeasureResult(in_moments * Fraction(moments) + in_projectors * Fraction(projectors), how)


@measure("count")
def matrix_states(rows: Positive, columns: Positive, rank: Positive, side: Side = "paper") -> MeasureResult:
    """Number of elements in GaLore's optimizer state for one matrix: the projector and two moments."""
    from reference.galore import state_elements

    count = state_elements(rows, columns, rank, side)
    return MeasureResult(count, f"projector and two moments of {rows}x{columns}, r = {rank}")


@measure("count")
def refresh_operations(model: Model, method: Method, config: Config = {}) -> MeasureResult:
    """Operations to refresh all of GaLore's projectors once.

    A refresh computes the singular value decomposition of each matrix's gradient, with left and right singular vectors.
    For a gradient of m x n, m >= n, this takes 6 m n^2 + 20 n^3 operations (R-SVD; Golub and Van Loan, Matrix
    Computations, section 8.6).
    """
    shapes: Counter[tuple[int, int]] = Counter()
    for (shape, _, projector), number in _states(model, method, config, None).items():
        if projector:
            n, m = sorted(map(int, shape.split("x")))
            shapes[m, n] += number
    terms = " + ".join(f"{number} x (6 x {m} x {n}^2 + 20 x {n}^3)" for (m, n), number in shapes.items())
    whole = sum(number * (6 * m * n**2 + 20 * n**3) for (m, n), number in shapes.items())
    return MeasureResult(whole, f"{terms} = {whole:.4g}")


@measure("share")
def refresh_share_by_operations(refresh: Count, step: Count, gap: Positive) -> MeasureResult:
    """GaLore's refreshes of its projectors as a share of the time of all steps, if time is proportional to operations.

    refresh, step: operations of a refresh, and of a step. gap: steps from one refresh to the next. No time is measured.
    The true share is larger, because an operation of a decomposition takes longer than one of a matrix product.
    """
    share = refresh / (gap * step)
    how = (
        f"{float(refresh):.6g} / ({gap} x {float(step):.6g}) = {float(100 * share):.3g}% with equal time per operation"
    )
    tenth = f"a tenth if an operation of a decomposition takes {float(1 / (10 * share)):.3g} times as long"
    return MeasureResult(share, f"{how}; {tenth}")


@measure("bytes")
def left_after_saving(saved: Quantity, share: Quantity) -> MeasureResult:
    """Bytes that remain after a saving. saved: the saved bytes. share: the saved bytes as a share of the original bytes."""
    return MeasureResult(saved / share - saved, f"{written(saved)} B / {written(100 * share)}% - {written(saved)} B")


@measure("count")
def width(model: Model) -> MeasureResult:
    """The hidden size of a model."""
    size = int(attached_model.model(model).config.hidden_size)
    return MeasureResult(size, f"hidden_size {size}")


@measure("property")
def heads_divide(width: Positive, heads: Positive) -> MeasureResult:
    """Check whether `width` is a multiple of `heads`, so that all attention heads have the same whole width."""
    return MeasureResult(width % heads == 0, f"{width} / {heads} = {width / heads:.6g}")


@measure("property")
def states_by_formula(rows: Positive, columns: Positive, ranks: list[Positive]) -> MeasureResult:
    """Check whether a weight and its optimizer states have as many numbers in all as Table 1 of the GaLore paper says.

    A weight of m x n, m <= n, and its states have mn + mr + 2nr numbers with GaLore, and mn + 3mr + 3nr with LoRA, at
    rank r. They are counted after a step of Adam.
    """
    m, n = min(rows, columns), max(rows, columns)
    shown, holds = [], True
    for rank in ranks:
        galore, lora = _galore_numbers(rows, columns, rank), _lora_numbers(rows, columns, rank)
        holds = holds and galore == m * n + m * rank + 2 * n * rank and lora == m * n + 3 * m * rank + 3 * n * rank
        shown.append(f"r = {rank}: GaLore {galore:,}, LoRA {lora:,}")
    return MeasureResult(holds, f"{rows}x{columns}, {'; '.join(shown)}")


@measure("property")
def full_rank_keeps_gradient(rows: Positive, columns: Positive, side: Side) -> MeasureResult:
    """Check whether a gradient that is projected at full rank, and then projected back, is unchanged (section 3.3).

    The full rank is the smaller side of the matrix.
    """
    from harness.conformance.comparison.tolerance_policies import noise_floor
    from reference.galore import project, project_back, projector

    G = _gradient(rows, columns, 0)
    basis = projector(G, min(rows, columns), side)
    restored = project_back(project(G, basis), basis)
    judged = noise_floor({"G": restored}, {"G": G}, {"G": G}, "float64")
    return MeasureResult(judged.passed, f"relative difference {judged.error:.2g}, allowed {judged.allowed:.2g}")


@measure("property")
def scale_ignores_rank(rows: Positive, columns: Positive, ranks: list[Positive], scale: Quantity) -> MeasureResult:
    """Check whether GaLore's scale has the same effect at every rank (section 4.4).

    The step with scale `scale` must be `scale` times the step with scale 1.
    """
    from harness.conformance.comparison.tolerance_policies import noise_floor

    G = _gradient(rows, columns, 0)
    shown, holds = [], True
    for rank in ranks:
        scaled, plain = (_step(G, rank=rank, scale=one)[0] for one in (float(scale), 1.0))
        expected = {"W": plain * float(scale)}
        holds = holds and noise_floor({"W": scaled}, expected, expected, "float64").passed
        shown.append(f"r = {rank}: {float(scaled.norm() / plain.norm()):.6g}")
    return MeasureResult(holds, f"norm of the step / norm of the step with scale 1: {', '.join(shown)}")


@measure("property")
def projects(rows: Positive, columns: Positive, on: Literal["left", "right"], side: Side = "std") -> MeasureResult:
    """Check whether a step projects a gradient G of this shape on the side `on`: left (P^T G) or right (G Q)."""
    state = _step(_gradient(rows, columns, 0), rank=2, side=side)[1]
    found = [name for letter, name in (("P", "left"), ("Q", "right")) if letter in state]
    return MeasureResult(found == [on], f"side `{side}` projects {rows}x{columns} on the {' and the '.join(found)}")


@measure("property")
def moments_are(rows: Positive, columns: Positive, rank: Positive, shape: list[Positive]) -> MeasureResult:
    """Check whether Adam's moments have the shape `shape`, if GaLore's rule `paper` selects the projected side.

    The gradient has `rows` rows and `columns` columns.
    """
    M = _step(_gradient(rows, columns, 0), rank=rank, side="paper")[1]["M"]
    return MeasureResult(list(M.shape) == shape, f"W is {rows}x{columns}, M and V are {'x'.join(map(str, M.shape))}")


@measure("property")
def refreshes_every(gap: Positive, steps: Positive, side: Side = "std") -> MeasureResult:
    """Check whether GaLore refreshes its projector exactly in the steps t with t mod gap = 0, counted from 0."""
    import torch

    from reference.galore import galore_step

    W = torch.zeros(8, 12, dtype=torch.float64)
    state: dict[str, Any] = {}
    fresh = []
    for t in range(steps):
        before = [state[letter] for letter in "PQ" if letter in state]
        galore_step(W, _gradient(8, 12, t), state, lr=0.1, rank=2, update_gap=gap, side=side)
        after = [state[letter] for letter in "PQ" if letter in state]
        if not before or not all(map(torch.equal, before, after)):
            fresh.append(t)
    expected = [t for t in range(steps) if t % gap == 0]
    return MeasureResult(fresh == expected, f"of steps 0 to {steps - 1}, refreshed at {', '.join(map(str, fresh))}")


def _states(model: str, method: str, config: Config, also: list[str] | None) -> Counter[tuple[str, int, int]]:
    """Count the trainable tensors of each kind.

    The result maps (shape, elements of both moments, elements of the projector) to the number of such tensors.
    """
    return _counted(model, method, json.dumps(config), json.dumps(also or []))


@lru_cache(maxsize=256)  # claims differ in the bytes per number more often than in the tensors
def _counted(model: str, method: str, config: str, also: str) -> Counter[tuple[str, int, int]]:
    from harness.memory_model import equal_blocks
    from reference.galore import sides, state_elements

    built = attached_model.model(model)
    patterns = json.loads(also)

    def sizes(p: Any, group: Mapping[str, Any]) -> tuple[str, int, int]:
        shape, rank = "x".join(map(str, p.shape)), group.get("rank", 0)
        if not rank:
            return shape, 2 * p.numel(), 0
        m, n = p.shape
        left, right = sides(m, n, group["side"])
        projector = min(rank, m, n) * (m * left + n * right)
        return shape, state_elements(m, n, rank, group["side"]) - projector, projector

    def find() -> tuple[dict[str, tuple[str, int, int]]]:
        named = dict(built.named_parameters())
        own = [named[name] for name in fitting(named, patterns)]
        with attached_model.attached(built, method, json.loads(config)) as adapted:
            optimizer = adapted.optimizer(1e-3, 0.0)
            groups = [{"params": adapted.parameters()}] if optimizer is None else optimizer.param_groups
            names = {id(p): name for name, p in (*built.named_parameters(), *adapted.tensors().items())}
            trained = {id(p): (p, group) for group in [{"params": own}, *groups] for p in group["params"]}
            return ({names[key]: sizes(p, group) for key, (p, group) in trained.items()},)

    (of_names,) = equal_blocks.named_facts(built, find, fitting((n for n, _ in built.named_parameters()), patterns))
    return Counter(of_names.values())


def _gradient(rows: int, columns: int, seed: int) -> Any:
    import torch

    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _step(G: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Take one step of GaLore from a zero weight. Return the new weight and the optimizer's state. G: the gradient."""
    import torch

    from reference.galore import galore_step

    W, state = torch.zeros_like(G), dict[str, Any]()
    galore_step(W, G, state, lr=0.1, **options)
    return W, state


def _galore_numbers(rows: int, columns: int, rank: int) -> int:
    """Return how many numbers the weight and GaLore's state hold after a step."""
    state = _step(_gradient(rows, columns, 0), rank=rank, side="paper")[1]
    return rows * columns + sum(int(t.numel()) for name, t in state.items() if name != "step")


def _lora_numbers(rows: int, columns: int, rank: int) -> int:
    """Return how many numbers the weight, LoRA's two factors and their moments hold after a step of torch's AdamW."""
    import torch

    from harness.conformance.subject import attach_reference, configure

    model = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False))
    config = configure("lora", {"rank": rank, "targets": ("0",)})
    adapted = attach_reference("lora", model, config, None, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(adapted.parameters(), 0.1)
    model(torch.ones(1, columns)).sum().backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    return sum(t.numel() for t in (*model.parameters(), *moments))
