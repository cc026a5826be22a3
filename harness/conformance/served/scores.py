"""Log-probabilities of the reference for the tokens that a server returned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.adapter_files.reference_logits import reference_logits
from harness.conformance.served.session import Observation
from harness.conformance.subject import DTYPES
from harness.console import foreign_output


@dataclass(frozen=True)
class Score:
    """The reference's numbers for one answer."""

    values: tuple[tuple[float, ...], ...]
    """Log-probabilities in nats, one tuple per position: first that of the token, then those of the other tokens."""
    best: tuple[int, ...]
    """The most likely token at each position."""
    margins: tuple[float, ...]
    """By how much the most likely token is above the server's token, in nats, at each position."""


def score(
    base: Path, adapter: AdapterFile | None, observations: Sequence[Observation], dtype: str = "float64"
) -> list[Score]:
    """Return the reference's score of each answer, computed in `dtype` for the server's own tokens.

    So a tie that the server decides in another way changes one token, and not all that follow.
    """
    sequences = list(dict.fromkeys(one.context + one.tokens[:-1] for one in observations))
    with foreign_output(), torch.no_grad():
        logits = reference_logits(base, adapter, sequences, DTYPES[dtype])
    # The softmax is computed in float64, also of rounded logits, so that all errors are those of the model.
    known = {sequence: torch.log_softmax(one.double(), -1) for sequence, one in zip(sequences, logits, strict=True)}
    return [_score(one, known[one.context + one.tokens[:-1]]) for one in observations]


def _score(observation: Observation, table: Tensor) -> Score:
    rows = table[len(observation.context) - 1 :]
    values = tuple(tuple(rows[i, [one.token, *one.others]].tolist()) for i, one in enumerate(observation.positions))
    top, best = rows.max(-1)
    margins = tuple(float(top[i]) - several[0] for i, several in enumerate(values))
    return Score(values, tuple(best.tolist()), margins)
