"""Measure latencies of three variants in turn: the base model, the unmerged model and the merged model.

The unmerged model runs the adapter beside the weights. In the merged model, the adapter is added to the weights. The
results are raw samples.
"""

from __future__ import annotations

import inspect
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.assets.model_folder import CACHES
from harness.errors import ImplementationError
from harness.methods.spec import Adapted
from harness.records.record import DECODED, Evaluation, Latency
from reference.shared.layers import replace

Variant = Literal["base", "unmerged", "merged", "multi-adapter"]
PassKind = Literal["forward", "prefill", "decode"]
WARMUP = 1
BLOCKS = 4
"""Number of blocks. In each block, every variant is timed once. The number is even, so that all variants have the same
average position in time."""
DECODING_BLOCKS = 2
"""Number of blocks at the start that also time decoding. Decoding takes longer than the passes over the prompts. This number
is even for the same reason as BLOCKS."""
PER_BLOCK = 3
SLOW_S, FEWER = 0.05, 2
"""If a forward pass takes more than SLOW_S seconds, each block times only FEWER passes of a variant: eight passes in
all blocks together. A 95 % interval needs at least six."""
_ORDER: tuple[Variant, ...] = ("base", "unmerged", "merged")


def measure(
    adapted: Adapted,
    causal: bool,
    vocabulary: int,
    merged_refused: str,
    evaluation: Evaluation,
    *,
    blocks: int = BLOCKS,
    layers: Mapping[str, nn.Module] | None = None,
) -> list[Latency]:
    """Return the times of every variant: forward times for an encoder, prefill and decode times for a causal model.

    Each block times all variants, in the reverse order of the block before. So a slow period of the machine affects all
    variants, and a slow drift affects them equally. The first runs after each change of variant are discarded. At the
    end the model is in its previous state. Raises ImplementationError if the adapter's own methods fail.

    evaluation: number and length of prompts, and number of passes. By default there are twelve passes, or eight if a
    pass is slow. merged_refused: the reason why the merged model is not timed; empty if it is timed. layers: path ->
    adapted layer. They must be given if `detach` was called before, because `detach` may have emptied `Adapted.layers`.
    """
    timed = Prompt(adapted.model, causal, vocabulary, evaluation)
    block = timed.block
    refused: dict[Variant, str] = {}
    if not adapted.can_merge:
        because = "there is no adapter: the trained model has the structure of its base"
        for _ in range(blocks):
            block("base")
        refused = {"unmerged": because, "merged": because}
    else:
        refused = {"merged": merged_refused} if merged_refused else {}
        variants = _Variants(adapted, adapted.layers if layers is None else layers)
        each: list[Variant] = ["unmerged", "base"] if merged_refused else ["unmerged", "merged", "base"]
        for variant in interleaved(each, blocks):
            with variants.active(variant):
                block(variant)
    return [found for variant in _ORDER for found in timed.latencies(variant, refused.get(variant, ""))]


def interleaved(variants: Sequence[Variant], blocks: int = BLOCKS) -> Iterator[Variant]:
    """Yield each variant once per block, in an order that reverses from block to block."""
    for index in range(blocks):
        yield from variants[:: -1 if index % 2 else 1]


def unmeasured(model: nn.Module, causal: bool, vocabulary: int, because: str, evaluation: Evaluation) -> list[Latency]:
    """Return the latencies that `measure` would return, but with the reason `because` instead of times."""
    timed = Prompt(model, causal, vocabulary, evaluation)
    return [found for variant in _ORDER for found in timed.latencies(variant, because)]


class Prompt:
    """A batch of prompts of equal length, and the times that a model has taken for this batch so far.

    batch: number of prompts. None: `evaluation` gives this number.
    """

    def __init__(
        self, model: nn.Module, causal: bool, vocabulary: int, evaluation: Evaluation, batch: int | None = None
    ) -> None:
        self.model, self.causal = model.eval(), causal
        self.length, self.no_decoding = _prompt(model, causal, evaluation.prompt_tokens)
        self.passes = evaluation.passes
        self.shape, self.vocabulary = (batch or evaluation.prompt_batch, self.length), vocabulary
        self.kinds: Sequence[PassKind] = ("prefill", "decode") if causal else ("forward",)
        self.samples: dict[tuple[Variant, PassKind], list[float]] = {}
        self._blocks = Counter[Variant]()

    @cached_property
    def ids(self) -> Tensor:
        """The token ids of the prompts, int64 (N, L). They are drawn when this property is first read.

        `unmeasured`, which is called when memory is short, does not read it, and so allocates nothing.
        """
        drawn = torch.randint(0, self.vocabulary, self.shape, generator=torch.Generator().manual_seed(0))
        return drawn.to(next(self.model.parameters()).device)

    def block(self, variant: Variant) -> None:
        """Time the model in its current state, and store the samples under `variant`.

        Decoding is timed in the first blocks only. It precedes prefill, because its passes over the prompts warm the
        model up. So prefill needs no other warm-up.
        """
        warm_s: float | None = None
        if self.causal and not self.no_decoding and self._blocks[variant] < DECODING_BLOCKS:
            warm_s, seconds = _decode(self.model, self.ids, self._per_block(DECODING_BLOCKS))
            self._add(variant, "decode", seconds)
        self._add(variant, self.kinds[0], _forward(self.model, self.ids, self.causal, self._per_block(BLOCKS), warm_s))
        self._blocks[variant] += 1

    def _per_block(self, blocks: int) -> int | None:
        """Return the number of passes of a block, if each of `blocks` has an equal part of those that were asked for."""
        return None if self.passes is None else math.ceil(self.passes / blocks)

    def _add(self, variant: Variant, kind: PassKind, seconds: list[float]) -> None:
        self.samples.setdefault((variant, kind), []).extend(seconds)

    def latencies(self, variant: Variant, because: str = "", adapters: int | None = None) -> list[Latency]:
        """Return one Latency for each kind of pass: forward, or prefill and decode.

        because: the reason why there are no times. adapters: number of adapters in the batch.
        """
        return [
            Latency(
                variant=variant,
                kind=kind,
                batch=self.shape[0],
                tokens=DECODED if kind == "decode" else self.length,
                seconds=self.samples.get((variant, kind), []),
                because=because or (self.no_decoding if kind == "decode" else ""),
                adapters=adapters,
            )
            for kind in self.kinds
        ]


def positions(model: nn.Module) -> int | None:
    """Return the maximum number of tokens that a model reads at once, or None if its config sets no limit."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    most -= getattr(model, "virtual_tokens", 0)
    for name, module in model.named_modules():
        # RoBERTa's positions start after the index of the padding token.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(most - module.padding_idx - 1)
    return most


def _prompt(model: nn.Module, causal: bool, tokens: int) -> tuple[int, str]:
    """Return the length of the prompt, and the reason why no tokens can be decoded after it (empty if they can)."""
    most = positions(model) or tokens + DECODED
    if not causal:
        return min(tokens, most), ""
    if not _cache(model):
        return min(tokens, most), f"the model's forward takes no key-value cache ({', '.join(CACHES)})"
    if most > DECODED:
        return min(tokens, most - DECODED), ""
    return min(tokens, most), f"the model has {most} positions, no room to decode {DECODED} tokens after a prompt"


def _cache(model: nn.Module) -> str:
    """Return the name of a model's key-value cache, or an empty string if the model has none.

    The cache has this name both as an argument of the model and in the model's output.
    """
    takes = inspect.signature(model.forward).parameters
    return next((name for name in CACHES if name in takes), "")


class _Variants:
    """A switch between the base, unmerged and merged variants. It calls the adapter's own methods.

    It raises ImplementationError if `detach` leaves a layer adapted, or if `unmerge` does not restore a layer.
    """

    def __init__(self, adapted: Adapted, layers: Mapping[str, nn.Module]) -> None:
        self._adapted, self._layers, self._off = adapted, dict(layers), False
        self.attach()

    def attach(self) -> None:
        """Put the adapted layers back into the model, and into `Adapted.layers`, which `detach` may have emptied."""
        for path, layer in self._layers.items():
            replace(self._adapted.model, path, layer)
        with self._guarded("layers"):
            self._adapted.layers.update(self._layers)
        if self._off and (again := getattr(self._adapted, "attach_again", None)) is not None:
            again()  # puts back what is no layer, e.g. virtual tokens
        self._off = False

    @contextmanager
    def active(self, variant: Variant) -> Iterator[None]:
        """Inside the context, make `variant` active. At the end, make the unmerged model active again."""
        if variant == "merged":
            self.merge()
        elif variant == "base":
            self.detach()
        yield
        if variant == "merged":
            self.unmerge()
        elif variant == "base":
            self.attach()

    def merge(self) -> None:
        """Merge the adapter. The layers are not checked, because some libraries merge inside the adapted layer."""
        with self._guarded("merge()"):
            self._adapted.merge()

    def unmerge(self) -> None:
        """Unmerge the adapter. Raises ImplementationError if the model does not contain every adapted layer again."""
        with self._guarded("unmerge()"):
            self._adapted.unmerge()
        if gone := [path for path, is_adapted in self._adapted_paths() if not is_adapted]:
            raise self._fault("unmerge()", f"did not restore {gone[0]} and {len(gone) - 1} other layers")

    def detach(self) -> None:
        """Detach the adapter. Raises ImplementationError if a layer is still adapted.

        Without this check, the time of an adapted layer could be recorded as a time of the base.
        """
        with self._guarded("detach()"):
            self._adapted.detach()
        self._off = True
        if left := [path for path, is_adapted in self._adapted_paths() if is_adapted]:
            raise self._fault("detach()", f"left {left[0]} and {len(left) - 1} other layers adapted")

    def _adapted_paths(self) -> list[tuple[str, bool]]:
        model = self._adapted.model
        return [(path, model.get_submodule(path) is layer) for path, layer in self._layers.items()]

    @contextmanager
    def _guarded(self, call: str) -> Iterator[None]:
        try:
            yield
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # RuntimeError may mean no memory
            raise self._fault(call, f"raised {type(error).__name__}: {error}") from error

    def _fault(self, call: str, did: str) -> ImplementationError:
        kind = type(self._adapted)
        return ImplementationError(
            f"the implementation is at fault, not the model: {call} of {kind.__module__}.{kind.__qualname__} {did}",
            where="latency phase",
            hint="its merge(), unmerge() and detach() must work after the layers were restored; report it to its authors",
        )


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@torch.inference_mode()
def _forward(model: nn.Module, ids: Tensor, causal: bool, passes: int | None, warm_s: float | None) -> list[float]:
    """Run the model over the prompts. Return the seconds of each pass.

    passes: number of passes to time; None for the usual number. warm_s: seconds of an earlier pass over the prompts.
    None if there was none; then the first pass is a warm-up.
    """
    options = {"use_cache": False} if causal else {}

    def once() -> float:
        return _timed(lambda: model(input_ids=ids, **options), ids.device)

    slowest = max(once() for _ in range(WARMUP)) if warm_s is None else warm_s
    return [once() for _ in range(passes or (FEWER if slowest > SLOW_S else PER_BLOCK))]


@torch.inference_mode()
def _decode(model: nn.Module, ids: Tensor, passes: int | None) -> tuple[float, list[float]]:
    """Decode greedily with a key-value cache. Return the seconds of the last prefill, and of each token.

    passes: smallest number of tokens to time; None for a single round of decoding.
    """
    prefill_s, times = 0.0, list[float]()
    while len(times) < (passes or 1):
        prefill_s, seconds = _decoded(model, ids)
        times += seconds
    return prefill_s, times


def _decoded(model: nn.Module, ids: Tensor) -> tuple[float, list[float]]:
    """Decode a few tokens after the prompts. Return the seconds of the prefill, and of each token except the first.

    The first token is a warm-up.
    """
    name = _cache(model)
    output: Any = None

    def prefill() -> None:
        nonlocal output
        output = model(input_ids=ids, use_cache=True)

    prefill_s, times = _timed(prefill, ids.device), []
    for _ in range(DECODED):
        token, cache = output.logits[:, -1:].argmax(-1), {name: getattr(output, name)}

        def one(token: Tensor = token, cache: Any = cache) -> None:
            nonlocal output
            output = model(input_ids=token, **cache, use_cache=True)

        times.append(_timed(one, ids.device))
    return prefill_s, times[WARMUP:]
