"""Worker process of `check PATH`: loads one adapter file with loaders, and compares their logits with the reference's.

The command is `python -m harness.conformance.adapter_files.loader_worker FD LINE TASK`. TASK is a LoaderTask as JSON.
The worker writes the events of `loader_protocol` to the file descriptor FD. LINE is one end of a pipe, also a file
descriptor; the worker dies when the other end closes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.adapter_files.loader_protocol import (
    Compared,
    LoaderBegun,
    LoaderLogits,
    LoaderTask,
    NotComparable,
    ReferenceComputed,
)
from harness.conformance.adapter_files.reference_logits import reference_logits
from harness.conformance.adapter_files.subject import FIRST, ExpectedAdapter, LoaderSubject, by_prompt
from harness.conformance.comparison.tolerance_policies import carried_noise
from harness.conformance.execution.suite_run import CaseRunner
from harness.conformance.execution.worker_protocol import send
from harness.conformance.findings.outcomes import CheckOutcome, Execution
from harness.conformance.served.prompts import drawn
from harness.errors import Unsupported, UsageError
from harness.methods.loader import ADAPTER_FILES
from harness.methods.registry import Implementation, discover
from harness.process.event_pipe import EventWriter, event_writer
from harness.process.out_of_memory import shortage
from harness.records.check import CheckId

PROMPTS = 4
"""Number of prompts whose logits are compared."""
_DTYPE = "float32"


def main(fd: int, line: int, task: LoaderTask) -> None:
    """Run the loaders of the task one after the other."""
    with event_writer(fd, line) as emit:
        try:
            with _reference():
                comparison = _Comparison.of(task, emit)
            for name, point in task.loaders:
                send(emit, LoaderBegun(begin=name))
                loader = discover(only=[point]).find("loader", ADAPTER_FILES, name)
                send(emit, Compared(result=comparison.judge(loader)))
        except _ReferenceError as error:
            send(emit, NotComparable(reason=error.reason))
            if error.unexpected:
                raise  # so that the traceback is printed


class _ReferenceError(Exception):
    """Error: the reference cannot compute logits. unexpected: True if the cause is a defect of peft-harness."""

    def __init__(self, reason: str, *, unexpected: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.unexpected = reason, unexpected


@contextmanager
def _reference() -> Iterator[None]:
    """Raise each error of the reference as a _ReferenceError, so that no loader is blamed for it."""
    try:
        yield
    except UsageError as error:
        raise _ReferenceError(f"{error.where}: {error.what}") from error
    except Unsupported as error:
        raise _ReferenceError(str(error)) from error
    except Exception as error:
        if shortage(error) is not None:
            raise _ReferenceError(f"the reference ran out of memory: {error}") from error
        what = f"the reference of peft-harness raised {type(error).__name__}: {error}"
        advice = "this is a defect of peft-harness, not of the file; please report it with the traceback on stderr and"
        raise _ReferenceError(f"{what}; {advice} adapter_config.json", unexpected=True) from error


@dataclass(frozen=True)
class _Comparison:
    """Compares loaders with the reference, by their logits for one adapter file and the same prompts."""

    adapter: ExpectedAdapter
    emit: EventWriter

    @classmethod
    def of(cls, task: LoaderTask, emit: EventWriter) -> _Comparison:
        """Draw prompts, and compute their logits by the reference. Raises UsageError or Unsupported if this fails."""
        adapter = AdapterFile.read(Path(task.adapter))
        base = adapter.base_for_task(Path(task.base))
        prompts = drawn(base, 0)[:PROMPTS]
        truth = reference_logits(base, adapter, prompts)
        send(emit, ReferenceComputed(runs=0))
        return cls(ExpectedAdapter("file", adapter.folder, base, prompts, truth), emit)

    def judge(self, loader: Implementation) -> LoaderLogits:
        """Load the adapter file with `loader`, and compare its logits with those of the reference."""
        subject = LoaderSubject(loader.function, _DTYPE, self.adapter)

        def load() -> list[Tensor]:
            with torch.random.fork_rng():
                logits: object = subject.loaded().logits(self.adapter.prompts, FIRST)
            if not isinstance(logits, list) or not all(isinstance(one, Tensor) for one in logits):
                raise TypeError(f"logits returned {type(logits).__name__}, not a list of tensors")
            return logits

        runner = CaseRunner(loader, self.adapter.name, _DTYPE)
        found = runner.attempt(CheckId(ADAPTER_FILES, "logits", _DTYPE, "loaded"), load)
        if isinstance(found, CheckOutcome):
            verdict: Any = "unsupported" if found.execution is Execution.UNSUPPORTED else "raises"
            return LoaderLogits(loader=loader.name, verdict=verdict, detail=found.result.detail)
        judgement = carried_noise(by_prompt(found), subject.truth(), self._rounded(subject), _DTYPE)
        if not judgement.decided:
            return LoaderLogits(loader=loader.name, verdict="not compared", detail=judgement.worst)
        return LoaderLogits(
            loader=loader.name,
            verdict="agrees" if judgement.passed else "differs",
            largest=_largest(found, self.adapter.logits),
            share=judgement.ratio if judgement.error is not None else None,
            detail="" if judgement.passed else f"{judgement.tensor}, {judgement.worst}",
        )

    def _rounded(self, subject: LoaderSubject) -> Iterator[dict[str, Tensor]]:
        with _reference():
            for runs, logits in enumerate(subject.rounded(), 1):
                send(self.emit, ReferenceComputed(runs=runs))
                yield logits


def _largest(have: list[Tensor], want: list[Tensor]) -> float | None:
    """Return the largest absolute difference between logits. Return None if it is not finite, or if shapes differ."""
    pairs = list(zip(have, want, strict=False))
    if len(have) != len(want) or any(one.shape != other.shape for one, other in pairs):
        return None
    difference = torch.stack([(one.double() - other).abs().max() for one, other in pairs]).max()
    return float(difference) if difference.isfinite() else None


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), LoaderTask.model_validate_json(sys.argv[3]))
