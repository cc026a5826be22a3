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

from harness.analysis import divergence
from harness.errors import UsageError
from harness.methods import Adapted
from harness.records import Json, Training
from harness.training.batches import Batch
from harness.training.master import HALVES, Masters

MAX_STEP_SEED = 2**31
SILENT = 5
"""So many steps without any gradient, from the first on, are no training. Later ones can be honest: in 16 bits a batch
that is already right has a loss of exactly zero, and so has every batch of a model that knows its data by heart."""
BETAS, EPS = (0.9, 0.999), 1e-8
"""AdamW's, as in its paper and as torch's defaults; stated here so that no release of torch can change them unseen."""


@dataclass
class StepSamples:
    """Raw numbers, one per step: loss, seconds, gradient norm, real and padded tokens.

    cpu_seconds: the CPU time of the whole process over the timed parts of all steps.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    padded_tokens: list[int] = field(default_factory=list)
    cpu_seconds: float = 0.0


class Diverged(Exception):  # noqa: N818
    """Training gave a NaN or infinite loss or gradient: an outcome, not a crash. One line."""


class Untrained(Exception):  # noqa: N818
    """Training gave no gradient at all: an outcome, not a crash. One line."""


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

    It is AdamW, with float32 master weights where something that trains is float16 or bfloat16; or the Method's own with the
    head added. That one steps bfloat16 weights as they are: GaLore's paper does, whose subject is memory. In float16, whose
    range holds no second moments, it has float32 masters too.
    """
    heads = {id(p) for p in head}
    body = [p for p in adapted.parameters() if id(p) not in heads]
    head_lr = recipe.lr if recipe.head_lr is None else recipe.head_lr
    of_body: list[dict[str, Any]] = [{"params": body, "lr": recipe.lr}] if body else []
    of_head: list[dict[str, Any]] = [{"params": list(head), "lr": head_lr}] if head else []
    if not body and not head:
        raise UsageError(
            "nothing of this model trains: the method adds no tensors, and a causal model gets no new head",
            mend="write `training: {steps: 0}`, or choose a method that trains",
        )
    optimizer, lacking = adapted.optimizer(recipe.lr, recipe.weight_decay), {torch.float16}
    if optimizer is None:
        optimizer = torch.optim.AdamW(
            of_body + of_head, lr=recipe.lr, betas=BETAS, eps=EPS, weight_decay=recipe.weight_decay
        )
        lacking = {*HALVES}  # in float32 and float64 nothing is gained by a second copy
    else:
        for group in of_head:  # a Method's own optimizer knows of its own tensors only
            optimizer.add_param_group(group)
    if lacking & {p.dtype for p in (*body, *head)}:
        optimizer = Masters(optimizer)

    def share(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        return max(0.0, (recipe.steps - step) / max(1, recipe.steps - recipe.warmup))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def optimizer_facts(optimizer: torch.optim.Optimizer) -> dict[str, Json]:
    """Return what a reader must know of an optimizer, as JSON: its class, and each group's numbers.

    `lr` is the peak, whatever the schedule has made of it meanwhile.
    """
    groups: list[Any] = []
    for group in optimizer.param_groups:
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in group.items() if k != "params"}
        facts = {k: v for k, v in plain.items() if isinstance(v, (bool, int, float, str, list))}
        facts["lr"] = facts.pop("initial_lr", facts["lr"])
        groups.append({**facts, "tensors": len(group["params"])})
    of_halves: dict[str, Json] = {}
    if isinstance(optimizer, Masters):
        of_halves = {"master_weights": "float32", "loss_scale": optimizer.loss_scale}
    return {"name": _name(optimizer), "groups": groups, **of_halves}


def held(parameter: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Return a parameter as the optimizer keeps it: a master where there is one, or the parameter itself."""
    return optimizer.held(parameter) if isinstance(optimizer, Masters) else parameter.detach()


def notes(optimizer: torch.optim.Optimizer, losses: Sequence[float] = ()) -> list[str]:
    """Return sentences for the Record that its numbers do not say themselves: of arithmetic in 16 bits, of a rising loss."""
    said = [_of_halves(optimizer), divergence.rose(losses)]
    return [sentence for sentence in said if sentence]


def _of_halves(optimizer: torch.optim.Optimizer) -> str:
    if not isinstance(optimizer, Masters):
        halves = {p.dtype for group in optimizer.param_groups for p in group["params"]} & {*HALVES}
        own = f"{_name(optimizer)}, the Method's own, steps weights of 16 bits as they are: small steps are lost"
        return own if halves else ""
    scaled = f", and the loss was scaled by {optimizer.loss_scale:g} for its backward pass" if optimizer.scales else ""
    return f"{_name(optimizer)} kept float32 master weights and moments for what trains in 16 bits{scaled}"


def _name(optimizer: torch.optim.Optimizer) -> str:
    return type(optimizer.inner if isinstance(optimizer, Masters) else optimizer).__name__


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
    fewer random numbers than another does not shift the next step's dropout masks. Where float16 gradients overflow, the
    same batch is taken again with half the loss scale: no step is lost, and its time is the step's. Raises Diverged; and
    Untrained if the first steps, at most `SILENT`, all have a gradient of exactly zero.
    """
    model, samples = adapted.model, StepSamples()
    trainable = [*adapted.parameters(), *head]
    model.train()
    for index, batch in enumerate(batches):
        step_seed = (seed * 1_000_003 + index) % MAX_STEP_SEED
        torch.manual_seed(step_seed)
        _settle(batch)
        started, cpu = time.perf_counter(), time.process_time()
        loss = _backward(adapted, batch, optimizer)
        while isinstance(optimizer, Masters) and bool(loss.isfinite()) and optimizer.relax():
            torch.manual_seed(step_seed)
            loss = _backward(adapted, batch, optimizer)
        optimizer.step()
        adapted.after_step(index + 1)
        value = float(loss.detach())
        _settle(batch)
        samples.seconds.append(time.perf_counter() - started)
        samples.cpu_seconds += time.process_time() - cpu
        schedule.step()
        norm = _norm(trainable, optimizer)
        if not math.isfinite(value) or not math.isfinite(norm):
            raise Diverged(_diverged(value, norm, samples, optimizer, model))
        samples.losses.append(value)
        samples.gradient_norms.append(norm)
        if index + 1 == min(SILENT, len(batches)) and not any(samples.gradient_norms):
            raise Untrained(f"the gradient is exactly zero up to step {index + 1}: nothing is being trained")
        samples.tokens.append(batch.real_tokens)
        samples.padded_tokens.append(batch.padded_tokens)
        report(index + 1, value)
    return samples


def _backward(adapted: Adapted, batch: Batch, optimizer: torch.optim.Optimizer) -> Tensor:
    """Return the task's loss; the gradients are also those of the Method's own term, which no recorded loss holds."""
    optimizer.zero_grad(set_to_none=True)  # before the step: the last one's gradients stay, for the memory ledger
    loss = loss_of(adapted.model, batch)
    term = adapted.regularizer()
    total = loss if term is None else loss + term
    (total * optimizer.loss_scale if isinstance(optimizer, Masters) else total).backward()
    return loss


def _norm(trainable: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> float:
    of = optimizer.gradient if isinstance(optimizer, Masters) else _gradient
    return float(nn.utils.get_total_norm([grad for p in trainable if (grad := of(p)) is not None]))


def _gradient(parameter: Tensor) -> Tensor | None:
    return parameter.grad


def _diverged(
    loss: float, norm: float, samples: StepSamples, optimizer: torch.optim.Optimizer, model: nn.Module
) -> str:
    """Say at which step it was, what came before, what the usual causes are, and the mend."""
    step = len(samples.losses) + 1
    last = f"; the loss of step {step - 1} was {samples.losses[-1]:.4g}" if samples.losses else ""
    rate = max(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
    narrow = any(p.dtype == torch.float16 for p in model.parameters())
    range_ = ", numbers beyond float16's 65504 (try bfloat16 or float32)" if narrow else ""
    return (
        f"training diverged: loss {loss:.4g} and gradient norm {norm:.4g} at step {step}{last}. Usual causes: too high a "
        f"learning rate (the peak here is {rate:g}; lower `lr` or lengthen `warmup`){range_}, or an implementation that "
        "writes NaN (`peft-harness check` tells)"
    )


def _settle(batch: Batch) -> None:
    if batch.labels.is_cuda:
        torch.cuda.synchronize(batch.labels.device)
