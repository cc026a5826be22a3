"""Faults of VeRA."""

from __future__ import annotations

from typing import Any

from harness.conformance.faults import FaultCase, planted
from harness.conformance.faults.patched_copy import PatchedCopy

_USUAL = {"rank": 3, "projection_key": 7}
CASE = FaultCase(values=_USUAL)
_SQUARE = {"values": {"rank": 24, "projection_key": 7}, "inputs": 24, "outputs": 24}


@planted("vera", "projections", values=_USUAL)
def ignores_the_key(its: PatchedCopy) -> None:
    its.line('torch.Generator("cpu").manual_seed(key)', 'torch.Generator("cpu").manual_seed(0)')


@planted("vera", "projections", values=_USUAL)
def draws_the_projections_anew_each_time(its: PatchedCopy) -> None:
    its.line(
        'generator = torch.Generator("cpu").manual_seed(key)',
        'generator = torch.Generator("cpu")\n    generator.seed()',
    )


@planted("vera", "projections", values=_USUAL)
def gives_each_layer_its_own_projections(its: PatchedCopy) -> None:
    its.line(
        "A, B = shared[device, dtype]",
        "A, B = (t.to(dtype) for t in projections(config.projection_key, config.rank, D, E))",
    )


@planted("vera", "projections", values=_USUAL)
def draws_b_before_a(its: PatchedCopy) -> None:
    its.line(
        "return kaiming(rank, in_features), kaiming(out_features, rank)",
        "return (kaiming(out_features, rank), kaiming(rank, in_features))[::-1]",
    )


@planted("vera", "forward", "gradient", **_SQUARE)
def swaps_b_and_d(its: PatchedCopy) -> None:
    """Swap b and d, which runs only if the rank equals the width."""
    its.line("h_TR = self.d * (self.dropout(x_TD) @ self.A.T)", "h_TR = self.b * (self.dropout(x_TD) @ self.A.T)")
    its.line("self.base(x_TD) + self.b * (h_TR @ self.B.T)", "self.base(x_TD) + self.d * (h_TR @ self.B.T)")


@planted("vera", "forward", values=_USUAL)
def leaves_out_d(its: PatchedCopy) -> None:
    its.line("h_TR = self.d * (self.dropout(x_TD) @ self.A.T)", "h_TR = self.dropout(x_TD) @ self.A.T")


@planted("vera", "initial", "identity", values=_USUAL)
def starts_with_b_not_zero(its: PatchedCopy) -> None:
    its.line("b = torch.zeros(E, dtype", "b = torch.ones(E, dtype")


@planted("vera", "initial", values={**_USUAL, "d_initial": 0.5})
def starts_d_at_a_tenth_whatever_is_asked(its: PatchedCopy) -> None:
    its.line("config.d_initial, dtype=dtype", "0.1, dtype=dtype")


@planted("vera", "layers", values=_USUAL)
def trains_the_projections(its: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        for layer in adapted.layers.values():
            trained = its.module().nn.Parameter(layer.A.clone())
            del layer.A
            layer.A = trained

    its.then(change)
