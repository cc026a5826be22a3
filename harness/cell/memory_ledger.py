"""Count the parameters and the memory of a Cell, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from harness.cell.cell_run import CellRun
from harness.cell.measure.memory import model_tensors, optimizer_tensors, tensor_bytes
from harness.cell.training_phase import Trained
from harness.conformance.subject import Subject
from harness.methods.spec import Adapted
from harness.records.record import Memory, Parameters, Predicted


def parameters(adapted: Adapted, head: Mapping[str, nn.Parameter], model: nn.Module) -> Parameters:
    """Count the weights of the adapter, the head and the whole model."""
    heads: set[int] = {id(p) for p in head.values()}
    # A packed 4-bit parameter holds two weights per byte. The sum counts weights, not bytes.
    states: list[tuple[nn.Parameter, Any]] = [(p, getattr(p, "quant_state", None)) for p in model.parameters()]
    return Parameters(
        adapter=sum(p.numel() for p in adapted.parameters() if id(p) not in heads),
        head=sum(p.numel() for p in head.values()),
        total=sum(p.numel() if state is None else state.shape.numel() for p, state in states),
    )


def memory(run: CellRun, subject: Subject, trained: Trained | None, predicted: Predicted | str) -> Memory:
    """Return the bytes of weights, adapter, gradients and optimizer states.

    trained: result of the training; None if nothing was trained. predicted: the predicted memory, or the reason why
    there is no prediction.
    """
    added = subject.added()
    adapter = {id(tensor) for tensor in added.values()}
    states = optimizer_tensors(trained.optimizer) if trained else []
    return Memory(
        source=run.meter.source,
        baseline_B=run.baseline_B,
        weights_B=tensor_bytes(t for t in model_tensors(subject.model) if id(t) not in adapter),
        adapter_B=tensor_bytes(added.values()),
        gradients_B=trained.gradients_B if trained else 0,
        optimizer_B=tensor_bytes(t for t in states if t.device.type == run.device.type),
        optimizer_host_B=tensor_bytes(t for t in states if t.device.type != run.device.type),
        counted_peak_B=trained.step_peak_B if trained else None,
        predicted=None if isinstance(predicted, str) else predicted,
        not_predicted=predicted if isinstance(predicted, str) else "",
    )
