"""LoKr's reference against the paper's formula written out by hand, and against HF peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import exact, noise_floor
from harness.conformance.subject import DTYPES, configure, warm
from reference import lokr
from reference.shared.layers import dense_copy
from support.two_layer_model import Two, assert_same, draw, generator

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
SETTINGS = [
    {"rank": 1, "alpha": 8.0},
    {"rank": 2, "alpha": 5.0, "factor": 2},
    {"rank": 16, "alpha": 4.0, "init": "lycoris"},
    {"rank": 1, "alpha": 2.0, "factor": 1},
]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def attached(dtype: str = "float64", model: nn.Module | None = None, **config: Any) -> Any:
    given = configure("lokr", {"rank": 2, "alpha": 5.0, **config})
    return lokr.attach(Two(DTYPES[dtype]) if model is None else model, given, generator(5))


def warmed(dtype: str = "float64", **config: Any) -> Any:
    adapted = attached(dtype, **config)
    warm(adapted.tensors(), generator(6))
    return adapted


def update_by_formula(layer: lokr.LokrLinear, scaling: float) -> Tensor:
    """gamma C kron (B A) of eq. 4, one number at a time."""
    tensors = {name: t.detach() for name, t in layer.tensors().items()}
    C, block = tensors["C"], tensors["W2"] if "W2" in tensors else tensors["B"] @ tensors["A"]
    V_E, V_D = block.shape
    rows, columns = len(C) * V_E, C.shape[1] * V_D
    made = [
        [scaling * float(C[e // V_E, d // V_D]) * float(block[e % V_E, d % V_D]) for d in range(columns)]
        for e in range(rows)
    ]
    return torch.tensor(made, dtype=torch.float64)


@pytest.mark.parametrize(
    ("size", "factor", "pair"),
    [
        (1024, -1, (32, 32)), (768, -1, (24, 32)), (127, -1, (1, 127)), (768, 8, (8, 96)), (768, 7, (6, 128)),
        (12, 4, (3, 4)), (128, 64, (8, 16)), (1, -1, (1, 1)), (320, 1, (1, 320)),
    ],
)  # fmt: skip
def test_sizes_are_divided_by_equation_5(size: int, factor: int, pair: tuple[int, int]) -> None:
    assert lokr.divided(size, factor) == pair


@every_setting
@pytest.mark.parametrize("path", ["q_proj", "v_proj"])
def test_forward_is_the_papers_formula(settings: dict[str, Any], path: str) -> None:
    layer = warmed(**settings).layers[path]
    x = draw(5, layer.base.in_features)
    want = layer.base(x) + x @ update_by_formula(layer, settings["alpha"] / settings["rank"]).T
    assert_same({"y": layer(x).detach()}, {"y": want.detach()})


def test_a_small_example_is_exact() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64))
    layer = attached(model=model, rank=1, alpha=2.0, targets=("0",)).layers["0"]
    values = {
        layer.base.weight: torch.zeros(4, 4),
        layer.C: torch.tensor([[1.0, 2.0], [0.0, -1.0]]),
        layer.right["W2"]: torch.tensor([[1.0, 0.0], [3.0, 5.0]]),
    }
    with torch.no_grad():
        for tensor, value in values.items():
            tensor.copy_(value)
    assert layer.merged().weight.tolist() == [
        [2.0, 0.0, 4.0, 0.0],
        [6.0, 10.0, 12.0, 20.0],
        [0.0, 0.0, -2.0, 0.0],
        [0.0, 0.0, -6.0, -10.0],
    ]


def test_the_right_block_is_decomposed_below_half_of_its_larger_side() -> None:
    # q_proj maps 12 = 3 x 4 to 10 = 2 x 5, so that the right block is 5 x 4.
    assert {n: tuple(t.shape) for n, t in attached(rank=2).layers["q_proj"].tensors().items()} == {
        "C": (2, 3), "B": (5, 2), "A": (2, 4),
    }  # fmt: skip
    assert {n: tuple(t.shape) for n, t in attached(rank=3).layers["q_proj"].tensors().items()} == {
        "C": (2, 3), "W2": (5, 4),
    }  # fmt: skip


@every_setting
def test_autograd_agrees_with_finite_differences(settings: dict[str, Any]) -> None:
    layer = warmed(**settings).layers["q_proj"]
    inputs = (draw(2, 12).requires_grad_(True), *layer.tensors().values())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), inputs)


@every_dtype
@every_setting
def test_at_the_start_the_model_is_the_base_model(settings: dict[str, Any], dtype: str) -> None:
    x = draw(5, 12, dtype=DTYPES[dtype])
    want = Two(DTYPES[dtype]).requires_grad_(False)(x)
    adapted = attached(dtype, **settings)
    assert torch.equal(adapted.model(x), want)
    adapted.model(x).square().sum().backward()
    zero = {"C"} if settings.get("init", "peft") == "peft" else {"A", "W2"}
    for name, tensor in adapted.tensors().items():  # only the block that is zero learns in the first step
        assert bool(tensor.grad.any()) == (name.rpartition(".")[2] in zero), name


@every_setting
def test_tensors_and_numbers_are_those_of_peft(settings: dict[str, Any]) -> None:
    """Load our tensors into peft's layer; both updates must be equal."""
    peft = pytest.importorskip("peft")
    mine = warmed(**settings)
    config = peft.LoKrConfig(
        r=settings["rank"], alpha=settings["alpha"], decompose_factor=settings.get("factor", -1),
        init_weights="lycoris" if "init" in settings else True, target_modules=["q_proj", "v_proj"],
    )  # fmt: skip
    theirs = peft.get_peft_model(Two(), config).base_model.model
    for path, layer in mine.layers.items():
        other = theirs.get_submodule(path)
        places = {"C": other.lokr_w1, "B": other.lokr_w2_a, "A": other.lokr_w2_b, "W2": other.lokr_w2}
        assert layer.tensors().keys() == {name for name, part in places.items() if "default" in part}
        for name, tensor in layer.tensors().items():
            places[name]["default"].data.copy_(tensor.detach())
        assert_same({"update": other.get_delta_weight("default").detach()}, {"update": layer.delta().detach()})


def test_peft_takes_a_factor_above_the_square_root() -> None:
    """The deviation that the reference states, and for which hf-peft raises Unsupported."""
    layer = pytest.importorskip("peft.tuners.lokr.layer")
    assert layer.factorization(128, 64) == (64, 2)
    assert lokr.divided(128, 64) == (8, 16)


@every_dtype
@every_setting
def test_merged_is_unmerged(settings: dict[str, Any], dtype: str) -> None:
    adapted = warmed(dtype, **settings)
    for path, layer in adapted.layers.items():
        x = draw(9, layer.base.in_features, dtype=DTYPES[dtype])
        tensors = {name: t.detach().double() for name, t in layer.tensors().items()}
        base = dense_copy(layer.base).double()
        want = lokr.LokrLinear(base, tensors.pop("C"), tensors, layer.scaling, 0.0)(x.double()).detach()
        before = layer(x).detach()
        adapted.merge()
        merged = adapted.model.get_submodule(path)
        assert type(merged) is nn.Linear
        judged = noise_floor({"y": merged(x).detach()}, {"y": want}, {"y": before}, dtype)
        assert judged.passed, judged
        adapted.unmerge()
        assert torch.equal(adapted.model.get_submodule(path)(x), before)


def test_merging_and_detaching_leave_every_bit_of_the_base() -> None:
    adapted = warmed("bfloat16")
    before = {n: t.clone() for n, t in adapted.model.state_dict().items()}
    adapted.merge()
    adapted.unmerge()
    assert exact(adapted.model.state_dict(), before).passed
    adapted.detach()
    assert exact(adapted.model.state_dict(), Two(torch.bfloat16).state_dict()).passed


def test_values_in_another_layout_change_nothing() -> None:
    """torch.kron raises for some layouts, and so does HF peft."""
    layer = warmed().layers["q_proj"]
    x = draw(5, layer.base.in_features)
    before = layer(x)
    for tensor in layer.tensors().values():
        tensor.data = tensor.data.T.contiguous().T
    assert torch.equal(layer(x), before)
