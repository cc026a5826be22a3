"""Latency of the base, the unmerged and the merged model: raw times, the variants taken in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from harness.methods import Adapted
from harness.records import Latency
from reference.layers import replace

Variant = Literal["base", "unmerged", "merged"]
TOKENS = 32
WARMUP = 1
PER_BLOCK = 4
DECODED = 8


def measure(adapted: Adapted, causal: bool, vocabulary: int, merged_refused: str, blocks: int = 3) -> list[Latency]:
    """Return forward (encoder) or prefill and decode (causal) times, batch 1, 32 tokens, for every variant there is.

    merged_refused: why merging is not to be tried, or empty. Variants alternate in blocks, so that a slow spell of the
    machine touches all; after each change of variant the first runs are thrown away. The model is left as it was.
    """
    model: Any = adapted.model
    model.eval()
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    ids = torch.randint(0, vocabulary, (1, TOKENS), generator=generator).to(device)
    kinds: Sequence[Literal["forward", "prefill", "decode"]] = ("prefill", "decode") if causal else ("forward",)
    samples: dict[tuple[Variant, str], list[float]] = {}

    def block(variant: Variant) -> None:
        for kind in kinds:
            run = _decode if kind == "decode" else _forward
            times = run(model, ids, causal)
            samples.setdefault((variant, kind), []).extend(times)

    if not adapted.can_merge:
        because = "there is no adapter: the trained model is shaped like its base"
        for _ in range(blocks):
            block("base")
        refused: dict[Variant, str] = {"unmerged": because, "merged": because}
    else:
        refused = {"merged": merged_refused} if merged_refused else {}
        for _ in range(blocks):
            block("unmerged")
            if not merged_refused:
                adapted.merge()
                block("merged")
                adapted.unmerge()
            adapted.detach()
            block("base")
            for path, layer in adapted.layers.items():
                replace(model, path, layer)
    order: tuple[Variant, ...] = ("base", "unmerged", "merged")
    return [
        Latency(
            variant=variant,
            kind=kind,
            batch=1,
            tokens=DECODED if kind == "decode" else TOKENS,
            seconds=samples.get((variant, kind), []),
            because=refused.get(variant, ""),
        )
        for variant in order
        for kind in kinds
    ]


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@torch.inference_mode()
def _forward(model: Any, ids: Tensor, causal: bool) -> list[float]:
    options = {"use_cache": False} if causal else {}
    return [_timed(lambda: model(input_ids=ids, **options), ids.device) for _ in range(WARMUP + PER_BLOCK)][WARMUP:]


@torch.inference_mode()
def _decode(model: Any, ids: Tensor, causal: bool) -> list[float]:
    """Return seconds per token of greedy decoding, one after the other, with a key-value cache."""
    seen = model(input_ids=ids, use_cache=True)
    times = []
    for _ in range(DECODED):
        token, cache = seen.logits[:, -1:].argmax(-1), seen.past_key_values

        def one(token: Tensor = token, cache: Any = cache) -> None:
            nonlocal seen
            seen = model(input_ids=token, past_key_values=cache, use_cache=True)

        times.append(_timed(one, ids.device))
    return times[WARMUP:]
