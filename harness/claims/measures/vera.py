"""Measures: VeRA's parameter counts and random projections."""

from __future__ import annotations

from harness.claims import attached_model
from harness.claims.measure import MeasureResult, Model, Positive, measure
from harness.claims.measures.parameters import Split
from harness.claims.sums import total


@measure("property")
def counts_by_formula(model: Model, targets: list[str], ranks: list[Positive], split: Split = {}) -> MeasureResult:
    """Check whether VeRA trains L (d + r) numbers, and LoRA 2 L d r numbers (section 3.2).

    L is the number of adapted layers, which are square and have the width d. r is the rank.
    """
    shown, holds = [], True
    for rank in ranks:
        config = {"rank": rank, "targets": targets}
        vera, lora = (attached_model.trained(model, method, config, split) for method in ("vera", "lora"))
        widths = {shape[-1] for name, shape in lora.items() if name.endswith(".A")}
        heights = {shape[0] for name, shape in lora.items() if name.endswith(".B")}
        if widths != heights or len(widths) != 1:
            raise ValueError(f"the formula is for square layers of one size; {', '.join(targets)} are not")
        (d,), layers = widths, len(lora) // 2
        of_vera, of_lora = total(vera.values()), total(lora.values())
        holds = holds and of_vera == layers * (d + rank) and of_lora == 2 * layers * d * rank
        shown.append(f"r = {rank}: VeRA {of_vera:,}, LoRA {of_lora:,}")
    return MeasureResult(holds, f"L = {layers}, d = {d:,}; {'; '.join(shown)}")


@measure("property")
def is_kaiming_uniform(inputs: Positive, outputs: Positive, rank: Positive) -> MeasureResult:
    """Check whether VeRA's A and B equal, bit by bit, what PyTorch's `kaiming_uniform_` draws by default.

    These draws are uniform between -sqrt(6 / fan_in) and sqrt(6 / fan_in). PyTorch initialises an nn.Linear between
    -sqrt(1 / fan_in) and sqrt(1 / fan_in) instead.
    """
    import torch

    from reference.vera import projections

    A, B = projections(0, rank, inputs, outputs)
    generator = torch.Generator().manual_seed(0)
    expected = [torch.nn.init.kaiming_uniform_(torch.empty(t.shape), generator=generator) for t in (A, B)]
    largest = [float(t.abs().max() * (fan / 6) ** 0.5) for t, fan in ((A, inputs), (B, rank))]
    how = f"largest of A {largest[0]:.4f} sqrt(6/{inputs}), of B {largest[1]:.4f} sqrt(6/{rank})"
    return MeasureResult(torch.equal(A, expected[0]) and torch.equal(B, expected[1]), how)


@measure("property")
def product_keeps_variance(inputs: Positive, outputs: Positive, ranks: list[Positive]) -> MeasureResult:
    """Check whether the elements of VeRA's product B A have the variance 4 / in at every rank r. in: number of inputs.

    The mean variance over 64 draws may differ by 5 of its standard errors. By Kaiming's rule the variance is 2 /
    fan_in: 2 / in for A, and 2 / r for B. An element of B A sums r products, so that its variance is r (2 / in) (2 / r)
    = 4 / in.
    """
    import torch

    from harness.conformance.tolerance_constants import INITIAL_SIGMAS
    from reference.vera import projections

    shown, holds = [], True
    for rank in ranks:
        draws = []
        for key in range(64):
            A, B = projections(key, rank, inputs, outputs)
            draws.append((B @ A).double().square().mean() * inputs / 4)
        variances = torch.stack(draws)
        mean, error = float(variances.mean()), float(variances.std() / len(draws) ** 0.5)
        holds = holds and abs(mean - 1) <= INITIAL_SIGMAS * error
        shown.append(f"r = {rank}: {mean:.4f} +- {error:.4f}")
    return MeasureResult(holds, f"variance in units of 4 / {inputs}: {', '.join(shown)}")
