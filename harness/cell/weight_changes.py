"""Check that training changed the trained tensors and no others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from harness.conformance.subject import Subject
from harness.methods import checksums
from harness.records.record import Cell, CheckResult, Outcome


def fingerprints(model: nn.Module) -> dict[str, int]:
    """Map the name of every frozen parameter to its checksum."""
    return checksums.crc32_by_name({name: p for name, p in model.named_parameters() if not p.requires_grad})


def base_weights(subject: Subject) -> dict[str, Tensor]:
    """Return name -> tensor for the trained tensors that belong to the model itself: weights of adapted layers."""
    own = {id(p) for base in subject.bases.values() for p in base.parameters()}
    return {name: t for name, t in subject.adapted.tensors().items() if id(t) in own}


def state_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors in hex digits. It covers their names, dtypes, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_of_names(cell: Cell, name: str, violations: list[str], what: str) -> CheckResult:
    """Return the result of the check `name`, which passes if `violations` is empty.

    violations: names of tensors. what: what is wrong with these tensors, e.g. `changed`. If the check fails, the
    message consists of the names and this text.
    """
    return CheckResult(
        check=f"{cell.method}/{name}/{cell.dtype}/trained",
        outcome=Outcome.FAIL if violations else Outcome.PASS,
        error=float(len(violations)),
        allowed=0.0,
        policy="exact",
        detail=f"{', '.join(violations[:3])} {what}" if violations else "",
    )


class UpdateTracker:
    """A comparison of trained tensors with their initial values after each step, until each tensor has changed.

    Comparing only after the last step would not suffice: AdaLoRA resets pruned values to zero, their initial value.
    """

    def __init__(self, start: Mapping[str, Tensor], select: Callable[[Tensor], Tensor]) -> None:
        """Copy the dict `start`, which maps names to initial values.

        select: function that takes a tensor, and returns the part of it to compare with the initial value.
        """
        self._start, self._select = dict(start), select

    def observe(self, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Compare the tensors that have not changed yet. Does not call `tensors` if all have changed."""
        now = tensors() if self._start else {}
        for name in [name for name in self._start if name in now]:
            if not _same(self._start[name], self._select(now[name])):
                del self._start[name]

    def unchanged(self, now: Mapping[str, Tensor]) -> list[str]:
        """List the names in `now` whose tensors never changed."""
        return [name for name in now if name in self._start]


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have equal values. Tensors of the same dtype are compared without a copy."""
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))
