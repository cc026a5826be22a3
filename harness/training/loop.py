"""The training loop: forward, backward, optimizer step, and the raw numbers of each step. Nothing else is timed."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from harness.methods import Adapted
from harness.records import Training
from harness.training.batches import Batch

MAX_STEP_SEED = 2**31


@dataclass
class StepSamples:
    """Raw numbers, one per step: loss, seconds, gradient norm, real and padded tokens."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    padded_tokens: list[int] = field(default_factory=list)


class Diverged(Exception):  # noqa: N818
    """Training gave a NaN or infinite loss, or no gradient at all: an outcome, not a crash."""


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy, of the labels (encoders) or of the answers' tokens (causal models)."""
    if not any(batch.answers):
        logits = model(**batch.inputs).logits
        return nn.functional.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, batch.labels)
    longest = max(batch.answers)
    logits = last_logits(model, batch.inputs, longest + 1)
    rows = [logits[row, -n - 1 : -1] for row, n in enumerate(batch.answers)]
    wanted = [batch.inputs["input_ids"][row, -n:] for row, n in enumerate(batch.answers)]
    flat = torch.cat(rows)
    return nn.functional.cross_entropy(flat.float() if flat.dtype != torch.float64 else flat, torch.cat(wanted))


def last_logits(model: nn.Module, inputs: dict[str, Tensor], count: int) -> Tensor:
    """Return the logits of the last `count` positions (N, count, vocabulary); no others are computed, where it can."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**inputs, logits_to_keep=count, use_cache=False).logits  # type: ignore[no-any-return]
    return model(**inputs, use_cache=False).logits[:, -count:]  # type: ignore[no-any-return]


def make_optimizer(
    adapted: Adapted, head: Sequence[nn.Parameter], recipe: Training
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return the optimizer over adapter and head, and its schedule: linear warm-up, then linearly down to zero.

    It is AdamW, or the Method's own with the head added.
    """
    heads = {id(p) for p in head}
    body = [p for p in adapted.parameters() if id(p) not in heads]
    head_lr = recipe.lr if recipe.head_lr is None else recipe.head_lr
    of_body: list[dict[str, Any]] = [{"params": body, "lr": recipe.lr}] if body else []
    of_head: list[dict[str, Any]] = [{"params": list(head), "lr": head_lr}] if head else []
    optimizer = adapted.optimizer(recipe.lr, recipe.weight_decay)
    if optimizer is None:
        optimizer = torch.optim.AdamW(of_body + of_head, weight_decay=recipe.weight_decay)
    else:
        for group in of_head:  # a Method's own optimizer knows of its own tensors only
            optimizer.add_param_group(group)

    def share(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        return max(0.0, (recipe.steps - step) / max(1, recipe.steps - recipe.warmup))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def train(
    adapted: Adapted,
    head: Sequence[nn.Parameter],
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    seed: int,
    report: Callable[[int, float], None],
) -> StepSamples:
    """Train over `batches`, one optimizer step each; calls report(step, loss) after each, outside the timed region.

    The global random state is set from (seed, step) before every step, so that an implementation which draws more or
    fewer random numbers than another does not shift the next step's dropout masks. Raises Diverged.
    """
    model, samples = adapted.model, StepSamples()
    trainable = [*adapted.parameters(), *head]
    model.train()
    for index, batch in enumerate(batches):
        torch.manual_seed((seed * 1_000_003 + index) % MAX_STEP_SEED)
        _settle(batch)
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)  # before the step: the last one's gradients stay, for the memory ledger
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        adapted.after_step(index + 1)
        value = float(loss.detach())
        _settle(batch)
        samples.seconds.append(time.perf_counter() - started)
        schedule.step()
        norm = float(nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None]))
        if not math.isfinite(value) or not math.isfinite(norm):
            raise Diverged(f"loss {value} and gradient norm {norm} at step {index + 1}")
        if norm == 0.0:
            raise Diverged(f"the gradient is exactly zero at step {index + 1}: nothing is being trained")
        samples.losses.append(value)
        samples.gradient_norms.append(norm)
        samples.tokens.append(batch.real_tokens)
        samples.padded_tokens.append(batch.padded_tokens)
        report(index + 1, value)
    return samples


def _settle(batch: Batch) -> None:
    if batch.labels.is_cuda:
        torch.cuda.synchronize(batch.labels.device)
