"""Predict the memory of a plan's Cells from the config.json of their models. Imports no torch.

Cells with equal steps share one step on fake tensors (`harness.memory_model.isolated_step`). Answers are cached on disk
(`harness.memory_model.answer_cache`), and one child process computes the missing answers. A Cell's worker predicts in
the same way (`harness.memory_model.cell_prediction`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from harness.assets import fetch, shapes
from harness.errors import HarnessError
from harness.memory_model import counting_client
from harness.memory_model.ledger import OWN, Ledger
from harness.memory_model.messages import CountRequest, ModelCount, StepAnswer, StepRequest
from harness.methods import experts
from harness.records.record import Cell, Evaluation, Predicted

if TYPE_CHECKING:
    from harness.assets.table import Source

_SAME = {"lr": 1e-3, "head_lr": None, "warmup": 0, "weight_decay": 0.0}
"""Training option that does not change the memory of a step -> its value in a step request. Cells that differ only in
these options then share one step."""


class Refusal(str):
    """Reason why a Cell has no prediction, if it is an error of the Cell's Method: the Cell cannot run either."""

    __slots__ = ()


class PlannedMemory(Predicted):
    """Predicted memory of one Cell of a plan."""

    trainable: int
    """Number of trainable parameters, counted with the reference of the Cell's Method."""


def count_request(cell: Cell, config: Mapping[str, Any], kind: str, labels: int, checkpoint: str = "") -> CountRequest:
    """Return the request to count the bytes of one Cell's model and Method.

    config: content of the model's config.json. labels: number of an encoder's labels. checkpoint: folder with an
    encoder's checkpoint; empty if there is none.
    """
    facts = shapes.with_classes(config, labels) if kind == "encoder" else dict(config)
    return {
        "config": facts, "kind": kind, "dtype": cell.dtype, "methods": {cell.method: [cell.config]}, "targets": [],
        "checkpoint": checkpoint if kind == "encoder" else "",
    }  # fmt: skip


def prediction(cell: Cell, counted: ModelCount, *, on_cpu: bool = False, every_token: bool = False) -> Predicted | str:
    """Return the predicted memory of a Cell from its counts, or the reason why there is none.

    on_cpu: whether the device is the CPU. Paged states are then in the device's memory, too. every_token: whether every
    token has a loss (`loss: all`), as in the task `synthetic`.

    Activations and logits are predicted for texts with `max_tokens` tokens. This is an upper bound, and exact for
    `synthetic`. Both are None without training or a closed form, for a compiled model, and for a training loop other
    than the harness's own. Logits are None for a task with a loss on answers only.
    """
    if error := counted.get("error"):
        return str(error)
    (one,) = counted["methods"][cell.method]
    if one["error"]:
        return (Refusal if one.get("refused") else str)(one["error"])
    if cell.base.quantization != "none" and one["unpackable"]:
        return Refusal(one["unpackable"])
    base = OWN if OWN in one["weights"] else cell.base.quantization
    if base not in one["weights"]:
        return f"there is no count of a {cell.method} on a base in {cell.base.quantization}"
    if cell.optimizer not in one["optimizer"]:
        return f"there is no count of a {cell.method} by {cell.optimizer}"
    tokens = -(-cell.training.batch // cell.training.accumulate) * cell.training.max_tokens
    how = {"checkpointing": cell.training.checkpointing, "layerwise": cell.training.layerwise}
    found = Ledger.of(one, base, cell.optimizer, counted["logits"], tokens, **how)
    known = bool(one["activations"]) and not cell.training.compile and cell.training.loop == "harness"
    trains = cell.training.steps > 0
    return Predicted(
        weights_B=found.weights,
        adapter_B=found.adapter,
        gradients_B=found.gradients if trains else 0,
        optimizer_B=(found.optimizer + found.host * on_cpu) if trains else 0,
        optimizer_host_B=found.host if trains and not on_cpu else 0,
        activations_B=found.activations if trains and known else None,
        logits_B=found.logits if trains and known and (every_token or cell.evaluation.items == 0) else None,
        step_B=found.step if trains else 0,
        untouched=experts.note(one["untouched"], counted["parameters"])
        if experts.takes_all_linear_layers(cell)
        else "",
    )


def predictions(
    cells: Iterable[Cell], sources: Mapping[str, Source], labels: Mapping[str, int], every_token: Collection[str] = ()
) -> dict[str, PlannedMemory | str]:
    """Map each cell_id to the prediction, or to the reason why there is none.

    sources: models of the Cells, by name. labels: number of labels of each task. every_token: tasks with a loss on
    every token. Nothing is downloaded, so there is no prediction for a model that is not on this machine.
    """
    found: dict[str, PlannedMemory | str] = {}
    requests: dict[str, tuple[Cell, CountRequest]] = {}
    local = {name: _local_model(source) for name, source in sources.items()}
    for cell in cells:
        model = local[cell.model]
        if isinstance(model, str):
            found[cell.cell_id] = model
        else:
            config, checkpoint = model
            request = count_request(cell, config, sources[cell.model].kind, labels[cell.task], checkpoint)
            requests[cell.cell_id] = cell, request
    steps = [step_request(cell, one, _answer_tokens(cell, cell.task in every_token)) for cell, one in requests.values()]
    answers = counting_client.answer_requests([*(one for _, one in requests.values()), *steps])
    if isinstance(answers, str):
        return found | dict.fromkeys(requests, answers)
    late: StepAnswer = {"no_peak": f"the steps before it took {counting_client.TIMEOUT_S:.0f} s"}
    of_steps: list[StepAnswer | None] = answers[len(requests) :]
    for (cell_id, (cell, _)), counted, of_step in zip(requests.items(), answers, of_steps, strict=False):
        of_shape = prediction(cell, counted, every_token=cell.task in every_token)
        if isinstance(of_shape, Predicted):
            (method,) = counted["methods"][cell.method]
            peak = of_shape.model_copy(update=predicted_fields(late if of_step is None else of_step)).model_dump()
            found[cell_id] = PlannedMemory(**peak, trainable=method["trainable"])
        else:
            found[cell_id] = of_shape
    return found


def step_request(cell: Cell, one: CountRequest, loss_tokens: int) -> StepRequest:
    """Return the request for a Cell's training step. Options in `_SAME` get fixed values.

    one: the Cell's count request. loss_tokens: number of tokens with a loss in each text.
    """
    training = cell.training.model_copy(update=_SAME)
    same = {"seed": 0, "evaluation": Evaluation(items=0), "task": "", "training": training}
    return {
        "cell": cell.model_copy(update=same).model_dump(mode="json"), "config": one["config"], "kind": one["kind"],
        "checkpoint": one["checkpoint"], "loss_tokens": loss_tokens,
    }  # fmt: skip


def predicted_fields(answer: StepAnswer) -> dict[str, Any]:
    """Return those fields of `Predicted` that the answer to a step request contains."""
    return {name: value for name, value in answer.items() if name in Predicted.model_fields}


def _answer_tokens(cell: Cell, every_token: bool) -> int:
    return cell.training.max_tokens if every_token or cell.evaluation.items == 0 else 1


def _local_model(source: Source) -> tuple[dict[str, Any], str] | str:
    """Return a model's config.json and the folder of its weights, or the reason why they cannot be read.

    The folder is an empty string for a model that has only a config.json, and no weights.
    """
    try:
        if (here := fetch.local_folder(source)) is None:
            return f"{source.name} is not on this machine yet"
        return shapes.read_config(here / "config.json", source.name), str(here) if source.scheme != "shape" else ""
    except HarnessError as error:
        return error.what
