"""Find the mistake that explains wrong answers: which adapter did the server apply instead of the right one?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.served.noise import Errors
from harness.conformance.served.rows import ScoredAnswer
from harness.conformance.served.scores import score

_UNKNOWN = "no typical mistake explains them"
_HEAD = "lm_head"
_ROW_PARALLEL = ("o_proj", "out_proj", "c_proj", "down_proj", "fc2", "w2")
"""Names of row-parallel layers. A server with tensor parallelism splits the inputs of these layers, and the outputs of
all other layers."""


def cause(
    base: Path,
    adapter: AdapterFile | None,
    others: Mapping[str, AdapterFile],
    wrong: Sequence[ScoredAnswer],
    limit: Errors,
) -> str:
    """Return a sentence that names the mistakes behind wrong answers, with the number of tokens that each mistake
    explains.

    adapter: the right adapter, or None for the base. others: the other adapters of the server, by name. wrong: the
    wrong answers. limit: the largest allowed errors.
    """
    # An answer without a wrong position is wrong as a whole: its errors together exceed rounding. All its positions count.
    positions = [
        row.inaccurate(limit) or (range(len(row.differences)) if not row.unlikely(limit) else ()) for row in wrong
    ]
    total = sum(map(len, positions))
    if not total:
        count = sum(len(row.unlikely(limit)) for row in wrong)
        return (
            f"the log-probabilities are right, but {count} tokens are not the most likely ones: decoding is not greedy"
        )
    missing = [row.observation.missing for row in wrong]
    left = [set(several) - none for several, none in zip(positions, missing, strict=True)]
    found = []
    if count := sum(map(len, missing)):
        found.append(f"at {count} of {total} wrong positions, a log-probability is NaN or null")
    for text, other in _mistakes(adapter, others) if any(left) else ():
        scores = score(base, other, [row.observation for row in wrong])
        unexplained = [
            ScoredAnswer(row.observation, one).inaccurate(limit) for row, one in zip(wrong, scores, strict=True)
        ]
        count = sum(map(len, left))
        left = [several & set(still) for several, still in zip(left, unexplained, strict=True)]
        if count := count - sum(map(len, left)):
            found.append(f"at {count} of {total} wrong positions, the answer is that of {text}")
        if not any(left):
            break
    return "; ".join(found) or _UNKNOWN


def rescaled(adapter: AdapterFile, factor: float) -> AdapterFile:
    """Return the adapter with a scaling that is `factor` times as large in every layer."""
    pattern = {key: alpha * factor for key, alpha in adapter.settings.alpha_pattern.items()}
    return replace(
        adapter,
        config={**adapter.config, "lora_alpha": adapter.settings.lora_alpha * factor, "alpha_pattern": pattern},
    )


def _mistakes(
    adapter: AdapterFile | None, others: Mapping[str, AdapterFile]
) -> Iterator[tuple[str, AdapterFile | None]]:
    """Yield typical mistakes of servers, each as a description and the adapter that a server with this mistake applies."""
    for name, other in others.items():
        yield f"adapter {name}", other
        if mixed := _with_head(adapter, other):
            yield f"the {'base' if adapter is None else 'adapter'} with the head of adapter {name}", mixed
    if adapter is None:
        return
    yield "the base: the adapter is not applied", None
    if adapter.settings.use_rslora:
        ignored = replace(adapter, config={**adapter.config, "use_rslora": False})
        yield "the adapter with the scaling alpha / r: use_rslora is ignored", ignored
    alpha = adapter.settings.lora_alpha
    for factor in (2.0, 0.5, float(adapter.settings.r), *([1 / alpha] if alpha else [])):
        yield f"the adapter with {factor:.3g} times its scaling", rescaled(adapter, factor)
    yield "the adapter with transposed updates of square layers", _Changed(**vars(adapter), change=_transpose)
    for kind, half, (times, factor) in product(("row", "column"), (0, 1), (("without", 0.0), ("with twice", 2.0))):
        text = f"the adapter {times} the {('first', 'second')[half]} of two shards of its {kind}-parallel layers"
        yield text, _Changed(**vars(adapter), change=partial(_shard, kind, half, factor))
    for module in sorted({_module(key) for key in adapter.header if ".lora_B." in key}):
        yield f"the adapter without its {module}", _Changed(**vars(adapter), change=partial(_without, module))


@dataclass(frozen=True)
class _Changed(AdapterFile):
    """An adapter file whose tensors are changed after they are read."""

    change: Callable[[dict[str, Tensor]], None]
    """Function that changes a dict of the file's tensors in place."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the file, changed by `change`."""
        self.change(found := super().tensors())
        return found


def _with_head(adapter: AdapterFile | None, other: AdapterFile) -> _Changed | None:
    """Return `adapter`, but with the update of the output head from `other`. adapter: None for the base.

    Return None if `other` has no update of the head, or if one file cannot hold the settings of both adapters.
    """
    if not any(map(_is_of_head, other.header)):
        return None
    if adapter is None:
        return _Changed(**vars(other), change=_keep_head)
    own, its = adapter.settings, other.settings
    if isinstance(own.target_modules, str) or any(one.use_dora or one.lora_bias for one in (own, its)):
        return None
    rank = its.rank(_HEAD)
    alpha = its.scaling(_HEAD) * (math.sqrt(rank) if own.use_rslora else rank)
    config = {
        **adapter.config, "target_modules": [*(own.target_modules or ()), _HEAD],
        "rank_pattern": {_HEAD: rank} | {key: one for key, one in own.rank_pattern.items() if key != _HEAD},
        "alpha_pattern": {_HEAD: alpha} | {key: one for key, one in own.alpha_pattern.items() if key != _HEAD},
    }  # fmt: skip
    return _Changed(adapter.weights, config, adapter.header, change=partial(_take_head, other))


def _is_of_head(key: str) -> bool:
    return f".{_HEAD}.lora_" in key


def _keep_head(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if not _is_of_head(key)]:
        del tensors[key]


def _take_head(other: AdapterFile, tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if _is_of_head(key)]:
        del tensors[key]
    tensors |= {key: tensor for key, tensor in other.tensors().items() if _is_of_head(key)}


def _transpose(tensors: dict[str, Tensor]) -> None:
    for a in [key for key in tensors if ".lora_A." in key]:
        b = a.replace(".lora_A.", ".lora_B.")
        if b in tensors and tensors[a].dim() == 2 and tensors[a].shape[1] == tensors[b].shape[0]:
            tensors[a], tensors[b] = tensors[b].T.contiguous(), tensors[a].T.contiguous()


def _shard(kind: str, half: int, factor: float, tensors: dict[str, Tensor]) -> None:
    """Multiply one half of A in row-parallel layers, or one half of B in all other layers, by `factor`.

    kind: `row` for A, `column` for B. half: 0 for the first half, 1 for the second. With tensor parallelism on two
    GPUs, each half is computed in its own process.
    """
    for key in tensors:
        module, _, name = key.rpartition(".lora_")
        in_rows = module.rpartition(".")[2] in _ROW_PARALLEL
        if in_rows == (kind == "row") and name.startswith("A." if in_rows else "B."):
            tensors[key] = tensors[key].clone()
            # One row or column gives one part only.
            for part in tensors[key].chunk(2, dim=1 if in_rows else 0)[half : half + 1]:
                part.mul_(factor)


def _without(module: str, tensors: dict[str, Tensor]) -> None:
    for key in tensors:
        if ".lora_B." in key and _module(key) == module:
            tensors[key] = torch.zeros_like(tensors[key])


def _module(key: str) -> str:
    """Return the name of the adapted layer, such as `q_proj`, from `key`, the name of its B in an adapter file."""
    return key.partition(".lora_B.")[0].rpartition(".")[2]
