"""Run the phases of a Cell: load, data, predict, quantise, attach, parity, train, count, save, evaluate, latency, serve.

The phase `parity` is the parity gate: it compares the adapted model with a reference, before anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.cell import base_quantisation, imported_adapter, memory_ledger, training_phase, unreferenced_method
from harness.cell.cell_run import CellRun
from harness.cell.data import CellData, RandomData
from harness.cell.job import Job
from harness.cell.measure import checkpoint_size, latency, multi_adapter_latency
from harness.cell.outcomes import NonconformingError
from harness.cell.serving import phase as serving
from harness.cell.training import model as models
from harness.cell.training import random_model
from harness.cell.training.batches import Batch
from harness.cell.training.head import adapted_layers, head_of, in_head
from harness.cell.training.head import draw as draw_head
from harness.cell.training.offloaded_weights import OffloadedWeights, unused
from harness.conformance.cell_gate import parity_gate
from harness.conformance.comparison.observations import inference
from harness.conformance.comparison.stacked_experts import one_by_one
from harness.conformance.findings.summary import describe
from harness.conformance.subject import Original, Subject, initial_tensors, load_start
from harness.methods import experts
from harness.methods.peft_config import UNREFERENCED
from harness.process.out_of_memory import shortage
from harness.records.cost import Checkpoint, Energy
from harness.records.record import CheckResult, Gate, Latency, Measurements, Note, NoteKind, Outcome, Predicted

Predict = Callable[[Job, list[Batch]], Predicted | str]
"""A function that predicts the memory of a Cell from its job and its training batches. It returns the prediction, or
the reason why there is none."""
Data = CellData | RandomData


@dataclass
class Attached:
    """The adapted model, and data for the parity gate and the training."""

    subject: Subject
    logits: Callable[[], Tensor]
    """Function that returns the adapted model's logits on the texts of the parity gate, in inference mode."""
    base_logits: Tensor | None
    """The logits on the texts of the parity gate, before the adapter was attached. They are deleted after the gate.
    None if the Cell reuses the result of an earlier Cell's gate."""
    start: dict[str, Tensor]
    """Name of a trained tensor -> copy of its initial value. Tensors that are too large to copy are missing."""


def measure(run: CellRun, predict: Predict) -> Measurements:
    """Run the phases of a Cell and return its measurements. predict: function that predicts the Cell's memory.

    Raises CellOutcomeError if a phase ends the Cell. All other errors pass through.
    """
    cell = run.cell
    loaded = _load(run)
    model = loaded.model
    model_B = checkpoint_size.model_bytes(model)  # counted before it is packed
    with run.clock.phase("data"):
        data: Data = CellData(run.job, loaded, run.emit) if run.job.data else RandomData(run.job, loaded)
    with run.clock.phase("predict"):
        predicted = predict(run.job, data.batches)
    # Paths, not modules: references to modules would hold each unpacked weight while the base is packed.
    config, paths = adapted_layers(model, cell.method, cell.config, loaded.head)
    run.layers = [] if cell.method in UNREFERENCED else paths
    packed = _quantise(run, loaded, paths)
    attached = _attach(run, loaded, data, config, paths, packed)
    subject = attached.subject
    trained: training_phase.Trained | None = None
    with models.compiled(model, cell.training.compile, run.notes):
        _check_parity(run, attached, data)
        for parameter in loaded.head.values():
            parameter.requires_grad_(True)
        parameters = memory_ledger.parameters(subject.adapted, loaded.head, model)
        found = experts.notes(cell, model, parameters.total - parameters.adapter)
        run.notes += found
        run.typed_notes += [Note(kind=NoteKind.UNREACHED_EXPERTS, text=text) for text in found]
        offloaded = _offload(run, subject)
        if cell.training.steps:
            with models.checkpointing(model, cell.training.checkpointing):
                trained = training_phase.train(run, subject, loaded.head, data, attached.start)
    memory = memory_ledger.memory(run, subject, trained, predicted)
    training = trained.measured if trained else None
    del trained  # frees the optimizer's states, which do not belong to the phases below
    model.zero_grad(set_to_none=True)
    checkpoint = _save(run, subject, loaded, model_B)
    with run.clock.phase("evaluate"):
        accuracy = data.evaluate(model)
        if run.job.imported:
            run.loss_agreement = imported_adapter.compare_loss(model, run.job.imported.facts, data)
    adapters = serving.draw(run, subject)  # copied now, because merging may change or drop the tensors
    latencies = _time(run, subject, data, offloaded)
    served = serving.serve(run, subject, adapters)
    return Measurements(
        parameters=parameters,
        training=training,
        memory=memory,
        accuracy=accuracy,
        latency=latencies,
        checkpoint=checkpoint,
        energy=Energy(source=run.clock.energy.source, because=run.clock.energy.because),
        served=served,
    )


def _load(run: CellRun) -> models.Loaded:
    """Load and return the model. If the Cell shares a gate, the Cell of the gate has tested whether the model is causal.

    If the model is only a config.json without weights, it gets random weights: here, or in `_quantise` if the base
    model is quantised.
    """
    with run.clock.phase("load"):
        job, path, kind = run.job, Path(run.job.model.path), run.job.model.source.kind
        if job.model.source.scheme != "shape":
            loaded = models.load(
                path, kind, job.task.labels, run.dtype, run.device, run.cell.seed, check_causal=run.known_gate is None
            )
            run.notes += loaded.notes
            return loaded
        model = random_model.build(path, run.dtype, kind, job.task.labels)
        one_by_one(model, run.dtype)
        run.notes.append(random_model.NOTE)
        head = head_of(model, kind)
        if run.cell.base.quantization == "none":
            random_model.draw(model, run.device)
            head = draw_head(model, head, run.cell.seed)
        return models.Loaded(model, None, head)


def _quantise(run: CellRun, loaded: models.Loaded, paths: list[str]) -> base_quantisation.PackedBase:
    """Pack the layers at `paths` in place (to 4 bits) if the Cell's base is quantised. Return the packed layers."""
    base, model = run.cell.base, loaded.model
    if base.quantization == "none":
        return base_quantisation.PackedBase()
    with run.clock.phase("quantise"):
        ready = random_model.drawn(model, run.device) if run.job.model.source.scheme == "shape" else None
        judge = run.known_gate is None
        packed = base_quantisation.pack(model, paths, base, run.dtype, run.registry, ready, judge=judge)
        if ready is not None:
            loaded.head.update(draw_head(model, loaded.head, run.cell.seed))
    run.notes.append(packed.note)
    return packed


def _attach(
    run: CellRun, loaded: models.Loaded, data: Data, config: Any, paths: list[str], packed: base_quantisation.PackedBase
) -> Attached:
    """Attach the Cell's implementation of its Method to the model, and return the adapted model."""
    cell, model = run.cell, loaded.model
    with run.clock.phase("attach"):
        model.eval()
        bases = {path: model.get_submodule(path) for path in paths}
        logits = inference(model, data.logits)
        base_logits, original = (logits(), Original.of(model)) if run.known_gate is None else (None, Original(None))
        own = list(model.parameters())
        implementation = run.registry.find("method", cell.method, cell.implementation)
        start = initial_tensors(cell.method, bases, config, torch.Generator().manual_seed(cell.seed))
        adapted = implementation(model, config, torch.Generator().manual_seed(cell.seed))
        if cell.method in UNREFERENCED:
            bases, start = unreferenced_method.attached_layers(adapted, loaded.head)
            run.layers = list(bases)
            imported = run.job.imported
            run.notes += imported_adapter.notes(imported.facts) if imported else []
            run.notes += adapted.notes if imported else unreferenced_method.notes(adapted)
        for path in [path for path in adapted.layers if in_head(path, loaded.head)]:
            del adapted.layers[path]
        if run.job.imported:
            adapted.load_saved(Path(run.job.imported.folder))
        run.adapted = adapted.layers
    subject = Subject(
        cell.method, config, cell.dtype, model, adapted, bases, own, original, packed.forms, packed.expected,
        packed.judged,
    )  # fmt: skip
    return Attached(subject, logits, base_logits, start)


def _check_parity(run: CellRun, attached: Attached, data: Data) -> None:
    """Run the parity gate, or use the result of an earlier Cell's gate. Then free the data that only the gate needs.

    Raises NonconformingError if the adapted model and the reference differ.
    """
    subject = attached.subject
    with run.clock.phase("parity"):
        if known := run.known_gate:
            run.gate = Gate(key=known.key, record=known.record)
            if known.because:
                raise NonconformingError(f"{known.because} (the gate of Record {known.record})")
            load_start(subject.adapted, attached.start)
        else:
            results = _gate(run, attached, data)
            run.gate = Gate(key=run.gate_key, checks=len(results)) if run.gate_key else None
            run.require(results)
    # Memory is measured from here on. Only the parity gate needed the copy and the codes.
    subject.original = Original(None)
    del attached.base_logits
    subject.expected_codes.clear()


def _gate(run: CellRun, attached: Attached, data: Data) -> list[CheckResult]:
    """Run the parity gate, and return the results of its checks.

    If the Cell has an imported adapter, this adapter keeps its own tensors, and only the logits of the whole model are
    compared.
    """
    subject, base = attached.subject, run.cell.base
    if imported := run.job.imported:
        return list(imported_adapter.checks(run, subject.model, Path(imported.folder), data))
    return parity_gate.gate(
        subject, run.cell.seed, attached.logits, attached.base_logits, start=attached.start, forward=data.logits,
        base=f"{base.quantization} by {base.implementation}" if base.quantization != "none" else "",
    )  # fmt: skip


def _offload(run: CellRun, subject: Subject) -> OffloadedWeights:
    """Free the weights that no matrix product of the adapted model uses. Return the object that restores the weights.

    `_time` restores them before it measures latencies. If the weights cannot be saved elsewhere, they stay in memory.
    """
    folder = Path(run.job.folder)
    try:
        return OffloadedWeights(unused(subject.method, subject.adapted, subject.bases), folder)
    except (OSError, RuntimeError) as error:
        run.notes.append(f"unused weights stayed in memory: {error}".partition("\n")[0])
        return OffloadedWeights({}, folder)


def _save(run: CellRun, subject: Subject, loaded: models.Loaded, model_B: int) -> Checkpoint:
    """Return the sizes of the files that a user would save."""
    with run.clock.phase("save"):
        added = subject.added()
        trains_base = bool(subject.adapted.tensors().keys() - added.keys())
        # A library may save more or fewer tensors than the Method added.
        file = subject.adapted.saved() if hasattr(subject.adapted, "saved") else added
        return checkpoint_size.measure(file, loaded.head, model_B, Path(run.job.folder), trains_base=trains_base)


def _time(run: CellRun, subject: Subject, data: Data, offloaded: OffloadedWeights) -> list[Latency]:
    """Check the merged model, and measure and return the latencies.

    If memory runs out, the Cell does not fail: the returned latencies have a reason instead of times. If the suite
    requests no latencies, only the merged model is checked, in a phase called `merge`, and the list is empty. This check
    may be an earlier Cell's (`_reuse_merging`).
    """
    model: Any = subject.model
    cell = run.cell
    causal = run.job.model.source.kind == "causal"
    vocabulary = int(model.config.vocab_size)
    with run.clock.phase("latency" if cell.evaluation.latency else "merge"):
        try:
            offloaded.restore()
            return _latencies(run, subject, causal, vocabulary, data.logits)
        except (MemoryError, RuntimeError) as error:
            if not shortage(error):
                raise
            because = f"out of memory: {error}".partition("\n")[0]
            if not cell.evaluation.latency:
                return []
            return latency.unmeasured(model, causal, vocabulary, because, cell.evaluation)


def _reuse_merging(run: CellRun) -> bool:
    """If the Cell may reuse an earlier Cell's check of merged weights, store this in `run.gate` and return True.

    Both Cells have the same recipe, so they differ only in the seed, and in whether latencies are measured. A Cell that
    times its merged model always checks it.
    """
    known, cell = run.known_gate, run.cell
    if cell.evaluation.latency or run.gate is None or known is None or known.merged_recipe != cell.recipe_id:
        return False
    run.gate = run.gate.model_copy(update={"merging": True})
    return True


def _latencies(
    run: CellRun, subject: Subject, causal: bool, vocabulary: int, forward: Callable[..., Tensor]
) -> list[Latency]:
    """Check the merged model. Return the latencies with one adapter and with several, or [] if none are requested."""
    evaluation, mixed = run.cell.evaluation, list[Latency]()
    if evaluation.latency:
        # This precedes merging, because some libraries merge into the base weight, which then changes a little.
        mixed, checks = multi_adapter_latency.measure(subject, run.cell, causal, vocabulary, run.registry)
        run.checks += checks
    refused = ""
    layers = dict(subject.adapted.layers)  # the check below detaches, which may empty it
    if subject.adapted.can_merge and not _reuse_merging(run):
        merged = parity_gate.after_training(subject, run.cell.seed, forward)
        run.checks += merged
        refused = "; ".join(
            f"{r.check} failed: {describe(r)}" if r.outcome is Outcome.FAIL else r.detail
            for r in merged
            if r.outcome is not Outcome.PASS
        )
    if not evaluation.latency:
        return []
    return latency.measure(subject.adapted, causal, vocabulary, refused, evaluation, layers=layers) + mixed
