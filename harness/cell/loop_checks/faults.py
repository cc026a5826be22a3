"""Training loops with one planted fault each. `check --loop NAME --self-test` tries the checks on them.

A Method may add its own term to the loss, e.g. AdaLoRA's regularizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from harness.cell.training import loop
from harness.cell.training.batches import Batch
from harness.cell.training.loop import StepSamples
from harness.methods.spec import Adapted


class FaultyLoop:
    """A plain training loop. A loop with a fault is a subclass that overrides one method."""

    caught_by = ""
    """Name of the check that must catch the fault."""
    method = "lora"
    """Method whose training shows the fault."""

    def __call__(
        self,
        adapted: Adapted,
        head: Sequence[nn.Parameter],
        batches: Sequence[Batch],
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        seed: int,
        report: Callable[[int, float], None],
        accumulate: int = 1,
    ) -> StepSamples:
        """Train as `loop.train` does, but without a measurement of time and memory."""
        samples = StepSamples()
        self._begin(adapted)
        for index, batch in enumerate(self._ordered(batches)):
            optimizer.zero_grad()
            parts = batch.parts(accumulate)
            losses = []
            for part in self._used(parts):
                loss = loop.loss_of(adapted.model, self._seen(part)) * self._weight(part, batch, parts)
                losses.append(float(loss.detach()))
                loss.backward()
            if (term := self._term(adapted)) is not None:
                term.backward()
            self._between(adapted, optimizer, index)
            optimizer.step()
            self._after(adapted, index)
            schedule.step()
            samples.losses.append(self._reported(losses, samples.losses))
        return samples

    def _begin(self, adapted: Adapted) -> None:
        """Prepare the model for training."""
        adapted.model.train()

    def _ordered(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Return the batches in the order of the steps."""
        return batches

    def _used(self, parts: Sequence[Batch]) -> Sequence[Batch]:
        """Return the parts of a batch that are trained on."""
        return parts

    def _seen(self, part: Batch) -> Batch:
        """Return the batch that goes through the model for this part of a batch."""
        return part

    def _weight(self, part: Batch, batch: Batch, parts: Sequence[Batch]) -> float:
        """Return the factor of a part's loss in the loss of the step."""
        return part.scored / batch.scored

    def _term(self, adapted: Adapted) -> Any:
        """Return the Method's own term of the loss, or None."""
        return adapted.regularizer()

    def _between(self, adapted: Adapted, optimizer: torch.optim.Optimizer, index: int) -> None:
        """Do nothing. Some subclasses put their fault here, between the backward passes and the optimizer's step."""

    def _after(self, adapted: Adapted, index: int) -> None:
        """Call the Method's `after_step` after the optimizer's step."""
        adapted.after_step(index + 1)

    def _reported(self, losses: list[float], before: list[float]) -> float:
        """Return the loss of a step from the losses of its parts. before: the losses of earlier steps."""
        return sum(losses)


class Clips(FaultyLoop):
    """Clips the norm of the gradients."""

    caught_by = "gradients"

    def _between(self, adapted: Adapted, optimizer: torch.optim.Optimizer, index: int) -> None:
        nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)


class SkipsTheLastPart(FaultyLoop):
    """Leaves out the last part of each batch."""

    caught_by = "accumulation"

    def _used(self, parts: Sequence[Batch]) -> Sequence[Batch]:
        return parts[:-1] or parts


class AveragesTheParts(FaultyLoop):
    """Gives each part of a batch the same weight in the loss, whatever its number of tokens."""

    caught_by = "accumulation"

    def _weight(self, part: Batch, batch: Batch, parts: Sequence[Batch]) -> float:
        return 1 / len(parts)


class WarmsUpFromZero(FaultyLoop):
    """Has the learning rate 0 in the first step."""

    caught_by = "schedule"

    def _between(self, adapted: Adapted, optimizer: torch.optim.Optimizer, index: int) -> None:
        if index == 0:
            for group in optimizer.param_groups:
                group["lr"] = 0.0


class Shuffles(FaultyLoop):
    """Takes the batches in another order."""

    caught_by = "order"

    def _ordered(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        return [*batches[1:], batches[0]]


class SkipsABatch(FaultyLoop):
    """Leaves out the last batch."""

    caught_by = "order"

    def _ordered(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        return batches[:-1]


class TrainsOnPrompts(FaultyLoop):
    """Includes the tokens of the prompts in the loss."""

    caught_by = "gradients"

    def _seen(self, part: Batch) -> Batch:
        answers = tuple(int(n) - 1 for n in part.inputs["attention_mask"].sum(1))
        return Batch(part.inputs, part.labels, answers, part.real_tokens, part.padded_tokens)


class ForgetsTheMethodsTerm(FaultyLoop):
    """Leaves out the Method's own term of the loss, which only AdaLoRA has."""

    caught_by = "gradients"
    method = "adalora"

    def _term(self, adapted: Adapted) -> Any:
        return None


class ForgetsAfterStep(FaultyLoop):
    """Does not call the Method's `after_step`."""

    caught_by = "method_steps"

    def _after(self, adapted: Adapted, index: int) -> None:
        """Do nothing."""


class ReportsAMean(FaultyLoop):
    """Reports the mean of the losses up to the current step, as the log of transformers does."""

    caught_by = "losses"

    def _reported(self, losses: list[float], before: list[float]) -> float:
        return (sum(before) + sum(losses)) / (len(before) + 1)


class DecaysAgain(FaultyLoop):
    """Shrinks the weights after the optimizer's step, as a second weight decay would."""

    caught_by = "weights"

    def _after(self, adapted: Adapted, index: int) -> None:
        super()._after(adapted, index)
        with torch.no_grad():
            for parameter in adapted.parameters():
                parameter.mul_(0.999)


class ChangesTheBase(FaultyLoop):
    """Changes a frozen weight."""

    caught_by = "frozen_weights"

    def _begin(self, adapted: Adapted) -> None:
        super()._begin(adapted)
        with torch.no_grad():
            adapted.model.get_parameter("model.norm.weight").mul_(1.001)


class StaysInEvaluation(FaultyLoop):
    """Trains in evaluation mode."""

    caught_by = "training_mode"

    def _begin(self, adapted: Adapted) -> None:
        adapted.model.eval()


FAULTS: tuple[type[FaultyLoop], ...] = (
    Clips, SkipsTheLastPart, AveragesTheParts, WarmsUpFromZero, Shuffles, SkipsABatch, TrainsOnPrompts,
    ForgetsTheMethodsTerm, ForgetsAfterStep, ReportsAMean, DecaysAgain, ChangesTheBase, StaysInEvaluation,
)  # fmt: skip
