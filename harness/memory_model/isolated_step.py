"""A dry step in a process of its own: what libraries keep from it (a cache of tensors without data) must not reach a run.

A fork of this one, for the libraries are imported here already: it takes a hundredth of a second, not ten.
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
from harness.memory_model import dry_step, shape_cache
from harness.memory_model.largest_batch import search
from harness.methods.peft_config import UNREFERENCED
from harness.process.supervisor import run_in_fork
from harness.records.record import Cell

TIMEOUT_S = 30.0
_LATE = f"a step without data took more than {TIMEOUT_S:.0f} s"
_ERRORS = (HarnessError, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
           TypeError, ValueError)  # fmt: skip
"""What programs raise that cannot do without data; a prediction is never worth a Cell."""


def peak(
    cell: Cell,
    config: Mapping[str, Any],
    kind: str,
    parts: Sequence[Batch],
    others_B: int = 0,
    lacks: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Return `peak_B`, `peak_by` and `no_peak` of a `Predicted`: of a step over `parts`, beside others_B bytes of data.

    lacks: names of an encoder's weights that its checkpoint lacks.

    A base in 4 bits is stood in for by layers that hold and decode as much, and a library that cannot do without data by
    the reference of its Method.
    """
    if cell.training.steps == 0:
        return {}
    if cell.training.compile:
        return {"no_peak": "what torch.compile keeps is known only when it has compiled"}
    dry_step.registry()  # here, and not anew in each child
    refusals = []
    for by, question in _questions(dry_step.DryStep(cell, config, kind, lacks)).items():
        found = _apart(partial(dry_step.peak, question, parts))
        if not isinstance(found, str):
            return {"peak_B": found + others_B, "peak_by": by}
        refusals.append(found)
        if found == _LATE:  # code of many small pieces takes little memory: another's would say nothing of it
            break
    return {"no_peak": refusals[0]}


def _questions(asked: dry_step.DryStep) -> dict[str, dry_step.DryStep]:
    """Map whose code stands in to the question that is then asked: the Cell's own first."""
    cell, base = asked.cell, asked.cell.base.quantization != "none"
    found = {"a stand-in for the base" * base: asked}
    if cell.method not in UNREFERENCED and cell.implementation != "reference":
        by = "the reference" + " on a stand-in for the base" * base
        found[by] = replace(asked, cell=cell.model_copy(update={"implementation": "reference"}))
    return found


def answer(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same for a Cell whose texts are not here: for the longest, `answer` tokens of each with a loss."""
    return _answer(Cell.model_validate(asked["cell"]), asked, asked["answer"])


def search_largest(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return `tried`, the peaks of a Cell's steps by what differs between them, with `peak_by`; or `no_peak`.

    `largest` of the question holds `of`, `batch` or `max_tokens`, and what `harness.memory_model.largest_batch.search` is told.
    """
    cell, told = Cell.model_validate(asked["cell"]), dict(asked["largest"])
    of, by = told.pop("of"), ""
    import_classes(json.dumps(asked["config"]), asked["kind"])

    def taken(number: int) -> int | str:
        nonlocal by
        one = cell.model_copy(update={"training": cell.training.model_copy(update={of: number})})
        found = _answer(one, asked, one.training.max_tokens)
        by = found.get("peak_by", by)
        return int(found["peak_B"]) if "peak_B" in found else str(found["no_peak"])

    tried = search(taken, **told)
    return {"no_peak": tried} if isinstance(tried, str) else {"tried": tried, "peak_by": by}


@cache
def import_classes(config: str, kind: str) -> None:
    """Build a model without weights, so that what transformers imports for it is here, and not anew in each fork."""
    with suppress(*_ERRORS):  # each step will tell
        structure.build(json.loads(config), kind, torch.float32)


def _answer(cell: Cell, asked: Mapping[str, Any], answer: int) -> dict[str, Any]:
    parts = dry_step.longest_batches(cell, asked["kind"], answer)
    try:
        lacks = models.lacks(asked.get("checkpoint", ""))
    except HarnessError as error:
        return {"no_peak": error.what}
    return peak(cell, asked["config"], asked["kind"], parts, cell.training.steps * bytes_of(parts), lacks)


def bytes_of(batches: Sequence[Batch]) -> int:
    """Return the bytes of the tensors of batches."""
    return sum(t.nbytes for batch in batches for t in (*batch.inputs.values(), batch.labels))


def _apart(run: Callable[[], int]) -> int | str:
    """Return what `run` returns in a fork of this process, or a sentence that says why there is nothing."""
    if not hasattr(os, "fork"):
        return "this system has no fork, in which a step could be taken without data"
    answer = run_in_fork(partial(_answered, run), TIMEOUT_S)
    if answer is None:
        return _LATE
    if not answer:
        return "the process of a step without data ended and said nothing"
    found: int | str
    found, shapes = pickle.loads(answer)  # noqa: S301  # of our own fork
    shape_cache.outputs.update(shapes)  # shapes alone, which the next step need not ask again
    return found


def _answered(run: Callable[[], int]) -> bytes:
    """Pickle what `run` returns, or why it cannot, with the shapes that it adds to the cache."""
    os.environ["PEFT_HARNESS_COMPILE"] = "0"
    torch.set_num_threads(1)  # the threads that torch knows of are the parent's
    before = len(shape_cache.outputs)
    try:
        found: int | str = run()
    except DynamicOutputShapeException as error:
        found = (
            f"how many numbers some of its tensors have is known only with data ({error.func}), as of experts that "
            "are multiplied one by one, in float64"
        )
    except UsageError as error:
        found = error.what  # of the Cell, with data or without
    except _ERRORS as error:
        said = (str(error).strip().splitlines() or [""])[0]
        found = f"a step cannot be taken without data: {type(error).__name__}: {said}"
    return pickle.dumps((found, dict(islice(shape_cache.outputs.items(), before, None))))
