"""Find the weights that training changed, and those that it must not change."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from harness.conformance.subject import Subject
from harness.methods import checksums
from harness.records.record import Cell, CheckResult, Outcome


def fingerprints(model: nn.Module) -> dict[str, int]:
    """Return a checksum of every frozen parameter."""
    return checksums.crc32_by_name({name: p for name, p in model.named_parameters() if not p.requires_grad})


def base_weights(subject: Subject) -> dict[str, Tensor]:
    """Return the trained tensors that are the adapted layers' own weights."""
    own = {id(p) for base in subject.bases.values() for p in base.parameters()}
    return {name: t for name, t in subject.adapted.tensors().items() if id(t) in own}


def state_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_of_names(cell: Cell, name: str, odd: list[str], what: str) -> CheckResult:
    """Return a check that passes if `odd`, names of tensors, is empty. what: the predicate of the message."""
    return CheckResult(
        check=f"{cell.method}/{name}/{cell.dtype}/trained",
        outcome=Outcome.FAIL if odd else Outcome.PASS,
        error=float(len(odd)),
        allowed=0.0,
        policy="exact",
        detail=f"{', '.join(odd[:3])} {what}" if odd else "",
    )
