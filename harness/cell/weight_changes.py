"""What training changed in a model, and what it must not have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from harness.conformance.subject import Subject
from harness.methods import checksums
from harness.records.record import Cell, CheckResult, Outcome


def fingerprints(model: Any) -> dict[str, int]:
    """Return a checksum of every frozen parameter."""
    return checksums.crc32_by_name({name: p for name, p in model.named_parameters() if not p.requires_grad})


def of_bases(subject: Subject) -> dict[str, Tensor]:
    """Return those of the trained tensors that are the adapted layers' own weights."""
    own = {id(p) for base in subject.bases.values() for p in base.parameters()}
    return {name: t for name, t in subject.adapted.tensors().items() if id(t) in own}


def state_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes, by name, so that no order of ours is in it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def found(cell: Cell, name: str, odd: list[str], what: str) -> CheckResult:
    """Return the check that nothing is odd. odd: names of tensors; what: is wrong with them."""
    return CheckResult(
        check=f"{cell.method}/{name}/{cell.dtype}/trained",
        outcome=Outcome.FAIL if odd else Outcome.PASS,
        error=float(len(odd)),
        allowed=0.0,
        policy="exact",
        detail=f"{', '.join(odd[:3])} {what}" if odd else "",
    )
