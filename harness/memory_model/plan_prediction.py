"""Predict the memory of a plan's Cells from shapes. No torch: one child process counts for all of them.

It also takes one step on fake tensors for all Cells with the same step (`harness.memory_model.isolated_step`). A Cell's own
worker counts in the same way before it loads its model (`harness.memory_model.counting`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from harness.assets import fetch, shapes
from harness.errors import HarnessError
from harness.memory_model import choices, counting_client
from harness.memory_model.fit import ledger
from harness.memory_model.messages import CountRequest, ModelCount, StepRequest
from harness.methods import experts
from harness.records.record import Cell, Evaluation, Predicted

if TYPE_CHECKING:
    from harness.assets.table import Source

_SAME = {"lr": 1e-3, "head_lr": None, "warmup": 0, "weight_decay": 0.0}
"""Training options that do not change the memory of a step: Cells that differ in them only share one step."""


class PlannedMemory(Predicted):
    """Prediction for a Cell of a plan."""

    trainable: int
    """Trainable parameters, counted with the reference of its Method attached."""


def count_request(cell: Cell, config: Mapping[str, Any], kind: str, labels: int, checkpoint: str = "") -> CountRequest:
    """Return the request for one Cell. labels: number of an encoder's labels; checkpoint: as in `CountRequest`."""
    facts = shapes.with_classes(config, labels) if kind == "encoder" else dict(config)
    return {
        "config": facts, "kind": kind, "dtype": cell.dtype, "methods": {cell.method: [cell.config]}, "targets": [],
        "checkpoint": checkpoint if kind == "encoder" else "",
    }  # fmt: skip


def prediction(cell: Cell, counted: ModelCount, *, on_cpu: bool = False, every_token: bool = False) -> Predicted | str:
    """Return the ledger of a Cell from its counts, or the reason why there is none.

    on_cpu: whether host memory is the device's, so that paged states count too. every_token: whether every token has a loss
    (`loss: all`), as in the task `synthetic`.

    Activations and logits are those of texts of `max_tokens` tokens: an upper bound, exact for `synthetic`. Not predicted:
    compiled models, and logits of tasks with a loss on answers only.
    """
    if error := counted.get("error"):
        return str(error)
    (one,) = counted["methods"][cell.method]
    if one["error"]:
        return str(one["error"])
    base = choices.OWN if choices.OWN in one["weights"] else cell.base.quantization
    if base not in one["weights"]:
        return f"there is no count of a {cell.method} on a base in {cell.base.quantization}"
    if cell.optimizer not in one["optimizer"]:
        return f"there is no count of a {cell.method} by {cell.optimizer}"
    tokens = -(-cell.training.batch // cell.training.accumulate) * cell.training.max_tokens
    how = {"checkpointing": cell.training.checkpointing, "layerwise": cell.training.layerwise}
    found = ledger(one, base, cell.optimizer, counted["logits"], tokens, **how)
    trains, known = cell.training.steps > 0, bool(one["activations"]) and not cell.training.compile
    return Predicted(
        weights_B=found.weights,
        adapter_B=found.adapter,
        gradients_B=found.gradients if trains else 0,
        optimizer_B=(found.optimizer + found.host * on_cpu) if trains else 0,
        optimizer_host_B=found.host if trains and not on_cpu else 0,
        activations_B=found.activations if trains and known else None,
        logits_B=found.logits if trains and known and (every_token or cell.evaluation.items == 0) else None,
        step_B=found.step if trains else 0,
        untouched=experts.note(one["untouched"], counted["parameters"]) if experts.means_all(cell) else "",
    )


def predictions(
    cells: Iterable[Cell], sources: Mapping[str, Source], labels: Mapping[str, int], every_token: Collection[str] = ()
) -> dict[str, PlannedMemory | str]:
    """Map cell_ids to predictions, or to the reasons why there are none.

    sources: models of the Cells, by name. labels: number of labels, by task. every_token: tasks with a loss on every token.
    Nothing is downloaded: a model that is not on this machine has no prediction.
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
    of_models: dict[str, CountRequest] = {}
    for cell, one in requests.values():
        # One count per model: Cells that differ only in a seed or a batch share it.
        methods = of_models.setdefault(_model_key(one), {**one, "methods": {}})["methods"]
        configs_of = methods.setdefault(cell.method, [])
        configs_of += [cell.config] if cell.config not in configs_of else []
    steps: dict[str, StepRequest] = {}
    step_of = {id_: _step(cell, one, steps, every_token) for id_, (cell, one) in requests.items()}
    counts = counting_client.run_requests([*of_models.values(), *steps.values()])
    if not isinstance(counts, str):
        late = {"no_peak": f"the steps before it took {counting_client.TIMEOUT_S:.0f} s"}
        counts += [late] * (len(of_models) + len(steps) - len(counts))
    for cell_id, (cell, one) in requests.items():
        if isinstance(counts, str):
            found[cell_id] = counts
            continue
        at, counted = list(of_models).index(_model_key(one)), of_models[_model_key(one)]["methods"][cell.method]
        answer: ModelCount = counts[at]
        if "error" not in answer:
            of_cell = answer["methods"][cell.method][counted.index(cell.config)]
            answer = {**answer, "methods": {cell.method: [of_cell]}}
        of_shape = prediction(cell, answer, every_token=cell.task in every_token)
        if isinstance(of_shape, Predicted):
            step = counts[len(of_models) + step_of[cell_id]]
            found[cell_id] = PlannedMemory(**of_shape.model_dump() | step, trainable=of_cell["trainable"])
        else:
            found[cell_id] = of_shape
    return found


def _step(cell: Cell, one: CountRequest, steps: dict[str, StepRequest], every_token: Collection[str]) -> int:
    """Add a Cell's training step to `steps` unless it is there; return its index."""
    same = {
        "seed": 0,
        "evaluation": Evaluation(items=0),
        "task": "",
        "training": cell.training.model_copy(update=_SAME),
    }
    whole = cell.task in every_token or cell.evaluation.items == 0
    step: StepRequest = {
        "cell": cell.model_copy(update=same).model_dump(mode="json"),
        "config": one["config"],
        "kind": one["kind"],
        "checkpoint": one["checkpoint"],
        "answer": cell.training.max_tokens if whole else 1,
    }
    key = json.dumps(step, sort_keys=True)
    steps.setdefault(key, step)
    return list(steps).index(key)


def _model_key(request: CountRequest) -> str:
    return json.dumps({key: value for key, value in request.items() if key != "methods"}, sort_keys=True)


def _local_model(source: Source) -> tuple[dict[str, Any], str] | str:
    """Return a model's config.json and the folder of its weights (empty for a shape), or the reason why there is none."""
    try:
        if (here := fetch.local_folder(source)) is None:
            return f"{source.name} is not on this machine yet"
        return shapes.read_config(here / "config.json", source.name), str(here) if source.scheme != "shape" else ""
    except HarnessError as error:
        return error.what
