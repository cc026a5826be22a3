"""adalora_importance: one update of AdaLoRA's averages of sensitivity and uncertainty, and the singular values' scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
from torch import Tensor

from harness.conformance.comparison.functional_layer import dense_linear
from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.comparison.operation_call import map_floats
from harness.conformance.comparison.tolerance_policies import Judgement, noise_floor
from harness.conformance.drawing.factors import Factor, Matrix, Rank
from harness.conformance.operation import Arguments, Operation, cloned, draw
from harness.conformance.tolerance_constants import PERTURBED_DRAWS
from reference import adalora

# A small beta shows a program that computes beta as 1 - (1 - beta), which rounds it.
Beta = Annotated[float, Factor((0.9, 0.0, 0.5, 0.999), (0.95, 0.99, 0.9999, 1e-5), least=0.0, most=0.999)]
_AVERAGED = ("A", "E", "B")
_AVERAGES = ("I_A", "U_A", "I_E", "U_E", "I_B", "U_B")
_SEED = 70


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    shape: Matrix,
    rank: Rank,
    beta1: Beta = 0.85,
    beta2: Beta = 0.7,
) -> Arguments:
    """Draw the arguments of one call. shape: (out, in) of the layer.

    The previous averages I and U are about as large as their updates. They are in float32, or in float64 for float64
    weights. Scores are computed from products of two averages. A product is about a millionth, and float16 has few
    digits for such small numbers.
    """
    shapes = {"A": (rank, shape[1]), "E": (rank, 1), "B": (shape[0], rank)}
    given: Arguments = {"beta1": beta1, "beta2": beta2}
    for name, size in shapes.items():
        given[name] = draw(generator, dtype, *size, spread=0.1)
        given[f"grad_{name}"] = draw(generator, dtype, *size, spread=0.01)
        for average in ("I", "U"):
            wide = torch.promote_types(dtype, torch.float32)
            given[f"{average}_{name}"] = draw(generator, wide, *size, spread=0.001).abs()
    return given


def reference(A: Tensor, E: Tensor, B: Tensor, beta1: float, beta2: float, **given: Tensor) -> tuple[Tensor, ...]:
    """Return I_A, U_A, I_E, U_E, I_B, U_B after the step, and the scores (R,), all in float32 or float64.

    A is (R, D), E holds the singular values (R, 1), and B is (out, R). Each singular value has a score. I is the running
    average of the sensitivity |w grad|, and U of the uncertainty (arXiv:2303.10512, eqs. 7 to 11). given: grad_A and the
    previous I_A and U_A, in the shape of A, and the corresponding tensors for E and B.
    """
    layer = adalora.AdaLoraLinear(
        dense_linear(A.new_zeros(len(B), A.shape[1]), None), A, E, B, scaling=1.0, dropout=0.0
    )
    state = layer.state()
    for name, w in layer.tensors().items():
        w.grad = given[f"grad_{name}"]
        state[f"exp_avg_ipt_{name}"].copy_(given[f"I_{name}"])
        state[f"exp_avg_unc_{name}"].copy_(given[f"U_{name}"])
    layer.observe(beta1, beta2)
    averages = [state[f"exp_avg_{kind}_{name}"] for name in _AVERAGED for kind in ("ipt", "unc")]
    return (*averages, layer.scores())


def judge(outputs: Mapping[str, Tensor], given: Arguments) -> tuple[Judgement, str]:
    """Judge all outputs by `noise_floor`: in float64 if the weights are float64, otherwise in float32."""
    dtype = "float64" if given["A"].dtype == torch.float64 else "float32"
    wide = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), torch.float64)
    exactly = cloned(dict(given), wide)

    def of(arguments: Arguments) -> dict[str, Tensor]:
        return OPERATION.named(reference(**cloned(dict(arguments))))

    def draws() -> Iterator[dict[str, Tensor]]:
        yield of(given)
        generator = torch.Generator().manual_seed(_SEED)
        for _ in range(PERTURBED_DRAWS):
            yield of(map_floats(exactly, lambda t: perturbed(t, dtype, generator)))

    return noise_floor(outputs, of(exactly), draws(), dtype), ""


OPERATION = Operation("adalora_importance", (*_AVERAGES, "scores"), arguments, reference, judge=judge)
