"""Faults of DoRA."""

from __future__ import annotations

from harness.conformance.faults import FaultCase, planted
from harness.conformance.faults.patched_copy import PatchedCopy

_USUAL = {"rank": 3, "alpha": 8.0}
CASE = FaultCase(values=_USUAL)
_SQUARE = {"values": _USUAL, "inputs": 32, "outputs": 32}
_G = "g = gain(self.m, norm.detach() if self.detach_norm else norm)"


@planted("dora", "forward", "norm", **_SQUARE)
def takes_the_norm_of_the_other_axis(its: PatchedCopy) -> None:
    """Take the norm over the wrong axis; on a square layer no shape shows it."""
    its.line('dim=1 if per == "output" else 0', 'dim=0 if per == "output" else 1')


@planted("dora", "parameters", values=_USUAL)
def has_a_magnitude_for_each_input(its: PatchedCopy) -> None:
    its.line(
        "self.detach_norm, self.per = config.detach_norm, config.per",
        'self.detach_norm, self.per = config.detach_norm, "input"',
    )


@planted("dora", "gradient", "step", values=_USUAL)
def does_not_detach_the_norm(its: PatchedCopy) -> None:
    its.line("norm.detach() if self.detach_norm else norm", "norm")


@planted("dora", "gradient", values={**_USUAL, "detach_norm": False})
def detaches_the_norm_unasked(its: PatchedCopy) -> None:
    its.line("norm.detach() if self.detach_norm else norm", "norm.detach()")


@planted("dora", "forward", "gradient", values=_USUAL)
def does_not_apply_the_magnitude(its: PatchedCopy) -> None:
    its.line(_G, "g = torch.ones_like(norm)")


@planted("dora", "forward", "gradient", values=_USUAL)
def takes_the_norm_of_the_base_alone(its: PatchedCopy) -> None:
    its.line("norm = norms(self.direction(W0_ED), self.per)", "norm = norms(W0_ED, self.per)")


@planted("dora", "forward", values=_USUAL)
def leaves_the_scaling_out_of_the_norm(its: PatchedCopy) -> None:
    its.line("norm = norms(self.direction(W0_ED), self.per)", "norm = norms(W0_ED + self.B @ self.A, self.per)")


@planted("dora", "forward", values=_USUAL)
def scales_only_what_is_added(its: PatchedCopy) -> None:
    its.line("(g - 1) * (dropped_TD @ W0_ED.T) + g * self.scaling", "g * self.scaling")


@planted("dora", "zero_rows", values=_USUAL)
def divides_by_zero_rows(its: PatchedCopy) -> None:
    its.line("return torch.where(some, m, 0.0) / torch.where(some, norm, 1.0)", "return m / norm")


@planted("dora", "norm", "identity", values=_USUAL)
def starts_with_magnitudes_of_one(its: PatchedCopy) -> None:
    its.line(
        "nn.Parameter(norms(self.direction(dense_weight(base)), self.per).detach())",
        "nn.Parameter(torch.ones(base.out_features))",
    )


@planted("dora", "norm", "merge", values=_USUAL)
def merges_without_the_magnitude(its: PatchedCopy) -> None:
    its.line("g = gain(self.m, norms(V_ED, self.per))", "g = torch.ones_like(norms(V_ED, self.per))")
