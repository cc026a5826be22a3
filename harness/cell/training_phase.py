"""Train a Cell: warm-up, steps, checks of changed and unchanged tensors, and a count of the memory of one more step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.cell import weight_changes
from harness.cell.cell_run import CellRun
from harness.cell.data import CellData, RandomData
from harness.cell.measure.memory import tensor_bytes
from harness.cell.outcomes import Untrained
from harness.cell.training import loop, loops, optimizers
from harness.cell.training import model as models
from harness.cell.training.counted_step import copied_B, step_peak
from harness.cell.weight_changes import UpdateTracker
from harness.conformance.cell_gate.memory_headroom import free_B
from harness.conformance.subject import Subject, sampled
from harness.errors import first_names
from harness.process.out_of_memory import shortage
from harness.records.record import TrainingMeasured

# The optimizer makes its state in step 1, and allocators grow, so the first steps are not steady.
TIMING_WARMUP = 3
WARMUP_PASSES = 1
"""Number of batches with which the model runs forward and backward before training, so that a GPU's kernels are compiled. A
compiled model runs one more, because torch compiles it again if the second batch has another length. On a CPU, a model that
is not compiled runs none: statistics leave out the first TIMING_WARMUP steps anyway."""


@dataclass
class Trained:
    """The results of a training run. The optimizer still has its states."""

    measured: TrainingMeasured
    optimizer: torch.optim.Optimizer
    gradients_B: int
    """Bytes of the gradients of the last step; with layer-wise updates, the bytes of the largest gradient."""
    step_peak_B: int | None
    """Peak bytes of tensors within a step, on a GPU within the whole training; None if they cannot be counted."""


def train(
    run: CellRun,
    subject: Subject,
    head: Mapping[str, nn.Parameter],
    data: CellData | RandomData,
    start: dict[str, Tensor],
) -> Trained:
    """Train adapter and head on the batches of `data`, and return the results.

    start: name of a trained tensor -> copy of its initial value. The function empties this dict, which frees the copies.
    Raises NonconformingError if a frozen tensor changed. Raises Untrained if there are several steps and a tensor of the
    adapter or the head kept its first value in all; the message names it. Raises Diverged too.
    """
    cell, model, batches, adapted = run.cell, subject.model, data.batches, subject.adapted
    parameters = list(head.values())
    initial_state = weight_changes.state_sha256(adapted.tensors() | dict(head))
    frozen = weight_changes.fingerprints(model)
    # In a large model some trained tensors have no copy in `start`: samples of them show changes.
    tensors = weight_changes.base_weights(subject) | subject.added() if hasattr(subject.config, "targets") else {}
    parts = UpdateTracker(
        {name: sampled(t) for name, t in (tensors | dict(head)).items() if name not in start},
        lambda t: sampled(optimizers.stored_value(t, optimizer)),
    )
    whole = UpdateTracker(
        {name: start[name] for name in adapted.tensors() if name in start},
        lambda t: optimizers.stored_value(t, optimizer),
    )
    start.clear()  # memory is measured: each copy is freed as soon as its tensor has changed
    optimizer, schedule = optimizers.make(adapted, parameters, cell.training, cell.optimizer, cell.implementation)
    if warms_up(run):
        trainable = loop.trainable(adapted, parameters)
        with run.clock.phase("warm-up"), loop.drop_gradients(trainable, cell.training.layerwise):
            model.train()
            for batch in batches[: WARMUP_PASSES + cell.training.compile]:
                for part in batch.parts(cell.training.accumulate):
                    loop.loss_of(model, part).backward()
                optimizer.zero_grad(set_to_none=True)

    compiling, graphs = list[int](), [models.graphs() if cell.training.compile else 0]

    def report(step: int, loss: float) -> None:
        run.emit("step", step=step, of=len(batches), loss=loss)
        if cell.training.compile and models.graphs() > graphs[-1]:
            graphs.append(models.graphs())
            compiling.append(step)
        for tracker in (whole, parts):
            tracker.observe(lambda: adapted.tensors() | dict(head))

    layerwise = optimizers.layerwise(optimizer, cell.training)
    with run.clock.phase("train"):
        samples = loops.find(cell.training.loop).train(
            adapted, parameters, batches, optimizer, schedule, cell.seed, report, cell.training.accumulate, layerwise
        )
    trainable = [*adapted.parameters(), *parameters]
    gradients_B = tensor_bytes({id(p): p.grad for p in trainable if p.grad is not None}.values())
    gradients_B += layerwise.most_B if layerwise else 0
    after = weight_changes.fingerprints(model)
    thawed = [name for name in frozen if frozen[name] != after.get(name)]
    # In the first step a tensor may have no gradient by design (LoRA's A, because B is zero); later it must have one.
    now = adapted.tensors() | dict(head) if len(batches) > 1 else {}
    unchanged = whole.unchanged(now) + parts.unchanged(now)
    run.require([weight_changes.check_of_names(cell, "frozen", thawed, "changed")])
    run.checks.append(weight_changes.check_of_names(cell, "moved", unchanged, "never moved"))
    if unchanged:
        raise Untrained(f"{first_names(unchanged)} never moved from the first value in {len(batches)} steps")
    measured = TrainingMeasured(
        **vars(samples),
        timing_warmup=min(TIMING_WARMUP, len(samples.losses) - 1),
        optimizer=optimizers.facts(optimizer),
        text_rules=data.text_rules,
        cut_examples=data.cut_examples,
        data_order_sha256=data.order_sha256,
        initial_state_sha256=initial_state,
    )
    run.notes += loop.notes(optimizer, samples.losses)
    if samples.outside_seconds is not None:
        between = samples.outside_seconds / max(1, len(samples.losses) - 1)
        run.notes.append(
            f"trained by {cell.training.loop}; it spent {1000 * between:.3g} ms between two steps, on batches, schedule and "
            "log, which is not part of the step times"
        )
    if compiling:
        steps = ", ".join(map(str, compiling))
        run.notes.append(f"steps that recompiled: {steps}; tokens per second and joules include this, medians do not")
    step_peak_B = _step_peak(run, subject, parameters, data, optimizer)
    if layerwise:
        layerwise.remove()
    return Trained(measured, optimizer, gradients_B, step_peak_B)


def warms_up(run: CellRun) -> bool:
    """Return whether the model runs before training, because its first passes would compile something."""
    return run.cell.training.compile or run.device.type != "cpu"


def _step_peak(
    run: CellRun,
    subject: Subject,
    head: list[nn.Parameter],
    data: CellData | RandomData,
    optimizer: torch.optim.Optimizer,
) -> int | None:
    """Return the peak bytes of tensors within a step, on a GPU within the whole training.

    If they cannot be counted, add a note and return None.
    """
    if run.device.type != "cpu":
        return run.clock.done[-1].peak_memory_B  # the peak of the training by torch's allocator
    if 2 * copied_B(subject.adapted, head) > free_B(run.device):
        run.notes.append("memory in a step was not counted: a second copy of the trained tensors might not fit")
        return None
    with run.clock.phase("count"):
        try:
            training = run.cell.training
            one_step = loops.find(training.loop).step
            return step_peak(subject.adapted, head, data.batches, optimizer, training.accumulate, one_step)
        except (MemoryError, RuntimeError) as error:
            if not shortage(error):
                raise
            # The training is complete; only this number is missing.
            run.notes.append(f"memory in a step was not counted: out of memory: {error}".partition("\n")[0])
            return None
