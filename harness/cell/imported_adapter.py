"""Check an imported adapter, which a Cell evaluates instead of training one.

Its logits are compared with the reference, and its loss with the losses that its training logged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from harness.cell.cell_run import CellRun
from harness.cell.data import CellData, RandomData
from harness.cell.training import loop
from harness.cell.training.batches import Batch
from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.adapter_files.reference_logits import reference_logits
from harness.conformance.adapter_files.subject import FIRST, ExpectedAdapter, LoaderSubject, by_prompt
from harness.conformance.case import Case
from harness.conformance.comparison.check_results import Named, judged, skipped
from harness.conformance.comparison.tolerance_policies import carried_noise
from harness.errors import Unsupported
from harness.methods.base_model import logits
from harness.methods.loader import ADAPTER_FILES
from harness.records.imported import Imported, LossAgreement
from harness.records.record import CheckResult

_PROBE_TOKENS = 64
"""Largest number of tokens of a text on which logits are compared."""
_SPREADS = 3.0
"""Allowed distance of the adapter's loss from the range of the logged losses. The unit is the standard deviation of the
loss between batches."""


@dataclass(frozen=True)
class _Evaluated:
    """Method and dtype of the model that the Cell evaluates. The name of a check result contains both."""

    method: str
    dtype: str


def checks(run: CellRun, model: nn.Module, folder: Path, data: CellData | RandomData) -> Iterator[CheckResult]:
    """Yield the results of two checks: one loads the adapter anew, the other uses `model`, which the Cell evaluates.

    Both checks compare logits on the probe texts of `data` with float64 logits, which the reference computes from the
    adapter file. If the reference does not implement the adapter's config, the only result is a skipped check
    `reference` with the reason. folder: folder of the adapter.
    """
    base, case = Path(run.job.model.path), Case("trained", seed=run.cell.seed)
    evaluated = _Evaluated(run.cell.method, run.cell.dtype)
    prompts = list(_prompts(data.probe))
    try:
        truth = reference_logits(base, AdapterFile.read(folder), prompts)
    except Unsupported as error:
        yield skipped(evaluated, case, "reference", f"the reference does not implement this adapter file: {error}")
        return
    loader = run.registry.find("loader", ADAPTER_FILES, run.cell.implementation)
    subject = LoaderSubject(loader.function, run.cell.dtype, ExpectedAdapter("imported", folder, base, prompts, truth))
    draws, same_draws = itertools.tee(subject.rounded())

    def compared(one: Named, found: list[Tensor], rounded: Iterator[dict[str, Tensor]]) -> CheckResult:
        return judged(one, case, "logits", carried_noise(by_prompt(found), subject.truth(), rounded, run.cell.dtype))

    yield compared(subject, subject.loaded().logits(prompts, FIRST), draws)
    yield compared(evaluated, _logits(model, prompts), same_draws)


def _prompts(probe: Batch) -> Iterator[list[int]]:
    """Yield the last `_PROBE_TOKENS` token ids of each text of `probe`, without padding."""
    ids = probe.inputs["input_ids"].cpu()
    mask = probe.inputs.get("attention_mask", torch.ones_like(ids)).cpu().bool()
    for row, real in zip(ids, mask, strict=True):
        yield row[real][-_PROBE_TOKENS:].tolist()


def _logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the logits of each prompt on the CPU."""
    with torch.device(model.device):
        return [found.cpu() for found in logits(model, prompts)]


def notes(facts: Imported) -> list[str]:
    """Return sentences for the Record about an imported adapter.

    They state the adapter's origin, what is not known of its training, and the usual files that its folder lacks.
    """
    found = [f"{facts.origin}; the Cell loaded it and trained nothing"]
    found += [f"not known of the imported training: {facts.not_known}"] if facts.unknown else []
    return found + ([f"usual files that its folder lacks: {', '.join(facts.absent)}"] if facts.absent else [])


def compare_loss(model: nn.Module, facts: Imported, data: CellData | RandomData) -> LossAgreement:
    """Compare the loss of `model` on training texts of the task with the second half of the logged losses.

    If there is no logged loss, or too few training texts, the result has the reason instead of numbers.
    """
    if not facts.logged:
        return LossAgreement(because="the folder has no logged training loss")
    if isinstance(data, RandomData):
        return LossAgreement(because="there is no task with training texts (--task)")
    if len(data.training_like) < 2:  # a standard deviation needs two
        return LossAgreement(because="the task has too few training texts for two batches")
    model.eval()
    with torch.no_grad():
        losses = [float(loop.loss_of(model, batch)) for batch in data.training_like]
    last = [entry.loss for entry in facts.logged[len(facts.logged) // 2 :]]
    return LossAgreement(evaluated=fmean(losses), margin=_SPREADS * stdev(losses), lowest=min(last), highest=max(last))
