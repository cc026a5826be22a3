"""The training loop. It times forward pass, backward pass and optimizer step, and stores the raw numbers of each step."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from harness.analysis import divergence
from harness.cell.outcomes import Diverged, Untrained
from harness.cell.training import optimizers
from harness.cell.training.batches import Batch
from harness.cell.training.optimizers import MasterWeights
from harness.methods.spec import Adapted
from reference.shared.layerwise import Layerwise

MAX_STEP_SEED = 2**31
ZERO_GRADIENT_STEPS = 5
"""If the gradients of this many first steps are all zero, nothing trains. A zero gradient in a later step may be valid:
in 16 bits, the loss of a batch that the model already predicts is exactly zero."""


@dataclass
class StepSamples:
    """Raw numbers of each step. The fields have the names of `TrainingMeasured`."""

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    padded_tokens: list[int] = field(default_factory=list)
    cpu_seconds: float = 0.0
    """CPU time of the process, summed over the timed parts of all steps."""
    outside_seconds: float | None = None
    """Seconds between the timed parts of steps. None if the loop only measures there."""


class StepLog:
    """The numbers of the steps so far. `add` raises an error if the training diverges, or if nothing trains.

    steps: number of steps of the whole training. report: function that is called with the number of each step, counted
    from 1, and the step's loss.
    """

    def __init__(
        self, adapted: Adapted, optimizer: torch.optim.Optimizer, steps: int, report: Callable[[int, float], None]
    ) -> None:
        self.samples = StepSamples()
        self._model, self._optimizer, self._steps, self._report = adapted.model, optimizer, steps, report

    def add_time(self, seconds: float, cpu_seconds: float) -> None:
        """Store the wall time and the CPU time of a step."""
        self.samples.step_seconds.append(seconds)
        self.samples.cpu_seconds += cpu_seconds

    def add(self, loss: float, norm: float, tokens: int, padded_tokens: int) -> None:
        """Store the numbers of a step, and report it.

        Raises Diverged if the loss or the norm of the gradient is NaN or infinite. Raises Untrained if the gradients of
        the first `ZERO_GRADIENT_STEPS` steps are all exactly zero.
        """
        samples = self.samples
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise Diverged(_diverged(loss, norm, samples, self._optimizer, self._model))
        samples.losses.append(loss)
        samples.gradient_norms.append(norm)
        step = len(samples.losses)
        if step == min(ZERO_GRADIENT_STEPS, self._steps) and not any(samples.gradient_norms):
            raise Untrained(f"the gradient is exactly zero up to step {step}: nothing is being trained")
        samples.tokens.append(tokens)
        samples.padded_tokens.append(padded_tokens)
        self._report(step, loss)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy over the labels (encoders) or the answers' tokens (causal models)."""
    if any(batch.answers):
        every = last_logits(model, batch.inputs, max(batch.answers) + 1)
        logits = torch.cat([every[row, -n - 1 : -1] for row, n in enumerate(batch.answers)])
        labels = torch.cat([batch.inputs["input_ids"][row, -n:] for row, n in enumerate(batch.answers)])
    else:
        logits, labels = model(**batch.inputs).logits, batch.labels
    return nn.functional.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels)


def last_logits(model: nn.Module, inputs: dict[str, Tensor], count: int) -> Tensor:
    """Return the logits of the last `count` positions, (N, count, vocabulary). If possible, compute only these logits."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**inputs, logits_to_keep=count, use_cache=False).logits  # type: ignore[no-any-return]
    return model(**inputs, use_cache=False).logits[:, -count:]  # type: ignore[no-any-return]


@contextmanager
def drop_gradients(tensors: Iterable[Tensor], enabled: bool) -> Iterator[None]:
    """Inside the context, drop each gradient as soon as it is computed. If `enabled` is false, do nothing.

    Layer-wise training needs this, because it must never store all gradients at once.
    """
    hooks = [t.register_post_accumulate_grad_hook(_drop) for t in tensors] if enabled else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _drop(tensor: Tensor) -> None:
    tensor.grad = None


def notes(optimizer: torch.optim.Optimizer, losses: Sequence[float] = ()) -> list[str]:
    """Return sentences for the Record about the optimizer, and about the losses if they rise."""
    return [sentence for sentence in (*optimizers.notes(optimizer), divergence.rose(losses)) if sentence]


def train(
    adapted: Adapted,
    head: Sequence[nn.Parameter],
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    seed: int,
    report: Callable[[int, float], None],
    accumulate: int = 1,
    layerwise: Layerwise | None = None,
) -> StepSamples:
    """Take one optimizer step for each batch, and return the measured numbers of all steps.

    After each step, report(step, loss) is called. The time of this call is not measured. A batch goes through the model
    in `accumulate` parts. With dropout, each part draws different masks. layerwise: the object that updates the weights
    during the backward pass; None if the optimizer updates them.

    Before every step, the global random state is set from (seed, step). So the dropout masks do not depend on how many
    random numbers an implementation draws. If float16 gradients overflow, the same batch is used again with half the
    loss scale. No step is skipped, and the time of a step includes all its attempts. Raises the errors of
    `StepLog.add`.
    """
    log, trained = StepLog(adapted, optimizer, len(batches), report), trainable(adapted, head)
    adapted.model.train()
    for index, batch in enumerate(batches):
        step_seed = seed_of_step(seed, index)
        parts = batch.parts(accumulate)
        torch.manual_seed(step_seed)
        synchronize(batch.labels.device)
        started, cpu = time.perf_counter(), time.process_time()
        loss = step(adapted, parts, optimizer, step_seed)
        adapted.after_step(index + 1)
        value = float(loss)
        synchronize(batch.labels.device)
        log.add_time(time.perf_counter() - started, time.process_time() - cpu)
        schedule.step()
        norm = layerwise.norm(trained) if layerwise else norm_of(trained, optimizer)
        log.add(value, norm, batch.real_tokens, sum(part.padded_tokens for part in parts))
    return log.samples


def seed_of_step(seed: int, index: int) -> int:
    """Return the seed of the global random state in step `index`, counted from 0. seed: the Cell's seed."""
    return (seed * 1_000_003 + index) % MAX_STEP_SEED


def trainable(adapted: Adapted, head: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return all trained parameters, each of them once.

    If an adapter trains all biases, some of them may also belong to the head.
    """
    return list({id(p): p for p in (*adapted.parameters(), *head)}.values())


def step(adapted: Adapted, parts: Sequence[Batch], optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    """Take one optimizer step over the parts of a batch. Return the loss of the batch, a scalar tensor.

    seed: the global random state is set to this seed before the step is repeated, if float16 gradients overflow.
    """
    loss = backward(adapted, parts, optimizer)
    while isinstance(optimizer, MasterWeights) and bool(loss.isfinite()) and optimizer.lower_loss_scale():
        torch.manual_seed(seed)
        loss = backward(adapted, parts, optimizer)
    optimizer.step()
    return loss


def backward(adapted: Adapted, parts: Sequence[Batch], optimizer: torch.optim.Optimizer) -> Tensor:
    """Compute the gradients, and return the task's loss over all parts.

    The gradients include the Method's own term of the loss; the returned loss does not.
    """
    optimizer.zero_grad(set_to_none=True)  # here, so that the memory ledger can read the gradients of the last step
    scale = optimizer.loss_scale if isinstance(optimizer, MasterWeights) else 1.0
    labels = sum(part.scored for part in parts)
    losses: list[Tensor] = []
    for part in parts:
        # Parts have equal numbers of texts, but answers may differ in length: a mean of means would favour short ones.
        loss = loss_of(adapted.model, part) * (part.scored / labels)
        term = None if losses else adapted.regularizer()  # once per step, not once per part
        ((loss if term is None else loss + term) * scale).backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def norm_of(trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> float:
    """Return the norm of the gradient of all trained parameters."""
    gradient_of = optimizers.gradient_of(optimizer)
    return float(nn.utils.get_total_norm([grad for p in trained if (grad := gradient_of(p)) is not None]))


def _diverged(
    loss: float, norm: float, samples: StepSamples, optimizer: torch.optim.Optimizer, model: nn.Module
) -> str:
    """Return the message for a training run that diverged: the step, the last loss, the usual causes and a hint."""
    step = len(samples.losses) + 1
    last = f"; the loss of step {step - 1} was {samples.losses[-1]:.4g}" if samples.losses else ""
    rate = max(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
    narrow = any(p.dtype == torch.float16 for p in model.parameters())
    range_ = ", numbers beyond float16's 65504 (try bfloat16 or float32)" if narrow else ""
    return (
        f"training diverged: loss {loss:.4g} and gradient norm {norm:.4g} at step {step}{last}. Usual causes: too high a "
        f"learning rate (the peak here is {rate:g}; lower `lr` or lengthen `warmup`){range_}, or an implementation that "
        "writes NaN (see `peft-harness check`)"
    )


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
