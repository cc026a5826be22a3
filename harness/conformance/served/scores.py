"""Compute the reference's log-probabilities for the tokens that a server returned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.adapter_files.reference_logits import reference_logits
from harness.conformance.served.rows import ReferenceScore
from harness.conformance.served.session import ServedAnswer
from harness.conformance.subject import DTYPES
from harness.console import hold_output
from harness.errors import UsageError


def score(
    base: Path, adapter: AdapterFile | None, observations: Sequence[ServedAnswer], dtype: str = "float64"
) -> list[ReferenceScore]:
    """Return the reference's score of each answer, computed in `dtype` for the server's own tokens.

    The reference continues from the tokens that the server chose. So if two tokens are equally likely, the server's
    choice affects one position only, instead of all later ones. Raises UsageError if the adapter does not fit the base,
    or if the base does not have the server's tokens.
    """
    # Only the logits of the answers are kept: those of a long prompt would take a gigabyte.
    starts: dict[tuple[int, ...], int] = {}
    for one in observations:
        sequence, start = one.context + one.tokens[:-1], len(one.context) - 1
        starts[sequence] = min(start, starts.get(sequence, start))
    transformers.utils.logging.disable_progress_bar()
    with hold_output(), torch.no_grad():
        logits = reference_logits(base, adapter, list(starts), DTYPES[dtype], starts=list(starts.values()))
    # The softmax is always computed in float64, so that it adds no error to those of the logits.
    largest = max(
        token for one in observations for position in one.positions for token in (position.token, *position.others)
    )
    if largest >= (size := logits[0].shape[-1]):
        what = f"the server returned token {largest}, and the vocabulary of the base model has {size} tokens"
        raise UsageError(what, where=f"--base-model {base}", hint="give the folder that the server loads")
    known = {sequence: torch.log_softmax(one.double(), -1) for sequence, one in zip(starts, logits, strict=True)}
    found = []
    for one in observations:
        sequence = one.context + one.tokens[:-1]
        found.append(_score(one, known[sequence][len(one.context) - 1 - starts[sequence] :]))
    return found


def _score(observation: ServedAnswer, rows: Tensor) -> ReferenceScore:
    """Return the reference's score of an answer. rows: log-probabilities (positions, vocabulary) of the reference."""
    values = tuple(tuple(rows[i, [one.token, *one.others]].tolist()) for i, one in enumerate(observation.positions))
    top, best = rows.max(-1)
    margins = tuple(float(top[i]) - several[0] for i, several in enumerate(values))
    return ReferenceScore(values, tuple(best.tolist()), margins)
