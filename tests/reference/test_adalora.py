"""AdaLoRA's reference against the paper's equations worked out by hand, and against HF peft over a whole schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import exact, noise_floor
from reference import adalora
from reference.adalora import Config, budget, largest_mask
from support.two_layer_model import Two, assert_same, draw, generator

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def attached(dtype: str = "float64", **config: Any) -> adalora.AdaLoraAdapted:
    given = {"rank": 4, "target_rank": 2, "alpha": 8.0, **config}
    return adalora.attach(Two(DTYPES[dtype]), Config(**given), generator(5))


@torch.no_grad()
def warmed(dtype: str = "float64", **config: Any) -> adalora.AdaLoraAdapted:
    adapted = attached(dtype, **config)
    for seed, tensor in enumerate(adapted.tensors().values(), start=20):
        tensor.copy_(draw(*tensor.shape, seed=seed))
    return adapted


@pytest.mark.parametrize(("rank", "alpha"), [(1, 2.0), (4, 8.0), (12, 0.5)])
def test_forward_is_equation_3_one_number_at_a_time(rank: int, alpha: float) -> None:
    layer = warmed(rank=rank, target_rank=1, alpha=alpha).layers["q_proj"]
    Q, lam, P = layer.A.detach(), layer.E.detach(), layer.B.detach()
    W, b, x = layer.base.weight.detach(), layer.base.bias.detach(), draw(5, 12)
    want = torch.empty(5, 10, dtype=torch.float64)
    for t in range(5):
        for e in range(10):
            total = float(b[e])
            for d in range(12):
                update = sum(float(P[e, i]) * float(lam[i, 0]) * float(Q[i, d]) for i in range(rank))
                total += (float(W[e, d]) + alpha / (rank + 0.00001) * update) * float(x[t, d])
            want[t, e] = total
    assert_same({"y": layer(x).detach()}, {"y": want})


def test_gradients_are_those_of_the_formula() -> None:
    layer = warmed().layers["q_proj"]
    x, dy = draw(5, 12).requires_grad_(True), draw(5, 10, seed=2)
    layer(x).backward(dy)
    s, A, E, B, X = 8 / (4 + 1e-5), layer.A.detach(), layer.E.detach()[:, 0], layer.B.detach(), x.detach()
    want = {
        "x": dy @ layer.base.weight.detach() + s * torch.einsum("te,ek,k,kd->td", dy, B, E, A),
        "A": s * torch.einsum("te,ek,k,td->kd", dy, B, E, X),
        "E": s * torch.einsum("te,ek,kd,td->k", dy, B, A, X)[:, None],
        "B": s * torch.einsum("te,k,kd,td->ek", dy, E, A, X),
    }
    assert_same({"x": x.grad, "A": layer.A.grad, "E": layer.E.grad, "B": layer.B.grad}, want)
    assert layer.base.weight.grad is None
    inputs = (draw(2, 2, 12).requires_grad_(True), layer.A, layer.E, layer.B)
    assert torch.autograd.gradcheck(lambda x, A, E, B: layer(x), inputs)


@every_dtype
def test_at_the_start_the_model_is_the_base_model_and_only_the_lambdas_have_a_gradient(dtype: str) -> None:
    x = draw(5, 12, dtype=DTYPES[dtype])
    adapted = attached(dtype)
    y = adapted.model(x)
    assert torch.equal(y, Two(DTYPES[dtype]).requires_grad_(False)(x))
    y.square().sum().backward()
    assert {n: bool(t.grad.any()) for n, t in adapted.tensors().items()} == {
        f"{path}.{name}": name == "E" for path in ("q_proj", "v_proj") for name in "AEB"
    }
    trains = [p for p in adapted.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trains) == 4 * (12 + 10 + 1) + 4 * (10 + 7 + 1)


@pytest.mark.parametrize("name", ["A", "B"])
def test_a_and_b_start_normal_with_the_authors_spread(name: str) -> None:
    model = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 200))
    adapted = adalora.attach(model, Config(rank=100, targets=("0", "1")), generator())
    first, second = (adapted.tensors()[f"{i}.{name}"].detach().double().flatten() / 0.02 for i in (0, 1))
    assert not torch.equal(first[:100], second[:100])
    for values in (first.sort().values, second.sort().values):
        # Kolmogorov's statistic against the normal; 1.95 / sqrt(n) is passed by chance once in a thousand.
        expected = (1 + torch.erf(values / math.sqrt(2))) / 2
        observed = torch.arange(1, len(values) + 1) / len(values)
        assert float((expected - observed).abs().max()) < 1.95 / math.sqrt(len(values))


def test_every_dtype_starts_from_the_same_numbers() -> None:
    truth = attached().tensors()
    for dtype in DTYPES:
        assert exact(attached(dtype).tensors(), {n: t.to(DTYPES[dtype]) for n, t in truth.items()}).passed


@every_dtype
def test_merged_is_unmerged_and_unmerging_leaves_every_bit(dtype: str) -> None:
    adapted = warmed(dtype)
    held = {n: t.clone() for n, t in adapted.model.state_dict().items()}
    x = draw(9, 12, dtype=DTYPES[dtype])
    layer = adapted.layers["q_proj"]
    W, s = layer.base.weight.detach().double(), 8 / (4 + 1e-5)
    dense = W + s * layer.B.detach().double() @ (layer.E.detach().double() * layer.A.detach().double())
    want = {"y": x.double() @ dense.T + layer.base.bias.detach().double()}
    rounded = {"y": layer(x).detach()}
    adapted.merge()
    assert type(adapted.model.q_proj) is nn.Linear
    judged = noise_floor({"y": adapted.model.q_proj(x)}, want, rounded, dtype)
    assert judged.passed, judged
    adapted.unmerge()
    assert exact(adapted.model.state_dict(), held).passed
    adapted.detach()
    assert exact(adapted.model.state_dict(), Two(DTYPES[dtype]).state_dict()).passed


def test_dropout_touches_the_adapter_alone() -> None:
    layer = attached(dropout=0.5).layers["q_proj"].train()
    x = torch.ones(1, 12, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base(x))  # Lambda is zero
    with torch.no_grad():
        for tensor in (layer.A, layer.B, layer.base.weight, layer.base.bias):
            tensor.zero_()
        layer.A[:, :4], layer.B[:4] = torch.eye(4), torch.eye(4)
        layer.E.fill_(1.0)
    seen: set[float] = set()
    for seed in range(20):
        torch.manual_seed(seed)
        seen |= set(layer(x)[0, :4].tolist())
    assert seen == {0.0, 2 * layer.scaling}
    assert layer.eval()(x)[0, :4].tolist() == [layer.scaling] * 4


def test_three_steps_of_the_averages_equal_a_worked_example() -> None:
    # beta1 = 3/4, beta2 = 1/4: every number is exact in binary.
    w, beta1, beta2 = torch.tensor(2.0), 0.75, 0.25
    I_bar = U_bar = torch.tensor(0.0)
    seen = []
    for grad in (3.0, -1.0, 2.0):
        I = adalora.sensitivity(w, torch.tensor(grad))  # noqa: E741
        I_bar = adalora.smoothed(I_bar, I, beta1)
        U_bar = adalora.uncertainty(U_bar, I, I_bar, beta2)
        seen.append((float(I), float(I_bar), float(U_bar), float(adalora.importance(I_bar, U_bar))))
    assert seen == [
        (6.0, 1.5, 3.375, 5.0625),  # 6/4; 3/4 |6 - 1.5|
        (2.0, 1.625, 1.125, 1.828125),  # 3/4 1.5 + 2/4; 3.375/4 + 3/4 |2 - 1.625|
        (4.0, 2.21875, 1.6171875, 3.588134765625),  # 3/4 1.625 + 4/4; 1.125/4 + 3/4 |4 - 2.21875|
    ]


@every_dtype
def test_three_steps_through_the_layer(dtype: str) -> None:
    adapted = attached(dtype, beta1=0.75, beta2=0.25)
    for step, grad in enumerate((3.0, -1.0, 2.0), start=1):
        for tensor in adapted.tensors().values():
            tensor.data.fill_(2.0)  # scored as it is after the optimizer's step
            tensor.grad = torch.full_like(tensor, grad)
        adapted.after_step(step)
    state = adapted.state()
    kinds = ("exp_avg_ipt", "exp_avg_unc")
    names = {f"{path}.{kind}_{n}" for path in ("q_proj", "v_proj") for kind in kinds for n in "AEB"}
    assert set(state) == names | {"q_proj.mask", "v_proj.mask"}
    for name, tensor in state.items():
        want = True if "mask" in name else 2.21875 if "ipt" in name else 1.6171875
        assert torch.equal(tensor, torch.full_like(tensor, want)), name
        if "mask" not in name:
            assert tensor.dtype == (torch.float64 if dtype == "float64" else torch.float32), name
    # equal everywhere, so each mean is that number: s(lambda) + mean s(P column) + mean s(Q row)
    assert torch.equal(adapted.adalora["q_proj"].scores().double(), torch.full((4,), 3 * 3.588134765625).double())


def test_small_gradients_still_score_in_half_precision() -> None:
    adapted = attached("float16")
    for tensor in adapted.tensors().values():
        tensor.data.fill_(2.0**-8)
        tensor.grad = torch.full_like(tensor, 2.0**-14)
    adapted.after_step(1)
    assert bool((adapted.adalora["q_proj"].scores() > 0).all())


def test_a_weight_that_the_loss_does_not_reach_has_no_importance() -> None:
    adapted = warmed()
    adapted.model.q_proj(draw(5, 12)).square().sum().backward()
    adapted.after_step(1)
    assert bool(adapted.adalora["q_proj"].scores().all())
    assert not bool(adapted.adalora["v_proj"].scores().any())


def test_a_triplets_score_in_a_worked_example() -> None:
    s_A = torch.tensor([[1.0, 2.0, 6.0, 7.0], [0.0, 0.0, 0.0, 8.0]])  # means of rows 4, 2
    s_E = torch.tensor([[0.5], [0.25]])
    s_B = torch.tensor([[3.0, 10.0], [5.0, 20.0]])  # means of columns 4, 15
    assert adalora.triplet_scores(s_A, s_E, s_B).tolist() == [8.5, 17.25]


def test_the_budget_of_a_worked_example() -> None:
    config = Config(rank=12, target_rank=4, tinit=10, tfinal=20, total_steps=130)
    # 5 layers: from 60 to 20; of the 100 steps between, after 25 (3/4)^3 of 40 is left over the target: 16.875
    known = {0: 60, 10: 60, 11: 58, 35: 36, 60: 25, 85: 20, 90: 20, 109: 20, 110: 20, 111: 20, 130: 20, 999: 20}
    assert {step: budget(step, config, 5) for step in known} == known


SCHEDULES = [
    Config(rank=12, target_rank=8, tinit=0, tfinal=0, total_steps=10),
    Config(rank=3, target_rank=1, tinit=5, tfinal=3, total_steps=40),
    Config(rank=100, target_rank=50, tinit=7, tfinal=0, total_steps=17),
    Config(rank=12, target_rank=8, tinit=100, tfinal=200, total_steps=1000),
    Config(rank=8, target_rank=8, tinit=1, tfinal=1, total_steps=9),
]


@pytest.mark.parametrize("config", SCHEDULES)
@pytest.mark.parametrize("layers", [1, 20, 72])
def test_the_budget_is_an_integer_and_falls_from_start_to_target(config: Config, layers: int) -> None:
    budgets = [budget(t, config, layers) for t in range(config.total_steps + 1)]
    assert all(type(b) is int for b in budgets)
    assert budgets == sorted(budgets, reverse=True)
    assert set(budgets[: config.tinit + 1]) == {config.rank * layers}
    assert set(budgets[config.total_steps - config.tfinal :]) == {config.target_rank * layers}


@pytest.mark.parametrize("config", SCHEDULES)
@pytest.mark.parametrize("layers", [1, 20, 72])
def test_the_budget_is_pefts(config: Config, layers: int) -> None:
    theirs = SimpleNamespace(
        init_bgt=config.rank * layers,
        target_bgt=config.target_rank * layers,
        peft_config=SimpleNamespace(
            tinit=config.tinit, tfinal=config.tfinal, total_step=config.total_steps, deltaT=config.delta_t
        ),
    )
    for t in range(config.total_steps + 1):
        assert budget(t, config, layers) == RankAllocator.budget_schedule(theirs, t)[0], t


def test_ties_do_not_change_the_number_of_triplets() -> None:
    assert largest_mask(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2).tolist() == [False, True, False, True]
    assert largest_mask(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2).tolist() == [False, True, True, False, False]
    for count in range(7):
        assert largest_mask(torch.zeros(6), count).tolist() == [i < count for i in range(6)]
    many = torch.zeros(5000)  # more than an unstable sort leaves in order
    assert largest_mask(many, 1234).nonzero().flatten().tolist() == list(range(1234))


def test_peft_prunes_all_ties() -> None:
    model = peft_model(total_step=10)
    allocator = model.base_model.rankallocator
    for n, p in model.named_parameters():
        if "lora_" in n:
            allocator.exp_avg_ipt[n], allocator.exp_avg_unc[n] = torch.ones_like(p), torch.ones_like(p)
    kept = allocator.mask_to_budget(model, 5)
    assert sum(map(sum, kept.values())) == 0  # asked for 5 of 8
    assert int(largest_mask(torch.ones(8), 5).sum()) == 5


def scored(adapted: adalora.AdaLoraAdapted, order: list[int]) -> None:
    """Give the 8 triplets of both layers gradients that score them in this order, best first, and lambdas of 1."""
    importance = torch.zeros(8, dtype=torch.float64)
    importance[order] = torch.arange(8, 0, -1, dtype=torch.float64)
    for layer, grads in zip(adapted.adalora.values(), importance.split(4), strict=True):
        for tensor in layer.tensors().values():
            tensor.data.fill_(1.0)
            tensor.grad = torch.zeros_like(tensor)
        layer.E.grad = grads[:, None].clone()


def lambdas(adapted: adalora.AdaLoraAdapted) -> list[int]:
    return [int(v) for layer in adapted.adalora.values() for v in layer.E[:, 0]]


def test_masks_over_a_whole_schedule() -> None:
    # 8 triplets to 4: tinit 2, prune at 4, 6 and 8 (the end of 10 - 2), then the mask of 8 stays.
    adapted = attached(tinit=2, tfinal=2, total_steps=10, delta_t=2)
    order = [7, 0, 6, 1, 5, 2, 4, 3]
    seen, averages = {}, {}
    for step in range(1, 11):
        scored(adapted, order if step < 8 else order[::-1])
        adapted.after_step(step)
        seen[step], averages[step] = lambdas(adapted), {n: t.clone() for n, t in adapted.state().items()}
    assert exact(averages[10], averages[8]).passed  # the final phase scores no more, and 8 prunes by the scores of 7
    assert not exact(averages[7], averages[6]).passed
    config = adapted.config
    assert [budget(t, config, 2) for t in (4, 6, 8)] == [5, 4, 4]
    every = [1] * 8
    at_4, at_6 = ([int(i in order[:b]) for i in range(8)] for b in (5, 4))
    # pruned lambdas are back at 5 and 7 (our optimizer sets them to 1), and never after 8
    assert seen == {1: every, 2: every, 3: every, 4: at_4, 5: every, 6: at_6, 7: every, 8: at_6, 9: at_6, 10: at_6}
    assert adapted.ranks() == {"q_proj": 2, "v_proj": 2}
    assert sum(adapted.ranks().values()) == config.target_rank * 2


def test_the_last_mask_is_forced_where_delta_t_does_not_divide() -> None:
    adapted = attached(tinit=0, tfinal=0, total_steps=5, delta_t=4)
    ranks = []
    for step in range(1, 6):
        scored(adapted, [3, 2, 1, 0, 7, 6, 5, 4])
        adapted.after_step(step)
        ranks.append(adapted.ranks())
    assert ranks == [{"q_proj": 4, "v_proj": 4}] * 3 + [{"q_proj": 4, "v_proj": 0}] * 2


def test_a_target_of_the_initial_rank_prunes_nothing() -> None:
    adapted = attached(rank=4, target_rank=4, tinit=0, tfinal=1, total_steps=4, delta_t=1)
    for step in range(1, 5):
        scored(adapted, list(range(8)))
        adapted.after_step(step)
        assert lambdas(adapted) == [1] * 8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 4, "target_rank": 5}, "target_rank 5 is above rank 4"),
        ({"tinit": 600, "tfinal": 400}, "leave no step of total_steps 1000"),
        ({"targets": ("k_proj",)}, "no linear, Conv1D or Conv2d layer is named 'k_proj'"),
    ],
)
def test_invalid_configs_leave_the_model_unchanged(config: dict[str, Any], message: str) -> None:
    model = Two()
    with pytest.raises(ValueError, match=message):
        adalora.attach(model, replace(Config(), **config), generator())
    assert type(model.q_proj) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def grams(adapted: adalora.AdaLoraAdapted) -> Iterator[Tensor]:
    for layer in adapted.adalora.values():
        for M in (layer.A, layer.B.T):
            yield torch.tensor(
                [
                    [sum(float(a * b) for a, b in zip(M[i], M[j], strict=True)) - (i == j) for j in range(4)]
                    for i in range(4)
                ],
                dtype=torch.float64,
            )


def test_the_regularizer_of_a_worked_example() -> None:
    squares = [sum(float(v) ** 2 for v in gap.flatten()) for gap in grams(warmed())]
    want = {"squared-sum": 0.25 * sum(squares), "mean-norm": 0.25 * sum(map(math.sqrt, squares)) / 4}
    for form, value in want.items():
        have = warmed(orthogonality=0.25, regularization=form).regularizer()
        assert_same({"R": have.detach()}, {"R": torch.tensor(value, dtype=torch.float64)})
    assert warmed(orthogonality=0.0).regularizer() is None


@pytest.mark.parametrize("form", ["mean-norm", "squared-sum"])
def test_the_regularizers_gradient(form: str) -> None:
    adapted = warmed(regularization=form)
    adapted.regularizer().backward()
    assert {n: t.grad is not None for n, t in adapted.tensors().items()} == {
        f"{path}.{name}": name != "E" for path in ("q_proj", "v_proj") for name in "AEB"
    }
    tensors = [t for n, t in adapted.tensors().items() if not n.endswith("E")]
    assert torch.autograd.gradcheck(lambda *_: adapted.regularizer(), tensors)
    with torch.no_grad():
        for layer in adapted.adalora.values():
            layer.A.copy_(torch.eye(*layer.A.shape))
            layer.B.copy_(torch.eye(*layer.B.shape))
    at_rest = adapted.regularizer()
    assert float(at_rest) == 0.0
    assert not any(bool(g.any()) for g in torch.autograd.grad(at_rest, tensors))  # orthonormal: nothing pulls, no NaN


def peft_model(**config: Any) -> Any:
    given = {"init_r": 4, "target_r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
    return get_peft_model(Two(), AdaLoraConfig(**given))


def theirs(model: Any) -> dict[str, nn.Parameter]:
    """Map our names to peft's parameters."""
    names = {f"{p}.{n}": f"base_model.model.{p}.lora_{n}.default" for p in ("q_proj", "v_proj") for n in "AEB"}
    parameters = dict(model.named_parameters())
    return {ours: parameters[name] for ours, name in names.items()}


def test_peft_has_the_same_initial_range_and_counts() -> None:
    mine, other = attached().tensors(), theirs(peft_model(total_step=10))
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in other.items()}
    assert {n for n, t in mine.items() if not bool(t.any())} == {n for n, t in other.items() if not bool(t.any())}


@pytest.mark.parametrize(("tinit", "tfinal", "delta_t"), [(0, 0, 1), (3, 4, 2), (2, 5, 3)])
def test_peft_prunes_the_same_over_a_whole_schedule(tinit: int, tfinal: int, delta_t: int) -> None:
    # Each step from one state (peft's), so that rounding does not pile up; in float64 the masks must be equal.
    T, model = 15, peft_model(total_step=15, tinit=tinit, tfinal=tfinal, deltaT=delta_t, beta1=0.7, beta2=0.6)
    schedule = {"tinit": tinit, "tfinal": tfinal, "delta_t": delta_t, "total_steps": T, "beta1": 0.7, "beta2": 0.6}
    mine, other, pruned = attached(**schedule), theirs(model), 0
    allocator = model.base_model.rankallocator
    with torch.no_grad():
        for tensor in (t for n, t in other.items() if n.endswith("E")):
            tensor.copy_(draw(*tensor.shape, seed=31))
    sgd = {id(tensors): torch.optim.SGD(tensors.values(), lr=0.05) for tensors in (mine.tensors(), other)}
    mine_sgd, other_sgd = sgd.values()
    for step in range(1, T + 1):
        with torch.no_grad():
            for name, tensor in mine.tensors().items():
                tensor.copy_(other[name])
        x, y = draw(6, 12, seed=100 + step), draw(6, 7, seed=200 + step)
        out, out_other = mine.model(x), model(x)
        assert_same({"y": out.detach()}, {"y": out_other.detach()})
        for optimizer, found in ((mine_sgd, out), (other_sgd, out_other)):
            optimizer.zero_grad()
            (found - y).square().mean().backward()
            optimizer.step()
        mine.after_step(step)
        model.base_model.update_and_allocate(step)
        assert_same({n: t.detach() for n, t in mine.tensors().items()}, {n: t.detach() for n, t in other.items()})
        zeros = {n: (t == 0).tolist() for n, t in other.items() if n.endswith("E")}
        assert {n: (t == 0).tolist() for n, t in mine.tensors().items() if n.endswith("E")} == zeros
        pruned += sum(v[0] for rows in zeros.values() for v in rows)
        if step < T - tfinal:  # peft forgets them at the end
            for path in ("q_proj", "v_proj"):
                for n in "AEB":
                    key = next(k for k in allocator.exp_avg_unc if k.endswith(f"{path}.lora_{n}.default"))
                    assert_same({n: mine.state()[f"{path}.exp_avg_unc_{n}"]}, {n: allocator.exp_avg_unc[key]})
    assert pruned > 0
    assert sum(mine.ranks().values()) == 4


def test_peft_has_the_mean_of_norms() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Two()

        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(loss=self.inner(x).square().mean())

    names = ["q_proj", "v_proj"]
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, orth_reg_weight=0.25, target_modules=names)
    model, x = get_peft_model(Loss(), config), draw(5, 12)
    other = {
        f"{p}.{n}": dict(model.named_parameters())[f"base_model.model.inner.{p}.lora_{n}.default"]
        for p in names
        for n in "AEB"
    }
    mine = attached(orthogonality=0.25)
    with torch.no_grad():
        for seed, (name, tensor) in enumerate(mine.tensors().items(), start=60):
            tensor.copy_(draw(*tensor.shape, seed=seed) * (not name.endswith("E")))
            other[name].copy_(tensor)
    plain = Two()(x).square().mean().detach()
    # Through AdaLoraModel: the PeftModel around it, made without a task_type, leaves the term out.
    assert_same({"loss": (plain + mine.regularizer()).detach()}, {"loss": model.base_model(x).loss.detach()})
