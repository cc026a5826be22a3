"""Predict the memory of one Cell from its model's shape and its batches. The Cell's worker runs this code."""

from __future__ import annotations

from pathlib import Path

import torch

from harness.assets import shapes
from harness.cell.job import Job
from harness.cell.training import model as models
from harness.cell.training.batches import Batch
from harness.cell.training.counted_step import most_tokens
from harness.errors import HarnessError
from harness.memory_model import counting, isolated_step, plan_prediction
from harness.records.record import Predicted


def predict(work: Job, batches: list[Batch]) -> Predicted | str:
    """Predict the memory of a Cell, and the peak of its training step over `batches`.

    Return the prediction, or the reason why there is none.
    """
    try:
        config = shapes.read_config(Path(work.model.path) / "config.json", work.model.source.name)
    except HarnessError as error:
        return error.what
    with torch.random.fork_rng(devices=[]):
        checkpoint = work.model.path if work.model.source.scheme != "shape" else ""
        request = plan_prediction.count_request(work.cell, config, work.model.source.kind, work.task.labels, checkpoint)
        counted = counting.answer(request)
    every = work.task.answers is not None and work.task.answers.loss == "all"
    found = plan_prediction.prediction(work.cell, counted, on_cpu=work.device == "cpu", every_token=every)
    if isinstance(found, str) or not batches:
        return found
    if work.device != "cpu":
        return found.model_copy(update={"no_peak": "the peak is predicted for CPU kernels only"})
    parts = most_tokens(batches, work.cell.training.accumulate)
    lacks = models.lacks(request["checkpoint"])
    peak = isolated_step.peak(
        work.cell, request["config"], request["kind"], parts, isolated_step.bytes_of(batches), lacks
    )
    return found.model_copy(update=peak)
