"""Load one adapter file with loaders, and compare their logits with those that the reference computes from the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn

from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.adapter_files.reference_logits import reference_logits
from harness.conformance.adapter_files.subject import FIRST, CorpusAdapter, LoaderSubject, by_prompt
from harness.conformance.comparison.tolerance_policies import carried_noise
from harness.conformance.execution.suite_run import CaseRunner
from harness.conformance.findings.outcomes import CheckOutcome, Execution
from harness.conformance.served.prompts import drawn
from harness.errors import Unsupported, UsageError
from harness.methods.loader import ADAPTER_FILES
from harness.methods.registry import Implementation, discover
from harness.records.check import CheckId

DEFAULT = "hf-peft"
"""Loader to compare if none is named."""
PROMPTS = 4
"""Number of prompts whose logits are compared."""
_DTYPE = "float32"
_B_PER_PARAMETER = 16
"""Bytes of memory per parameter, for the reference in float64 and a copy in float32 beside it."""
_TASKS = (None, "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS")
"""Values of task_type whose models return logits for token ids alone."""


@dataclass(frozen=True)
class LoaderLogits:
    """The comparison of one loader with the reference."""

    loader: str
    verdict: Literal["agrees", "differs", "raises", "unsupported", "not compared"]
    largest: float | None = None
    """Largest absolute difference of a logit."""
    share: float | None = None
    """The error as a share of the allowed error, by the tolerance policy `carried-noise`."""
    detail: str = ""
    """The worst logit, the exception that the loader raised, or the reason why nothing was compared."""


def compare(adapter: AdapterFile, folder: Path, base: nn.Module, names: Sequence[str]) -> list[LoaderLogits]:
    """Return the comparison of each loader with the reference.

    folder: the base. base: the same without weights. names: names of loaders; if there are none, DEFAULT. A loader whose
    library is not installed is not compared. Raises ImplementationError for an unknown name.
    """
    registry = discover(only=[DEFAULT, "reference"] if set(names) <= {DEFAULT, "reference"} else None)
    loaders = [registry.find("loader", ADAPTER_FILES, name) for name in names or [DEFAULT]]
    missing = {one.name: [library for library in one.requires if find_spec(library) is None] for one in loaders}
    able = [one for one in loaders if not missing[one.name]]
    reason = _reason(adapter, base) if able else ""
    compared: dict[str, LoaderLogits] = {}
    if able and not reason:
        try:
            compared = {one.loader: one for one in _compared(adapter, adapter.base(folder), able)}
        except UsageError as error:
            reason = f"{error.where}: {error.what}"
        except Unsupported as error:
            reason = str(error)
    reasons = {
        one: f"not installed: {', '.join(libraries)}" if libraries else reason for one, libraries in missing.items()
    }
    return [
        compared.get(one.name) or LoaderLogits(one.name, "not compared", detail=reasons[one.name]) for one in loaders
    ]


def _reason(adapter: AdapterFile, base: nn.Module) -> str:
    """Return the reason why the logits cannot be compared, or an empty string."""
    config: Any = getattr(base, "config", None)
    if (task := adapter.settings.task_type) not in _TASKS:
        return f"task_type is {task}; only logits of causal models and of classifiers are compared"
    if getattr(config, "is_encoder_decoder", False):
        return f"{type(base).__name__} needs tokens for its decoder too"
    need = _B_PER_PARAMETER * sum(one.numel() for one in base.parameters())
    free = psutil.virtual_memory().available
    if need > free:
        return f"the reference in float64 needs about {need / 2**30:.0f} GiB of memory; {free / 2**30:.0f} GiB are free"
    return ""


def _compared(adapter: AdapterFile, base: Path, loaders: Sequence[Implementation]) -> Iterator[LoaderLogits]:
    prompts = drawn(base, 0)[:PROMPTS]
    truth = reference_logits(base, adapter, prompts)
    for one in loaders:
        subject = LoaderSubject(one.function, _DTYPE, CorpusAdapter("file", adapter.folder, base, prompts, truth))
        yield _judged(one, subject)


def _judged(loader: Implementation, subject: LoaderSubject) -> LoaderLogits:
    def load() -> list[Tensor]:
        with torch.random.fork_rng():
            return subject.loaded().logits(subject.adapter.prompts, FIRST)

    runner = CaseRunner(loader, subject.adapter.name, subject.dtype)
    found = runner.attempt(CheckId(ADAPTER_FILES, "logits", subject.dtype, "loaded"), load)
    if isinstance(found, CheckOutcome):
        verdict: Any = "unsupported" if found.execution is Execution.UNSUPPORTED else "raises"
        return LoaderLogits(loader.name, verdict, detail=found.result.detail)
    judgement = carried_noise(by_prompt(found), subject.truth(), subject.rounded(), subject.dtype)
    if not judgement.decided:
        return LoaderLogits(loader.name, "not compared", detail=judgement.worst)
    same = all(have.shape == want.shape for have, want in zip(found, subject.adapter.logits, strict=True))
    pairs = zip(found, subject.adapter.logits, strict=True) if same else ()
    largest = max((float((have.double() - want).abs().max()) for have, want in pairs), default=None)
    detail = "" if judgement.passed else f"{judgement.tensor}, {judgement.worst}"
    share = judgement.ratio if judgement.error is not None else None
    return LoaderLogits(loader.name, "agrees" if judgement.passed else "differs", largest, share, detail)
