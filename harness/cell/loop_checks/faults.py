"""Training loops with one planted fault each. They need no library but torch."""

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
    """A plain training loop. Its methods are those parts of a loop that go wrong in practice; subclasses replace one."""

    caught_by = ""
    """Name of the check that must catch the fault."""

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
        samples = StepSamples()
        self.begin(adapted)
        for index, batch in enumerate(self.ordered(batches)):
            optimizer.zero_grad()
            parts = batch.parts(accumulate)
            losses = []
            for part in self.used(parts):
                loss = loop.loss_of(adapted.model, self.seen(part)) * self.weight(part, batch, parts)
                losses.append(float(loss.detach()))
                loss.backward()
            if (term := self.term(adapted)) is not None:
                term.backward()
            self.between(adapted, optimizer, index)
            optimizer.step()
            self.after(adapted, index)
            schedule.step()
            samples.losses.append(self.reported(losses, samples.losses))
        return samples

    def begin(self, adapted: Adapted) -> None:
        adapted.model.train()

    def ordered(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        return batches

    def used(self, parts: Sequence[Batch]) -> Sequence[Batch]:
        return parts

    def seen(self, part: Batch) -> Batch:
        return part

    def weight(self, part: Batch, batch: Batch, parts: Sequence[Batch]) -> float:
        return part.scored / batch.scored

    def term(self, adapted: Adapted) -> Any:
        return adapted.regularizer()

    def between(self, adapted: Adapted, optimizer: torch.optim.Optimizer, index: int) -> None: ...

    def after(self, adapted: Adapted, index: int) -> None:
        adapted.after_step(index + 1)

    def reported(self, losses: list[float], before: list[float]) -> float:
        return sum(losses)


class Clips(FaultyLoop):
    caught_by = "gradients"

    def between(self, adapted: Adapted, optimizer: torch.optim.Optimizer, index: int) -> None:
        nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)


class SkipsTheLastPart(FaultyLoop):
    caught_by = "accumulation"

    def used(self, parts: Sequence[Batch]) -> Sequence[Batch]:
        return parts[:-1] or parts


class AveragesTheParts(FaultyLoop):
    caught_by = "accumulation"

    def weight(self, part: Batch, batch: Batch, parts: Sequence[Batch]) -> float:
        return 1 / len(parts)


class WarmsUpFromZero(FaultyLoop):
    caught_by = "schedule"

    def between(self, adapted: Adapted, optimizer: torch.optim.Optimizer, index: int) -> None:
        if index == 0:
            for group in optimizer.param_groups:
                group["lr"] = 0.0


class Shuffles(FaultyLoop):
    caught_by = "order"

    def ordered(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        return [*batches[1:], batches[0]]


class SkipsABatch(FaultyLoop):
    caught_by = "order"

    def ordered(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        return batches[:-1]


class TrainsOnPrompts(FaultyLoop):
    caught_by = "gradients"

    def seen(self, part: Batch) -> Batch:
        answers = tuple(int(n) - 1 for n in part.inputs["attention_mask"].sum(1))
        return Batch(part.inputs, part.labels, answers, part.real_tokens, part.padded_tokens)


class ForgetsTheMethodsTerm(FaultyLoop):
    """Only AdaLoRA has a term."""

    caught_by = "gradients"

    def term(self, adapted: Adapted) -> Any:
        return None


class ForgetsAfterStep(FaultyLoop):
    caught_by = "method_steps"

    def after(self, adapted: Adapted, index: int) -> None: ...


class ReportsAMean(FaultyLoop):
    """As the log of transformers: a mean over the steps so far."""

    caught_by = "losses"

    def reported(self, losses: list[float], before: list[float]) -> float:
        return (sum(before) + sum(losses)) / (len(before) + 1)


class DecaysAgain(FaultyLoop):
    """Changes the weights after the optimizer's step."""

    caught_by = "weights"

    def after(self, adapted: Adapted, index: int) -> None:
        super().after(adapted, index)
        with torch.no_grad():
            for parameter in adapted.parameters():
                parameter.mul_(0.999)


class ChangesTheBase(FaultyLoop):
    caught_by = "frozen_weights"

    def begin(self, adapted: Adapted) -> None:
        super().begin(adapted)
        with torch.no_grad():
            adapted.model.get_parameter("model.norm.weight").mul_(1.001)


class StaysInEvaluation(FaultyLoop):
    caught_by = "training_mode"

    def begin(self, adapted: Adapted) -> None:
        adapted.model.eval()


FAULTS = [
    Clips, SkipsTheLastPart, AveragesTheParts, WarmsUpFromZero, Shuffles, SkipsABatch, TrainsOnPrompts,
    ForgetsTheMethodsTerm, ForgetsAfterStep, ReportsAMean, DecaysAgain, ChangesTheBase, StaysInEvaluation,
]  # fmt: skip
