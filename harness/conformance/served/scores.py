"""Log-probabilities of the reference for the tokens that a server returned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
    """The reference's numbers for one observation."""

    values: tuple[float, ...]
    """Log-probabilities in nats, in the order of `returned`."""
    best: tuple[int, ...]
    """The most likely token at each position."""
    margins: tuple[float, ...]
    """By how much the most likely token is above the server's token, in nats, at each position."""


def returned(observation: Observation) -> list[float]:
    """Return the server's log-probabilities: at each position first that of the token, then those of the others."""
    return [value for one in observation.positions for value in (_number(one.logprob), *one.others.values())]


def score(
    base: Path, adapter: AdapterFile | None, observations: Sequence[Observation], dtype: str = "float64"
) -> list[Score]:
    """Return the reference's score of each observation, computed in `dtype` for the server's own tokens."""
    sequences = list(dict.fromkeys(one.context + one.tokens[:-1] for one in observations))
    with foreign_output(), torch.no_grad():
        logits = reference_logits(base, adapter, sequences, DTYPES[dtype])
    # Compute the softmax in float64, also of rounded logits: its errors are those of the model.
    known = {sequence: torch.log_softmax(one.double(), -1) for sequence, one in zip(sequences, logits, strict=True)}
    return [_score(one, known[one.context + one.tokens[:-1]]) for one in observations]


def _score(observation: Observation, table: Tensor) -> Score:
    rows = table[len(observation.context) - 1 :]
    ids = [[one.token, *one.others] for one in observation.positions]
    values = [float(rows[i, one]) for i, several in enumerate(ids) for one in several]
    top, best = rows.max(-1)
    margins = [float(top[i] - rows[i, several[0]]) for i, several in enumerate(ids)]
    return Score(tuple(values), tuple(best.tolist()), tuple(margins))


def rescaled(adapter: AdapterFile, factor: float) -> AdapterFile:
    """Return the adapter with a scaling that is `factor` times as large in every layer."""
    pattern = {key: alpha * factor for key, alpha in (adapter.config.get("alpha_pattern") or {}).items()}
    settings = adapter.settings
    return replace(
        adapter, config={**adapter.config, "lora_alpha": settings.lora_alpha * factor, "alpha_pattern": pattern}
    )


def mistakes(adapter: AdapterFile, others: Mapping[str, AdapterFile]) -> Iterator[tuple[str, AdapterFile | None]]:
    """Yield typical mistakes of servers: a description, and the adapter that a server with this mistake applies."""
    yield "the base: the adapter is not applied", None
    for name, other in others.items():
        yield f"adapter {name}: a wrong slot, or a stale adapter", other
    if adapter.config.get("use_rslora"):
        ignored = replace(adapter, config={**adapter.config, "use_rslora": False})
        yield "the adapter with the scaling alpha / r: use_rslora is ignored", ignored
    for factor in (2.0, 0.5, float(adapter.settings.r), 1 / adapter.settings.lora_alpha):
        yield f"the adapter with {factor:.3g} times its scaling", rescaled(adapter, factor)
    yield "the adapter with transposed updates of square layers", _Changed(**vars(adapter), change=_transpose)
    for module in sorted({key.split(".lora_B.")[0].rpartition(".")[2] for key in adapter.header if ".lora_B." in key}):
        yield f"the adapter without its {module}", _Changed(**vars(adapter), change=partial(_without, module))


@dataclass(frozen=True)
class _Changed(AdapterFile):
    """An adapter with other tensors than its file."""

    change: Callable[[dict[str, Tensor]], None]
    """Function that changes the tensors of the file."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the changed tensors."""
        self.change(found := super().tensors())
        return found


def _transpose(tensors: dict[str, Tensor]) -> None:
    for a in [key for key in tensors if ".lora_A." in key]:
        b = a.replace(".lora_A.", ".lora_B.")
        if b in tensors and tensors[a].dim() == 2 and tensors[a].shape[1] == tensors[b].shape[0]:
            tensors[a], tensors[b] = tensors[b].T.contiguous(), tensors[a].T.contiguous()


def _without(module: str, tensors: dict[str, Tensor]) -> None:
    for key in tensors:
        if f".{module}.lora_B." in key:
            tensors[key] = torch.zeros_like(tensors[key])


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
