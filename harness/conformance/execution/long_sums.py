"""Find the checks with sums so long that their rounding errors need a larger allowance in 32 and 64 bits."""

from __future__ import annotations

from harness.conformance.execution.parity_model import ParityModel
from harness.conformance.operation import Arguments
from harness.conformance.parity_suite import MethodCase, MethodSuite, OperationCase, OperationSuite


def of_layers(plan: MethodSuite, of: MethodCase, model: ParityModel) -> dict[str, float]:
    """Map each check of a Method's case with long sums to the further factor on its allowed error.

    A layer sums over its inputs or outputs, a gradient over the rows of the input, too, and AdaLoRA's regularizer over all
    pairs of triplets.
    """
    pairs = of.config.get("rank", 0) ** 2
    return plan.long_sums(model.terms, gradient=of.shape.tokens, regularizer=pairs)


def of_operation(plan: OperationSuite, of: OperationCase, arguments: Arguments) -> dict[str, float]:
    """Map each check of an Operation's case with long sums to the further factor on its allowed error.

    An Operation with an input `x` sums over a side of its weight, and a gradient over the rows of `x`, too. An Operation
    without `x` is element-wise or a step of an optimizer: only its gradients may be long sums.
    """
    x, side = arguments.get("x"), max(of.values.get("shape", [0]))
    if x is None:
        return plan.long_sums(0, backward=side)
    return plan.long_sums(side, backward=x.shape[:-1].numel())
