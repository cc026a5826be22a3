"""Faults of PiSSA."""

from __future__ import annotations

from harness.conformance.faults import FaultCase, planted
from harness.conformance.faults.patched_copy import PatchedCopy

_USUAL = {"rank": 3, "alpha": 8.0}
CASE = FaultCase(values=_USUAL)


@planted("pissa", "residual", values=_USUAL)
def does_not_subtract_the_principal_part(its: PatchedCopy) -> None:
    its.line("residual = W - scaling * (B.to(W.dtype) @ A.to(W.dtype))", "residual = W")


@planted("pissa", "residual", "principal", values=_USUAL)
def forgets_the_scaling_in_the_split(its: PatchedCopy) -> None:
    its.line("root = (S / scaling).sqrt()", "root = S.sqrt()")
    its.line("residual = W - scaling * (B", "residual = W - (B")


@planted("pissa", "principal", values=_USUAL)
def takes_the_last_singular_vectors(its: PatchedCopy) -> None:
    its.line("return U[:, :rank], S[:rank], Vt[:rank]", "return U[:, -rank:], S[-rank:], Vt[-rank:]")


@planted("pissa", "principal", values=_USUAL)
def pairs_values_with_the_wrong_vectors(its: PatchedCopy) -> None:
    its.line("return U[:, :rank], S[:rank], Vt[:rank]", "return U[:, :rank], S[1 : rank + 1], Vt[:rank]")


@planted("pissa", "principal", values=_USUAL)
def gives_all_of_s_to_a(its: PatchedCopy) -> None:
    """The product is right; its gradients are of another size."""
    its.line("(root[:, None] * Vt).to(dtype)", "(root[:, None] ** 2 * Vt).to(dtype)")
    its.line("(U * root).to(dtype)", "U.to(dtype)")


@planted("pissa", "forward", "gradient", values=_USUAL)
def runs_on_the_original_weight(its: PatchedCopy) -> None:
    its.line('linear(x_TD, self.get_buffer("residual"), self.base.bias)', "self.base(x_TD)")


@planted("pissa", "merge", values=_USUAL)
def merges_into_the_original_weight(its: PatchedCopy) -> None:
    its.line('dense.weight.copy_(self.get_buffer("residual") + self.delta())', "dense.weight += self.delta()")
