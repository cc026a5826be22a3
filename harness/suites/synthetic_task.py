"""The task `synthetic`: random tokens in the place of texts, for what a Cell costs and not for what it scores. No torch.

Every sequence has exactly `max_tokens` tokens, and the loss is over all that have one before them; of an encoder, over
labels that are random too. Nothing is scored, so that its Records hold no accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from harness.suites.tasks import SYNTHETIC
from harness.yaml_lines import KeyPath

if TYPE_CHECKING:
    from harness.assets.table import Source
    from harness.suites.schema import CellKeys


def is_meant(keys: CellKeys) -> bool:
    """Say whether an entry has this task, so that it need not say how many items are scored."""
    return SYNTHETIC in (keys.task or [])


def problems(keys: CellKeys, models: Mapping[int, Source]) -> Iterator[tuple[KeyPath, str, str]]:
    """Yield where, what and the mend of each thing in an entry that does not go with the task it has.

    models: by their place in the entry, as far as they are known.
    """
    tasks = keys.task or []
    if SYNTHETIC not in tasks:
        for i, source in models.items():
            if source.scheme == "shape" and tasks:
                what = f"`{source.name}` has no tokenizer and no trained weights, so no text and no score"
                yield ("model", i), what, f"write `task: {SYNTHETIC}`, which measures memory and speed"
        return
    if len(tasks) > 1:
        what = f"`{SYNTHETIC}` is never scored, and stands beside tasks that are"
        yield ("task", tasks.index(SYNTHETIC)), what, "give it an entry of its own"
        return
    if keys.evaluation.items is not None:
        what = f"`items` is {keys.evaluation.items}, and `{SYNTHETIC}` scores nothing"
        yield ("evaluation", "items"), what, "leave `items` out"
