"""The life of a Cell: load, quantise, attach, parity gate, warm-up, train, save, evaluate, latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.cell import base_quantisation, unreferenced_method, weight_changes
from harness.cell.data import CellData
from harness.cell.job import Job
from harness.cell.measure import checkpoint_size as checkpoint
from harness.cell.measure import latency, multi_adapter_latency
from harness.cell.measure.memory import PeakMeter, model_tensors, optimizer_tensors, tensor_bytes
from harness.cell.measure.phases import PhaseClock
from harness.cell.synthetic_data import RandomData
from harness.cell.training import loop, optimizers, random_model
from harness.cell.training import model as models
from harness.cell.training.batches import Batch
from harness.cell.training.counted_step import copied_B, most_in_step
from harness.cell.training.head import beside, head_of, in_head
from harness.cell.training.head import draw as draw_head
from harness.cell.training.offloaded_weights import OffloadedWeights, unused
from harness.cell.training.update_tracker import UpdateTracker
from harness.conformance.cell_gate import parity_gate
from harness.conformance.cell_gate.memory_headroom import free_B
from harness.conformance.comparison import whole_model
from harness.conformance.comparison.observations import inference
from harness.conformance.subject import (
    DTYPES,
    Original,
    Subject,
    adaptable_layers,
    configure,
    initial_tensors,
    sampled,
)
from harness.methods import experts
from harness.methods.peft_config import UNREFERENCED
from harness.methods.registry import Registry
from harness.process.out_of_memory import shortage
from harness.records.cost import Energy
from harness.records.record import (
    CheckResult,
    Latency,
    Measurements,
    Memory,
    Outcome,
    Parameters,
    Predicted,
    TrainingMeasured,
)
from reference.shared.layerwise import Layerwise

# The optimizer makes its state in step 1, and allocators settle: the first steps are marked as not steady.
TIMING_WARMUP = 3
WARMUP_PASSES = 2

Emit = Callable[..., None]
Predict = Callable[[Job, list[Batch]], Predicted | str]
"""Predicts the memory ledger of a Cell and the peak of a step over its batches; or returns why it cannot."""


class NonconformingError(Exception):
    """A check failed: nothing of this Cell is measured."""


@dataclass
class CellRun:
    """What is known of a Cell so far; a failed Cell's Record keeps it."""

    work: Job
    registry: Registry
    clock: PhaseClock
    meter: PeakMeter
    emit: Emit
    predict: Predict
    baseline: int
    checks: list[CheckResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    adapted: Mapping[str, object] = field(default_factory=dict)
    layerwise: Layerwise | None = None

    def run(self) -> Measurements:
        """Live it. Raises NonconformingError, loop.Diverged, loop.Untrained, and whatever goes wrong."""
        work, cell = self.work, self.work.cell
        device, dtype = torch.device(work.device), DTYPES[cell.dtype]
        kind = work.model.source.kind
        quantised = cell.base.quantization != "none"

        with self.clock.phase("load"):
            loaded = self._load(dtype, device, whole=not quantised)
            self.notes += loaded.notes
        model: Any = loaded.model
        whole_model.one_by_one(model, dtype)
        model_B = checkpoint.whole(model)  # before it is packed
        with self.clock.phase("data"):
            task = CellData(work, loaded, self.emit) if work.data else RandomData(work, loaded)
        with self.clock.phase("predict"):
            expected = self.predict(work, task.batches)
        config = configure(cell.method, cell.config)
        matched = adaptable_layers(model, config)
        bases = {p: m for p, m in matched.items() if not in_head(p, loaded.head)}
        config = beside(config, matched, loaded.head)
        self.layers = [] if cell.method in UNREFERENCED else list(bases)
        packed = base_quantisation.PackedBase()
        if quantised:
            paths = list(bases)
            del bases, matched  # they would keep every weight in its first form
            with self.clock.phase("quantise"):
                ready = random_model.drawn(model, device) if work.model.source.scheme == "shape" else None
                packed = base_quantisation.pack(model, paths, cell.base, dtype, self.registry, ready)
                bases = {p: model.get_submodule(p) for p in paths}
                if ready is not None:
                    loaded.head.update(draw_head(model, loaded.head, cell.seed))
            self.notes.append(packed.said)

        with self.clock.phase("attach"):
            model.eval()
            run_model = inference(model, task.logits)
            base_output = run_model()
            own, original = list(model.parameters()), Original.of(model)
            implementation = self.registry.find("method", cell.method, cell.implementation)
            start = initial_tensors(cell.method, bases, config, torch.Generator().manual_seed(cell.seed))
            adapted = implementation(model, config, torch.Generator().manual_seed(cell.seed))
            if cell.method in UNREFERENCED:
                bases, start = unreferenced_method.taken(adapted, loaded.head)
                self.layers, self.notes = list(bases), [*self.notes, *unreferenced_method.notes(adapted)]
            for path in [p for p in adapted.layers if in_head(p, loaded.head)]:
                del adapted.layers[path]
            self.adapted = adapted.layers
        subject = Subject(
            cell.method, config, cell.dtype, model, adapted, bases, own, original, packed.forms, packed.expected,
            packed.judged,
        )  # fmt: skip
        trained: TrainingMeasured | None = None
        optimizer: torch.optim.Optimizer | None = None
        gradients, most = 0, None
        with models.compiled(model, cell.training.compile, self.notes):
            with self.clock.phase("parity"):
                who = f"{cell.base.quantization} by {cell.base.implementation}" if quantised else ""
                self._pass(
                    parity_gate.gate(
                        subject, cell.seed, run_model, base_output, start=start, forward=task.logits, base=who
                    )
                )
            # Only the gate needed the copy and the codes, and memory is measured from here on.
            original = subject.original = Original(None)
            del base_output
            subject.expected_codes.clear()
            for parameter in loaded.head.values():
                parameter.requires_grad_(True)
            counts = _count(adapted, loaded, model)
            self.notes += experts.notes(cell, model, counts.total - counts.adapter)
            aside = self._set_aside(subject)
            if cell.training.steps:
                with models.checkpointing(model, cell.training.checkpointing):
                    trained, optimizer, gradients = self._train(subject, loaded, task, start)
                    most = self._most_in_step(adapted, list(loaded.head.values()), task, optimizer)
                    if self.layerwise:
                        self.layerwise.remove()
                        self.layerwise = None  # it holds the optimizer
        weights = tensor_bytes(
            [*(t for t in model_tensors(model) if id(t) not in {id(a) for a in subject.added().values()})]
        )
        states = optimizer_tensors(optimizer) if optimizer else []
        memory = Memory(
            source=self.meter.source,
            baseline_B=self.baseline,
            weights_B=weights,
            adapter_B=tensor_bytes(subject.added().values()),
            gradients_B=gradients,
            optimizer_B=tensor_bytes(t for t in states if t.device.type == device.type),
            optimizer_host_B=tensor_bytes(t for t in states if t.device.type != device.type),
            counted_peak_B=most,
            predicted=None if isinstance(expected, str) else expected,
            not_predicted=expected if isinstance(expected, str) else "",
        )
        del optimizer, states
        model.zero_grad(set_to_none=True)
        with self.clock.phase("save"):
            added = subject.added()
            trains_base = bool(adapted.tensors().keys() - added.keys())
            # The library itself may save more, or less.
            file = adapted.saved() if hasattr(adapted, "saved") else added
            saved = checkpoint.measure(file, loaded.head, model_B, Path(work.folder), trains_base=trains_base)
            del added, file
        with self.clock.phase("evaluate"):
            accuracy = task.evaluate(model)
        with self.clock.phase("latency"):
            causal, vocabulary = kind == "causal", int(model.config.vocab_size)
            try:
                aside.put_back()
                measured = self._latency(subject, causal, vocabulary, task.logits)
            except (MemoryError, RuntimeError) as error:
                if not shortage(error):
                    raise
                # What was trained and scored stays: the times are what there was no memory for.
                because = f"out of memory: {error}".partition("\n")[0]
                timed = cell.evaluation.latency
                measured = latency.unmeasured(model, causal, vocabulary, because, cell.evaluation) if timed else []
        return Measurements(
            parameters=counts,
            training=trained,
            memory=memory,
            latency=measured,
            accuracy=accuracy,
            checkpoint=saved,
            energy=Energy(source=self.clock.energy.source, because=self.clock.energy.because),
        )

    def _load(self, dtype: torch.dtype, device: torch.device, whole: bool) -> models.Loaded:
        """Load the model; of a shape, draw the weights now if `whole`, else as its layers are packed."""
        work, path = self.work, Path(self.work.model.path)
        if work.model.source.scheme != "shape":
            return models.load(path, work.model.source.kind, work.task.labels, dtype, device, work.cell.seed)
        kind = work.model.source.kind
        model = random_model.build(path, dtype, kind, work.task.labels)
        self.notes.append(random_model.NOTE)
        head = head_of(model, kind)
        if whole:
            random_model.draw(model, device)
            head = draw_head(model, head, work.cell.seed)
        return models.Loaded(model, None, head)

    def _pass(self, results: list[CheckResult]) -> None:
        self.checks += results
        red = [r for r in results if r.outcome is Outcome.FAIL]
        if red:
            first = red[0]
            size = f"error {first.error:.3g}, allowed {first.allowed:.3g}" if first.error is not None else first.worst
            raise NonconformingError(f"{first.check} failed at {first.tensor or first.detail}: {size}")

    def _set_aside(self, subject: Subject) -> OffloadedWeights:
        """Let go of weights that no product takes until latencies are measured, of the base too."""
        try:
            return OffloadedWeights(unused(subject.method, subject.adapted, subject.bases), Path(self.work.folder))
        except (OSError, RuntimeError) as error:
            self.notes.append(f"weights that no product takes stayed in memory: {error}".partition("\n")[0])
            return OffloadedWeights({}, Path(self.work.folder))

    def _train(
        self, subject: Subject, loaded: models.Loaded, data: CellData | RandomData, start: dict[str, Tensor]
    ) -> tuple[TrainingMeasured, torch.optim.Optimizer, int]:
        cell, model, batches, adapted = self.work.cell, loaded.model, data.batches, subject.adapted
        head = list(loaded.head.values())
        began_from = weight_changes.state_sha256(adapted.tensors() | loaded.head)
        before = weight_changes.fingerprints(model)
        # Of a large model not everything that trains has a copy in `start`: samples show whether it moved.
        trained = weight_changes.of_bases(subject) | subject.added() if hasattr(subject.config, "targets") else {}
        spots = {name: sampled(t) for name, t in trained.items() if name not in start}
        parts = UpdateTracker(spots, lambda t: sampled(optimizers.held(t, optimizer)))
        whole = UpdateTracker(
            {name: start[name] for name in adapted.tensors() if name in start}, lambda t: optimizers.held(t, optimizer)
        )
        start.clear()  # nobody needs the rest, and memory is measured: each copy goes as soon as its tensor has moved
        optimizer, schedule = optimizers.make(adapted, head, cell.training, cell.optimizer, cell.implementation)
        with self.clock.phase("warm-up"), loop.dropping(loop.trainable(adapted, head), cell.training.layerwise):
            model.train()
            for batch in batches[:WARMUP_PASSES]:
                for part in batch.parts(cell.training.accumulate):
                    loop.loss_of(model, part).backward()
                optimizer.zero_grad(set_to_none=True)

        compiling, made = list[int](), [models.graphs() if cell.training.compile else 0]

        def report(step: int, loss: float) -> None:
            self.emit("step", step=step, of=len(batches), loss=loss)
            if cell.training.compile and models.graphs() > made[-1]:
                made.append(models.graphs())
                compiling.append(step)
            for movement in (whole, parts):
                movement.seen(adapted.tensors)

        self.layerwise = optimizers.layerwise(optimizer, cell.training)
        with self.clock.phase("train"):
            samples = loop.train(
                adapted, head, batches, optimizer, schedule, cell.seed, report, cell.training.accumulate,
                self.layerwise,
            )  # fmt: skip
        trainable = [*adapted.parameters(), *head]
        gradients = tensor_bytes({id(p): p.grad for p in trainable if p.grad is not None}.values())
        gradients += self.layerwise.most_B if self.layerwise else 0
        after = weight_changes.fingerprints(model)
        thawed = [name for name in before if before[name] != after.get(name)]
        # In the first step a tensor may have no gradient by design (LoRA's A, since B is zero); from the second on it must.
        now = adapted.tensors() if len(batches) > 1 else {}
        still = whole.still(now) + parts.still(now)
        self._pass(
            [
                weight_changes.found(cell, "frozen", thawed, "changed"),
                weight_changes.found(cell, "moved", still, "never moved"),
            ]
        )
        measured = TrainingMeasured(
            losses=samples.losses,
            step_seconds=samples.seconds,
            tokens=samples.tokens,
            padded_tokens=samples.padded_tokens,
            gradient_norms=samples.gradient_norms,
            timing_warmup=min(TIMING_WARMUP, len(samples.losses) - 1),
            cpu_seconds=samples.cpu_seconds,
            optimizer=optimizers.facts(optimizer),
            text_rules=data.text_rules,
            cut_examples=data.cut_examples,
            data_order_sha256=data.order_sha256,
            initial_state_sha256=began_from,
        )
        self.notes += loop.notes(optimizer, samples.losses)
        if compiling:
            steps = ", ".join(map(str, compiling))
            self.notes.append(
                f"steps that compiled anew: {steps}; tokens per second and joules hold that, medians do not"
            )
        return measured, optimizer, gradients

    def _most_in_step(
        self, adapted: Any, head: list[Any], data: CellData | RandomData, optimizer: torch.optim.Optimizer
    ) -> int | None:
        if self.work.device != "cpu":
            return self.clock.done[-1].peak_memory_B  # of the training: the allocator's own count
        if 2 * copied_B(adapted, head) > free_B(torch.device("cpu")):
            self.notes.append("memory in a step was not counted: a second copy of what it changes might not fit")
            return None
        with self.clock.phase("count"):
            try:
                return most_in_step(adapted, head, data.batches, optimizer, self.work.cell.training.accumulate)
            except (MemoryError, RuntimeError) as error:
                if not shortage(error):
                    raise
                # The training was done before, and stays: this number is what there was no memory for.
                self.notes.append(f"memory in a step was not counted: out of memory: {error}".partition("\n")[0])
                return None

    def _latency(
        self, subject: Subject, causal: bool, vocabulary: int, forward: Callable[..., Tensor]
    ) -> list[Latency]:
        timed, mixed = self.work.cell.evaluation.latency, list[Latency]()
        if timed:
            # Before anything is merged: some libraries merge into the base weight, and lose a little of it.
            mixed, checks = multi_adapter_latency.measure(subject, self.work.cell, causal, vocabulary, self.registry)
            self.checks += checks
        refused = ""
        layers = dict(subject.adapted.layers)  # the check below detaches, which may empty it
        if subject.adapted.can_merge:
            merged = parity_gate.after_training(subject, self.work.cell.seed, forward)
            self.checks += merged
            refused = "; ".join(
                f"{r.check} failed: {r.error} of {r.allowed} at {r.tensor}" if r.outcome is Outcome.FAIL else r.detail
                for r in merged
                if r.outcome is not Outcome.PASS
            )
        if not timed:
            return []
        asked = self.work.cell.evaluation
        return latency.measure(subject.adapted, causal, vocabulary, refused, asked, layers=layers) + mixed


def _count(adapted: Any, loaded: models.Loaded, model: Any) -> Parameters:
    heads = {id(p) for p in loaded.head.values()}
    adapter = sum(p.numel() for p in adapted.parameters() if id(p) not in heads)
    head = sum(p.numel() for p in loaded.head.values())
    # A packed 4-bit parameter holds two weights a byte; count weights, not bytes.
    total = sum(
        p.quant_state.shape.numel() if getattr(p, "quant_state", None) is not None else p.numel()
        for p in model.parameters()
    )
    return Parameters(adapter=adapter, head=head, total=total)
