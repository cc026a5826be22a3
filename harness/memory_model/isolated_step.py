"""Take dry steps in separate processes. Libraries cache fake tensors, and a real run must not find them.

Each process is a fork of a process that has imported the libraries. A fork takes a hundredth of a second, and importing
the libraries again would take ten seconds.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from harness.assets import structure
from harness.cell.training import model as models
from harness.cell.training.batches import Batch
from harness.errors import HarnessError, UsageError
from harness.memory_model import dry_step, memory_tracker
from harness.memory_model.largest_batch import search
from harness.memory_model.messages import StepAnswer, StepRequest
from harness.methods.peft_config import UNREFERENCED
from harness.process.supervisor import run_in_fork
from harness.records.record import Cell

TIMEOUT_S = 30.0
_LATE = f"a step on fake tensors took more than {TIMEOUT_S:.0f} s"
_DIED = "the process of a step on fake tensors ended without a result"
_ERRORS = (*structure.BUILD_ERRORS, HarnessError, AssertionError)
"""Errors that code without support for fake tensors may raise. A failed prediction must not stop a Cell."""


def peak(
    cell: Cell,
    config: Mapping[str, Any],
    kind: str,
    parts: Sequence[Batch],
    others_B: int = 0,
    lacks: frozenset[str] = frozenset(),
) -> StepAnswer:
    """Return the peak of a step over the micro-batches `parts`, or the reason why there is none.

    For a Cell without training, the answer is empty. If the base is in 4 bits, stand-ins replace its layers. They have
    the same sizes and decode in the same way. If a library does not support fake tensors, the Method's reference takes
    the step.

    others_B: bytes to add to the peak for other tensors, such as the batches. lacks: names of an encoder's weights that
    are missing from its checkpoint.
    """
    if cell.training.steps == 0:
        return {}
    if cell.training.compile:
        return {"no_peak": "the memory of torch.compile is known only after compilation"}
    if cell.training.loop != "harness":
        return {"no_peak": f"only steps of the harness's own loop are predicted, not those of {cell.training.loop}"}
    dry_step.registry()  # discovered once here, not in each child
    errors: list[str] = []
    for by, step in _attempts(dry_step.DryStep(cell, config, kind, lacks)).items():
        found = _in_fork(partial(dry_step.peak, step, parts))
        if not isinstance(found, str):
            return {"peak_B": found + others_B, "peak_by": by, **_transience(errors)}
        errors.append(found)
        # Code this slow works in many small pieces. The reference, which is next, does not, so its peak would be wrong.
        if found == _LATE:
            break
    return {"no_peak": errors[0], **_transience(errors)}


def _transience(errors: Sequence[str]) -> StepAnswer:
    return {"transient": True} if {_LATE, _DIED} & {*errors} else {}


def _attempts(step: dry_step.DryStep) -> dict[str, dry_step.DryStep]:
    """Return the steps to try, in order. The first uses the Cell's own Implementation.

    A key names what replaces a part of the Cell, e.g. `the reference on a stand-in for the base`: the reference replaces
    the Cell's Implementation, and stand-ins replace the layers of a 4-bit base. If nothing is replaced, the key is "".
    """
    cell, base = step.cell, step.cell.base.quantization != "none"
    found = {"a stand-in for the base" * base: step}
    if cell.method not in UNREFERENCED and cell.implementation != "reference":
        by = "the reference" + " on a stand-in for the base" * base
        found[by] = replace(step, cell=cell.model_copy(update={"implementation": "reference"}))
    return found


def answer(request: StepRequest) -> StepAnswer:
    """Return the peak of a Cell's step on texts of `max_tokens` tokens.

    If the request has `largest`, return the peaks of a search for the largest step that fits.
    """
    cell = Cell.model_validate(request["cell"])
    if "largest" not in request:
        return _answer(cell, request, request["loss_tokens"])
    options = dict[str, Any](request["largest"])
    of, by = options.pop("of"), ""
    transience: StepAnswer = {}
    import_classes(json.dumps(request["config"]), request["kind"])

    def take(size: int) -> int | str:
        nonlocal by, transience
        one = cell.model_copy(update={"training": cell.training.model_copy(update={of: size})})
        found = _answer(one, request, one.training.max_tokens)
        by = found.get("peak_by", by)
        transience = {"transient": True} if found.get("transient") else transience
        return int(found["peak_B"]) if "peak_B" in found else str(found["no_peak"])

    tried = search(take, **options)
    found: StepAnswer = {"no_peak": tried} if isinstance(tried, str) else {"tried": tried, "peak_by": by}
    return {**found, **transience}


@cache
def import_classes(config: str, kind: str) -> None:
    """Build a model without weights. This imports transformers' classes, so that forks need not."""
    with suppress(*_ERRORS):  # each step reports the error
        structure.build(json.loads(config), kind, torch.float32)


def _answer(cell: Cell, request: StepRequest, loss_tokens: int) -> StepAnswer:
    parts = dry_step.longest_batches(cell, request["kind"], loss_tokens)
    try:
        lacks = models.lacks(request.get("checkpoint", ""))
    except HarnessError as error:
        return {"no_peak": error.what, "transient": True}
    return peak(cell, request["config"], request["kind"], parts, cell.training.steps * bytes_of(parts), lacks)


def bytes_of(batches: Sequence[Batch]) -> int:
    """Return the number of bytes in the tensors of batches."""
    return sum(t.nbytes for batch in batches for t in (*batch.inputs.values(), batch.labels))


def _in_fork(run: Callable[[], int]) -> int | str:
    """Return the result of `run` in a fork of this process, or the reason why there is none."""
    if not hasattr(os, "fork"):
        return "steps on fake tensors require fork, which this system does not have"
    answer = run_in_fork(partial(_pickled_result, run), TIMEOUT_S)
    if answer is None:
        return _LATE
    if not answer:
        return _DIED
    found: int | str
    found, entries = pickle.loads(answer)  # noqa: S301  # of our own fork
    memory_tracker.outputs.update(entries)
    return found


def _pickled_result(run: Callable[[], int]) -> bytes:
    """Return a pickled pair: the result of `run` or the reason why it failed, and the new entries of
    `memory_tracker.outputs`.
    """
    os.environ["PEFT_HARNESS_COMPILE"] = "0"
    torch.set_num_threads(1)  # torch's pool of threads exists only in the parent
    before = len(memory_tracker.outputs)
    try:
        found: int | str = run()
    except DynamicOutputShapeException as error:
        found = (
            f"the sizes of some tensors depend on data ({error.func}), as of experts that are multiplied one by one, in "
            "float64"
        )
    except UsageError as error:
        found = error.what  # it would end a real run of the Cell too
    except _ERRORS as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        found = f"a step on fake tensors failed: {type(error).__name__}: {first_line}"
    return pickle.dumps((found, dict(islice(memory_tracker.outputs.items(), before, None))))
