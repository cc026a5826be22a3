"""The task `synthetic`: random tokens instead of texts, to measure the cost of a Cell without a score. Imports no torch.

Every sequence has exactly `max_tokens` tokens. The loss of a causal model covers all tokens except the first. The loss
of an encoder uses random labels. Nothing is scored, so the Records have no accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from harness.methods.spec import FieldProblem
from harness.suites.schema import SYNTHETIC

if TYPE_CHECKING:
    from harness.assets.table import Source
    from harness.suites.schema import CellKeys


def problems(keys: CellKeys, models: Mapping[int, Source]) -> Iterator[FieldProblem]:
    """Yield a problem for each value that the task `synthetic` does not support, or that only this task supports.

    models: index in the entry's list of models -> source. Unknown models are left out.
    """
    if not keys.is_synthetic:
        for i, source in models.items():
            if source.scheme == "shape":
                what = f"`{source.name}` has no tokenizer and no trained weights, so it cannot read or score texts"
                yield ("model", i), what, f"write `task: {SYNTHETIC}`, which measures memory and speed"
    elif len(keys.task) > 1:
        what = f"`{SYNTHETIC}` is never scored, but the other tasks of the entry are"
        yield ("task", keys.task.index(SYNTHETIC)), what, "give it a separate entry"
    elif keys.evaluation.items is not None:
        what = f"`items` is {keys.evaluation.items}, but `{SYNTHETIC}` is never scored"
        yield ("evaluation", "items"), what, "remove `items`"
