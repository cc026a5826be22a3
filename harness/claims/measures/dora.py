"""Measures: DoRA's magnitudes, and its gradients, with the norm as a variable or as a constant.

DoRA multiplies each row of V' = W0 + B A (the direction) by a magnitude m and divides it by its norm.
"""

from __future__ import annotations

from typing import Any, Literal

from harness.claims import attached_model
from harness.claims.measure import Config, MeasureResult, Method, Model, measure
from harness.claims.sums import summed

_OUT, _IN, _RANK, _TOKENS = 24, 40, 4, 64
"""Sizes of a layer and its input. The layer is not square, so that a test notices exchanged axes."""


@measure("count")
def with_magnitudes(model: Model, method: Method, config: Config, magnitudes: list[str]) -> MeasureResult:
    """Number of trainable parameters of a DoRA whose directions are trained by the Method `method`.

    `lora` gives DoRA itself, and `vera` gives DVoRA. magnitudes: names of the layers with magnitudes (the last part of
    a path, e.g. `q_proj`).
    """
    directions = attached_model.trained(model, method, config, {}).values()
    every = attached_model.trained(model, "dora", {"rank": 1, "targets": magnitudes}, {})
    return summed([*directions, *(shape for name, shape in every.items() if name.endswith(".m"))])


@measure("property")
def one_magnitude_per(axis: Literal["input", "output"]) -> MeasureResult:
    """Check whether a DoRA layer has, by default, one magnitude for each `axis`: for each input, or for each output."""
    have = len(_layer(_drawn("float64"), detach_norm=True).m)
    wanted = _IN if axis == "input" else _OUT
    return MeasureResult(have == wanted, f"a layer with {_IN} inputs and {_OUT} outputs has {have} magnitudes")


@measure("property")
def gradient_is(equation: Literal["eq. 6", "eq. 11"], detach_norm: bool) -> MeasureResult:
    """Check whether DoRA's gradients by autograd agree with the equations of the paper.

    The gradient of m must agree with eq. 7. `equation` gives the gradient of V' = W0 + B A; the gradients of A and B
    must agree with it. Eq. 6 is m / |V'| (I - V' V'^T / |V'|^2) dL/dW', and eq. 11 is m / |V'| dL/dW'. detach_norm:
    whether the norm |V'| is a constant in the backward pass. Autograd computes in float32, and the equations are
    computed in float64. The conformance suite's tolerance for gradients applies.
    """
    drawn = _drawn("float32")
    layer = _layer(drawn, detach_norm)
    (layer(drawn["x"]) * drawn["dy"]).sum().backward()
    have = {name: tensor.grad for name, tensor in layer.tensors().items()}
    truth, rounded = (_by_equation(tensors, equation) for tensors in (_drawn("float64"), drawn))
    return _judged(have, truth, rounded, "gradients of A, B and m")


@measure("property")
def gradient_leaves_direction(detach_norm: bool) -> MeasureResult:
    """Check whether the gradient of DoRA's V' = W0 + B A is orthogonal to V' in every row.

    If it is, removing the part along V' does not change the gradient. detach_norm: whether the norm |V'| is a constant
    in the backward pass.
    """
    import torch

    from reference.dora import gain, norms

    def gradient(drawn: dict[str, Any]) -> tuple[Any, Any]:
        V = (drawn["W0"] + drawn["B"] @ drawn["A"]).requires_grad_()
        norm = norms(V)
        W = gain(drawn["m"], norm.detach() if detach_norm else norm)[:, None] * V
        return torch.autograd.grad(((drawn["x"] @ W.T) * drawn["dy"]).sum(), V)[0], V.detach()

    def projected(G: Any, V: Any) -> Any:
        unit = V / V.norm(dim=1, keepdim=True)
        return G - (G * unit).sum(1, keepdim=True) * unit

    single, double = gradient(_drawn("float32")), gradient(_drawn("float64"))
    return _judged({"V": single[0]}, {"V": projected(*double)}, {"V": projected(*single)}, "gradient of V'")


def _by_equation(drawn: dict[str, Any], equation: str) -> dict[str, Any]:
    """Return the gradients of A, B and m by name, computed by an equation of the paper, without autograd.

    drawn: the tensors from `_drawn`. equation: `eq. 6` or `eq. 11`.
    """
    A, B, m = drawn["A"], drawn["B"], drawn["m"]
    V = drawn["W0"] + B @ A
    norm = V.square().sum(1, keepdim=True).sqrt()
    of_W = drawn["dy"].T @ drawn["x"]
    of_m = (of_W * V / norm).sum(1)
    of_V = m[:, None] / norm * (of_W if equation == "eq. 11" else of_W - of_m[:, None] * V / norm)
    return {"A": B.T @ of_V, "B": of_V @ A.T, "m": of_m}


def _drawn(dtype: str) -> dict[str, Any]:
    """Return random tensors by name: the tensors of a layer, its inputs x, and the gradient dy of its outputs.

    All dtypes get the same numbers.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = {"W0": (_OUT, _IN), "A": (_RANK, _IN), "B": (_OUT, _RANK), "x": (_TOKENS, _IN), "dy": (_TOKENS, _OUT)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drawn["m"] = torch.rand(_OUT, generator=generator) + 0.5
    return {name: tensor.to(getattr(torch, dtype)) for name, tensor in drawn.items()}


def _layer(drawn: dict[str, Any], detach_norm: bool) -> Any:
    import torch

    from reference.dora import Config as DoraConfig
    from reference.dora import DoraLinear

    base = torch.nn.Linear(_IN, _OUT, bias=False).requires_grad_(False)
    base.weight = torch.nn.Parameter(drawn["W0"], requires_grad=False)
    config = DoraConfig(rank=_RANK, alpha=_RANK, detach_norm=detach_norm)  # alpha = rank: no scaling, as in eq. 5
    layer = DoraLinear(base, drawn["A"], drawn["B"], config)
    if layer.m.shape == drawn["m"].shape:
        layer.m.data = drawn["m"]
    return layer


def _judged(have: dict[str, Any], truth: dict[str, Any], rounded: dict[str, Any], what: str) -> MeasureResult:
    from harness.conformance.comparison.tolerance_policies import noise_floor

    judged = noise_floor(have, truth, rounded, "float32")
    of_layer = f"{what} of a {_OUT} x {_IN} layer"
    return MeasureResult(
        judged.passed, f"{of_layer}: error of {judged.tensor} {judged.error:.2g}, allowed {judged.allowed:.2g}"
    )
