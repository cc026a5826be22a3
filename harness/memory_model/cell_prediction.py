"""Predict the memory of one Cell from its model's config.json and its batches. The Cell's worker runs this code.

Predictions are cached (`answer_cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from harness.assets import shapes
from harness.cell.job import Job
from harness.cell.training import model as models
from harness.cell.training.batches import Batch
from harness.cell.training.counted_step import most_tokens
from harness.errors import HarnessError
from harness.memory_model import answer_cache, counting, isolated_step, plan_prediction
from harness.records.record import Json, Predicted


def predict(work: Job, batches: list[Batch]) -> Predicted | str:
    """Predict the memory of a Cell and, on a CPU, the peak of a training step over the largest of `batches`.

    Return the prediction, or the reason why there is none.
    """
    try:
        config = shapes.read_config(Path(work.model.path) / "config.json", work.model.source.name)
    except HarnessError as error:
        return error.what
    checkpoint = work.model.path if work.model.source.scheme != "shape" else ""
    request = plan_prediction.count_request(work.cell, config, work.model.source.kind, work.task.labels, checkpoint)
    with torch.random.fork_rng(devices=[]):
        counted = _cached(request, lambda: counting.answer(request))
    every = work.task.answers is not None and work.task.answers.loss == "all"
    found = plan_prediction.prediction(work.cell, counted, on_cpu=work.device == "cpu", every_token=every)
    if isinstance(found, str) or not batches:
        return found
    if work.device != "cpu":
        return found.model_copy(update={"no_peak": "the peak is predicted for CPU kernels only"})
    parts = most_tokens(batches, work.cell.training.accumulate)
    step = plan_prediction.step_request(work.cell, request, loss_tokens=0)
    answer = _cached(
        {**step, "parts": [_facts(part) for part in parts]},
        lambda: isolated_step.peak(
            work.cell, request["config"], request["kind"], parts, 0, models.lacks(request["checkpoint"])
        ),
    )
    if "peak_B" in answer:
        answer = {**answer, "peak_B": answer["peak_B"] + isolated_step.bytes_of(batches)}
    return found.model_copy(update=plan_prediction.predicted_fields(answer))


def _cached(request: Mapping[str, Any], find: Callable[[], Any]) -> Any:
    """Return the cached answer to a request. If there is none, return and save the result of `find`."""
    if (answer := answer_cache.read(request)) is None:
        answer = find()
        answer_cache.write([(request, answer)])
    return answer


def _facts(part: Batch) -> Json:
    """Return what the memory of a step over a micro-batch depends on, so that Cells with other texts share an answer.

    These are the shapes, the numbers of answer tokens, and whether each mask hides a token: if it hides none, a step may
    run different code.
    """
    tensors = {**part.inputs, "labels": part.labels}
    return {
        "tensors": {name: [*tensor.shape, str(tensor.dtype)] for name, tensor in tensors.items()},
        "hides": {name: not bool(tensor.all()) for name, tensor in part.inputs.items() if name.endswith("mask")},
        "answers": list(part.answers),
    }
