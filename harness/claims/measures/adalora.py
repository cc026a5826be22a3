"""Measures: AdaLoRA's budget, schedule and scores, by the reference (`reference/adalora.py`) and by direct calculation.

A triplet is one singular value (lambda) of an update with its two vectors."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from typing import Any, Literal

from harness.claims import attached_model
from harness.claims.measure import MeasureResult, Model, Positive, measure


@measure("count")
def kept_parameters(model: Model, targets: list[str], rank: Positive, budget: Positive) -> MeasureResult:
    """Number of parameters in AdaLoRA's triplets that remain after pruning.

    A triplet is one singular value (lambda) with its two vectors. rank: number of triplets of each layer before
    pruning. budget: number of triplets of the whole model after pruning. Triplets of different layers may differ in
    size, so the result is a range over all choices of the remaining triplets.
    """
    config = {"rank": 1, "target_rank": 1, "targets": targets}
    sizes: Counter[str] = Counter()
    for name, shape in attached_model.trained(model, "adalora", config, {}).items():
        sizes[name.rpartition(".")[0]] += math.prod(shape)
    triplets = sorted(size for size in sizes.values() for _ in range(rank))
    if budget > len(triplets):
        raise ValueError(f"a budget of {budget} exceeds the {len(triplets)} initial triplets; raise `rank`")
    least, most = sum(triplets[:budget]), sum(triplets[-budget:])
    layers = " and ".join(f"{size:,} in {number} layers" for size, number in sorted(Counter(sizes.values()).items()))
    how = f"{budget} triplets, at most {rank} per layer; a triplet has {layers}: {least:,} to {most:,}"
    return MeasureResult(least, how, most)


@measure("count")
def budget_at(
    at: Literal["t_i", "T - t_f - 1"],
    equation: Literal["printed", "reference"],
    examples: Positive,
    batch: Positive,
    epochs: Positive,
    t_i: int,
    t_f: int,
    rank: Positive,
    target_rank: Positive,
    layers: Positive,
) -> MeasureResult:
    """AdaLoRA's budget b(t), a number of triplets, at the first or the last step t of the cubic phase.

    In this phase, the budget falls from `rank` triplets per layer to `target_rank`. t_i, t_f: steps before and after
    the cubic phase. equation: `printed` is eq. 12 as printed, with t - t_i - t_f; `reference` is the formula of the
    reference. T is the number of steps of all epochs over `examples` examples. The last batch of an epoch may be
    smaller.
    """
    from reference.adalora import budget

    config = _config(examples, batch, epochs, t_i, t_f, rank, target_rank)
    T = config.total_steps
    t = t_i if at == "t_i" else T - t_f - 1
    if equation == "reference":
        return MeasureResult(budget(t, config, layers), f"the reference's b({t:,}), T = {T:,}")
    start, target = rank * layers, target_rank * layers
    part = Fraction(t - t_i - t_f, T - t_i - t_f)
    how = f"{target} + {start - target} (1 - ({t - t_i - t_f:,} / {T - t_i - t_f:,}))^3, T = {T:,}"
    return MeasureResult(target + (start - target) * (1 - part) ** 3, how)


@measure("property")
def budget_only_falls(
    examples: Positive,
    batch: Positive,
    epochs: Positive,
    t_i: int,
    t_f: int,
    rank: Positive,
    target_rank: Positive,
    layers: Positive,
) -> MeasureResult:
    """Check whether AdaLoRA's budget b(t) stays constant, then never rises, and then stays constant again.

    The reference computes b(t). It must be b(0) up to step t_i, and b(T) in the last t_f steps, where T is the last
    step.
    """
    from reference.adalora import budget

    config = _config(examples, batch, epochs, t_i, t_f, rank, target_rank)
    b = [budget(t, config, layers) for t in range(config.total_steps + 1)]
    warm, last = set(b[: t_i + 1]), set(b[config.total_steps - t_f :])
    holds = warm == {rank * layers} and last == {target_rank * layers} and b == sorted(b, reverse=True)
    steps = len(b) - 1
    return MeasureResult(holds, f"{b[0]} until step {t_i:,}, {b[-1]} after step {steps - t_f:,} of {steps:,}")


@measure("property")
def regularizer_is_eq_4(form: Literal["mean-norm", "squared-sum"]) -> MeasureResult:
    """Check whether AdaLoRA's regularizer R is the sum of |P^T P - I|^2 and |Q Q^T - I|^2 over layers (eq. 4).

    R is computed for two layers by the reference. It may differ by float32 rounding. form: the reference's option
    `regularization`. The authors' code and HF peft compute `mean-norm`.
    """
    import torch

    from harness.conformance.comparison.tolerance_policies import noise_floor
    from reference.adalora import orthogonality

    def by_traces(layers: list[Any]) -> Any:
        # |G - I|^2 = |G|^2 - 2 tr G + R, and tr P^T P = |P|^2
        terms = [
            (side.T @ side).square().sum() - 2 * side.square().sum() + side.shape[1]
            for layer in layers
            for side in (layer.B, layer.A.T)
        ]
        return torch.stack(terms).sum().detach()

    single, double = ([_layer(seed, dtype) for seed in (0, 1)] for dtype in ("float32", "float64"))
    have, truth = orthogonality(single, form).detach(), by_traces(double)
    judged = noise_floor({"R": have}, {"R": truth}, {"R": by_traces(single)}, "float32")
    how = f"two layers of rank 4: eq. 4 gives {truth.item():.6g}, `{form}` gives {have.item():.6g}"
    return MeasureResult(judged.passed, how)


@measure("property")
def scored_weights_are(weights: Literal["before", "after"]) -> MeasureResult:
    """Check whether AdaLoRA computes its sensitivity |w dL/dw| with the weights w before, or after, a step's update.

    weights: the alternative that is checked, `before` or `after`.
    """
    import torch

    adapted, layer = _adapted(target_rank=2)
    _descend(adapted, layer)
    before = {name: tensor.detach().clone() for name, tensor in layer.tensors().items()}
    _descend(adapted, layer)
    chosen = before if weights == "before" else layer.tensors()
    adapted.after_step(1)
    # The order of operations is that of the reference, so the bits are equal.
    expected = {name: (1 - adapted.config.beta1) * (chosen[name] * t.grad).abs() for name, t in layer.tensors().items()}
    holds = all(torch.equal(expected[name], layer.get_buffer(f"exp_avg_ipt_{name}")) for name in expected)
    how = f"the average of |w dL/dw| after one step is {'' if holds else 'not '}that of the weights {weights} the step"
    return MeasureResult(holds, how)


@measure("property")
def pruned_triplets_recover() -> MeasureResult:
    """Check whether AdaLoRA's pruning sets only lambdas to zero, and whether these grow again before the next pruning."""
    import torch

    adapted, layer = _adapted(target_rank=2)
    for step in range(1, adapted.config.delta_t):
        _descend(adapted, layer)
        adapted.after_step(step)
    _descend(adapted, layer)
    vectors = {name: layer.tensors()[name].detach().clone() for name in ("A", "B")}
    adapted.after_step(adapted.config.delta_t)
    nonzero, unchanged = int((layer.E != 0).sum()), all(torch.equal(t, layer.tensors()[n]) for n, t in vectors.items())
    _descend(adapted, layer)
    adapted.after_step(adapted.config.delta_t + 1)
    grown = int((layer.E != 0).sum())
    how = f"nonzero lambdas of {len(layer.E)}: {nonzero} after pruning, {grown} after the next step; the vectors are "
    return MeasureResult(nonzero < grown == len(layer.E) and unchanged, how + ("unchanged" if unchanged else "changed"))


@measure("property")
def keeps_exactly(rule: Literal["reference", "kthvalue"]) -> MeasureResult:
    """Check whether AdaLoRA keeps exactly as many triplets as the budget allows, if some scores are equal.

    rule: `reference` is the rule of the reference. `kthvalue` keeps the scores above torch.kthvalue, as the authors'
    code and HF peft do.
    """
    import torch

    from reference.adalora import largest_mask

    scores, budget = torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 2.0, 0.5, 1.0]), 4
    least = torch.kthvalue(scores, len(scores) - budget).values
    mask = largest_mask(scores, budget) if rule == "reference" else scores > least
    remaining = int(mask.sum())
    how = f"8 triplets, 5 with equal scores: {remaining} remain for a budget of {budget}"
    return MeasureResult(remaining == budget, how)


def _config(examples: int, batch: int, epochs: int, t_i: int, t_f: int, rank: int, target_rank: int) -> Any:
    from reference.adalora import Config

    steps = -(-examples // batch) * epochs
    if t_i + t_f >= steps:
        raise ValueError(
            f"t_i {t_i:,} + t_f {t_f:,} leave no step of {steps:,} for pruning; check `epochs` and `batch`"
        )
    return Config(rank=rank, target_rank=target_rank, total_steps=steps, tinit=t_i, tfinal=t_f)


def _layer(seed: int, dtype: str) -> Any:
    import torch

    from reference.adalora import AdaLoraLinear

    generator = torch.Generator().manual_seed(seed)
    A, E, B = (torch.randn(s, generator=generator).to(getattr(torch, dtype)) for s in ((4, 24), (4, 1), (16, 4)))
    return AdaLoraLinear(torch.nn.Linear(24, 16), A, E, B, 1.0, 0.0)


def _adapted(target_rank: int) -> tuple[Any, Any]:
    """Attach AdaLoRA to a model with a single layer, and set random lambdas. Return the adapted model and the layer."""
    import torch

    from reference.adalora import Config, attach

    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 16))
    config = Config(rank=4, target_rank=target_rank, targets=("0",), total_steps=20, tinit=0, tfinal=2, delta_t=3)
    adapted = attach(model, config, generator)
    (layer,) = adapted.adalora.values()
    layer.E.data.normal_(generator=generator)
    return adapted, layer


def _descend(adapted: Any, layer: Any) -> None:
    """Take one step of gradient descent on a fixed batch."""
    import torch

    x, y = (torch.randn(8, n, generator=torch.Generator().manual_seed(n)) for n in (24, 16))
    for tensor in layer.tensors().values():
        tensor.grad = None
    (adapted.model(x) - y).square().mean().backward()
    torch.optim.SGD(layer.tensors().values(), lr=0.1).step()
