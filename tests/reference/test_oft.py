"""OFT's reference against the papers' formulas written out by hand, and against HF peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import exact, noise_floor
from harness.conformance.subject import DTYPES, configure, warm
from reference import oft
from reference.shared.layers import dense_copy
from support.two_layer_model import Two, assert_same, draw, generator

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
SETTINGS: list[dict[str, Any]] = [{"cayley": "exact"}, {"terms": 5}, {"terms": 2}, {"terms": 9}]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def attached(dtype: str = "float64", model: nn.Module | None = None, **config: Any) -> Any:
    given = configure("oft", {"block_size": 4, **config})
    return oft.attach(Two(DTYPES[dtype]) if model is None else model, given, generator(5))


def warmed(dtype: str = "float64", **config: Any) -> Any:
    adapted = attached(dtype, **config)
    warm(adapted.tensors(), generator(6))
    return adapted


def block_by_formula(packed: list[float], size: int, cayley: str, terms: int) -> Tensor:
    """R_i of the papers, from the numbers above the diagonal of Q_i, row by row."""
    Q, numbers = torch.zeros(size, size, dtype=torch.float64), iter(packed)
    for row in range(size):
        for column in range(row + 1, size):
            Q[row, column] = next(numbers)
            Q[column, row] = -Q[row, column]
    one = torch.eye(size, dtype=torch.float64)
    if cayley == "exact":
        return (one + Q) @ torch.linalg.inv(one - Q)
    return (one + Q) @ sum((torch.linalg.matrix_power(Q, power) for power in range(1, terms - 1)), start=one)


def rotation_by_formula(layer: oft.OftLinear, cayley: str = "neumann", terms: int = 5) -> Tensor:
    """R = diag(R_1, ..., R_n), shape (D, D)."""
    return torch.block_diag(*(block_by_formula(row, layer.size, cayley, terms) for row in layer.Q.detach().tolist()))


@every_setting
@pytest.mark.parametrize("path", ["q_proj", "v_proj"])
def test_forward_is_the_papers_formula(settings: dict[str, Any], path: str) -> None:
    layer = warmed(**settings).layers[path]
    x = draw(5, layer.base.in_features)
    want = layer.base(x @ rotation_by_formula(layer, **settings))  # rows x, so that x R is R^T x
    assert_same({"y": layer(x).detach()}, {"y": want.detach()})


def test_a_small_example_is_exact() -> None:
    """A block of two with Q = [[0, 1], [-1, 0]] turns by 90 degrees: (I + Q) (I - Q)^-1 = Q."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False, dtype=torch.float64))
    layer = attached(model=model, block_size=2, cayley="exact", targets=("0",)).layers["0"]
    with torch.no_grad():
        layer.base.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.Q.fill_(1.0)
    assert layer.rotation().tolist() == [[[0.0, 1.0], [-1.0, 0.0]]]
    assert layer.merged().weight.tolist() == [[2.0, -1.0], [4.0, -3.0]]  # W0 R^T
    assert layer(torch.tensor([[1.0, 10.0]], dtype=torch.float64)).tolist() == [[-8.0, -26.0]]


@pytest.mark.parametrize("size", [2, 5, 12])
def test_the_exact_form_is_orthogonal_and_keeps_angles(size: int) -> None:
    model = nn.Sequential(nn.Linear(60, 20, dtype=torch.float64))
    adapted = attached(model=model, block_size=size, cayley="exact", targets=("0",))
    warm(adapted.tensors(), generator(6))
    layer = adapted.layers["0"]
    R = layer.rotation().detach()
    one = torch.eye(size, dtype=torch.float64).expand_as(R)
    assert_same({"R": R.mT @ R, "det": torch.linalg.det(R)}, {"R": one, "det": torch.ones(len(R)).double()})
    assert not torch.equal(R, one)
    W, rotated = layer.base.weight.detach(), layer.merged().weight
    assert_same({"angles": rotated @ rotated.T}, {"angles": W @ W.T})


def test_the_series_comes_nearer_to_the_exact_form_with_every_term() -> None:
    layer = warmed(block_size=6, cayley="exact").layers["q_proj"]
    with torch.no_grad():
        layer.Q.mul_(0.2)
    exact_R = layer.rotation().detach()
    layer.cayley, errors = "neumann", []
    for terms in range(2, 12):
        layer.terms = terms
        errors.append(float((layer.rotation().detach() - exact_R).norm()))
    assert errors == sorted(errors, reverse=True)
    layer.terms = 64
    assert_same({"R": layer.rotation().detach()}, {"R": exact_R})


@every_setting
def test_autograd_agrees_with_finite_differences(settings: dict[str, Any]) -> None:
    layer = warmed(**settings).layers["q_proj"]
    assert torch.autograd.gradcheck(lambda x, Q: layer(x), (draw(2, 12).requires_grad_(True), layer.Q))


@every_dtype
@every_setting
def test_at_the_start_the_model_is_the_base_model(settings: dict[str, Any], dtype: str) -> None:
    x = draw(5, 12, dtype=DTYPES[dtype])
    want = Two(DTYPES[dtype]).requires_grad_(False)(x)
    adapted = attached(dtype, **settings)
    assert torch.equal(adapted.model(x), want)
    adapted.model(x).square().sum().backward()
    assert all(bool(tensor.grad.any()) for tensor in adapted.tensors().values())


def test_the_block_is_the_largest_divisor_up_to_the_given_size() -> None:
    assert [oft.block_of(12, size) for size in (2, 4, 5, 11, 12, 32)] == [2, 4, 4, 6, 12, 12]
    model = nn.Sequential(nn.Linear(7, 4))
    with pytest.raises(ValueError, match=r"^0: 7 input features cannot .* blocks of 2 to 4; leave it out of targets"):
        attached(model=model, targets=("0",))
    assert model[0].weight.requires_grad


def test_it_trains_half_of_each_block() -> None:
    adapted = attached(block_size=4)  # q_proj has 12 inputs, v_proj 10, which 4 does not divide
    assert {name: tuple(t.shape) for name, t in adapted.tensors().items()} == {"q_proj.Q": (3, 6), "v_proj.Q": (5, 1)}
    trains = [p for p in adapted.model.parameters() if p.requires_grad]
    assert {id(p) for p in trains} == {id(p) for p in adapted.parameters()}


def update_of_peft(packed: Tensor, **options: Any) -> Tensor:
    """Return R of peft's OFT with these numbers, shape (D, D)."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(12, 10, bias=False, dtype=torch.float64))
    config = peft.OFTConfig(r=0, oft_block_size=4, target_modules=["0"], **options)
    layer = peft.get_peft_model(model, config).base_model.model[0]
    layer.oft_R["default"].weight.data = packed.clone()
    found: Tensor = layer.get_delta_weight("default").detach()
    return found


def test_peft_has_the_series_of_the_paper_and_the_inverse_of_its_exact_form() -> None:
    mine = warmed().layers["q_proj"]
    packed = mine.Q.detach()
    for terms in (4, 5, 8):
        found = update_of_peft(packed, use_cayley_neumann=True, num_cayley_neumann_terms=terms)
        assert_same({"R": found}, {"R": rotation_by_formula(mine, terms=terms)})
    found = update_of_peft(packed, use_cayley_neumann=False)
    assert_same({"R": found}, {"R": rotation_by_formula(mine, "exact").T})


@every_dtype
@every_setting
def test_merged_is_unmerged(settings: dict[str, Any], dtype: str) -> None:
    adapted = warmed(dtype, **settings)
    for path, layer in adapted.layers.items():
        x = draw(9, layer.base.in_features, dtype=DTYPES[dtype])
        base, Q = dense_copy(layer.base).double(), layer.Q.detach().double()
        want = oft.OftLinear(base, Q, layer.size, layer.cayley, layer.terms)(x.double()).detach()
        before = layer(x).detach()
        adapted.merge()
        merged = adapted.model.get_submodule(path)
        assert type(merged) is nn.Linear
        judged = noise_floor({"y": merged(x).detach()}, {"y": want}, {"y": before}, dtype)
        assert judged.passed, judged
        adapted.unmerge()
        assert torch.equal(adapted.model.get_submodule(path)(x), before)


def test_merging_decodes_a_packed_weight_once() -> None:
    class Packed(nn.Linear):  # any subclass counts as packed
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    base = Packed(12, 10, dtype=torch.float64)
    adapted = attached(model=nn.Sequential(base), targets=("0",))
    adapted.merge()
    assert base.calls == 1
    assert torch.equal(adapted.model[0].weight, base.weight)


def test_merging_and_detaching_leave_every_bit_of_the_base() -> None:
    adapted = warmed("bfloat16")
    before = {n: t.clone() for n, t in adapted.model.state_dict().items()}
    adapted.merge()
    adapted.unmerge()
    assert exact(adapted.model.state_dict(), before).passed
    adapted.detach()
    assert exact(adapted.model.state_dict(), Two(torch.bfloat16).state_dict()).passed
