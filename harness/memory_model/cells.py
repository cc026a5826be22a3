"""The memory that Cells are predicted to take, from shapes alone. No torch: a child process counts for all of them at once.

The peak of a step is counted in it too, once for all Cells that take the same step (`harness.memory_model.isolated_step`).

What the child counts is what a Cell's own worker counts before it loads its model (`harness.memory_model.counting`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from harness.assets import fetch, shapes
from harness.errors import HarnessError
from harness.memory_model import choices, counting_client
from harness.memory_model.fit import ledger
from harness.methods import experts
from harness.records.record import Cell, Evaluation, Predicted

if TYPE_CHECKING:
    from harness.assets.table import Source

_SAME = {"lr": 1e-3, "head_lr": None, "warmup": 0, "weight_decay": 0.0}
"""What a learning rate is does not change the memory of a step: Cells that differ in it share one."""


def request(cell: Cell, config: Mapping[str, Any], kind: str, labels: int, checkpoint: str = "") -> dict[str, Any]:
    """Return what `counting.answer` is asked for one Cell. config: the model's config.json; labels: of an encoder's head.

    checkpoint: the folder of the weights; empty for a shape.
    """
    facts = shapes.with_classes(config, labels) if kind == "encoder" else dict(config)
    return {
        "config": facts, "kind": kind, "dtype": cell.dtype, "methods": {cell.method: [cell.config]}, "targets": [],
        "checkpoint": checkpoint if kind == "encoder" else "",
    }  # fmt: skip


def predicted(
    cell: Cell, counted: Mapping[str, Any], *, on_cpu: bool = False, every_token: bool = False
) -> Predicted | str:
    """Return the ledger of a Cell from what was counted for it, or a sentence that says why there is none.

    on_cpu: host memory is the device's own, so that paged states are counted with the others. every_token: whether the task
    takes its loss of every token (`loss: all`), as `synthetic` always does.

    Activations and logits are those of one pass in which every text is as long as `max_tokens` allows: an upper bound, and
    exact for the task `synthetic`; what a compiler keeps is not predicted. Nor are
    the logits of other tasks: only answers have any.
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
) -> dict[str, Predicted | str]:
    """Map cell_ids to predictions, or to sentences that say why there are none.

    sources: of every Cell's model, by its name; labels: of every task; every_token: tasks whose loss is of every token.
    Nothing is fetched: a model that is not on this machine is not predicted.
    """
    found: dict[str, Predicted | str] = {}
    asked: dict[str, tuple[Cell, dict[str, Any]]] = {}
    here = {name: _at_hand(source) for name, source in sources.items()}
    for cell in cells:
        model = here[cell.model]
        if isinstance(model, str):
            found[cell.cell_id] = model
        else:
            config, checkpoint = model
            asked[cell.cell_id] = cell, request(cell, config, sources[cell.model].kind, labels[cell.task], checkpoint)
    of_models: dict[str, dict[str, Any]] = {}
    for cell, one in asked.values():
        # A model is built once for all its Cells; those that differ in what is not counted (a seed, a batch) share a count.
        methods = of_models.setdefault(_model_of(one), one | {"methods": {}})["methods"]
        configs_of = methods.setdefault(cell.method, [])
        configs_of += [cell.config] if cell.config not in configs_of else []
    steps: dict[str, dict[str, Any]] = {}
    step_of = {id_: _step(cell, one, steps, every_token) for id_, (cell, one) in asked.items()}
    counts = counting_client.ask([*of_models.values(), *steps.values()])
    if not isinstance(counts, str):
        late = {"no_peak": f"the steps before it took {counting_client.TIMEOUT_S:.0f} s"}
        counts += [late] * (len(of_models) + len(steps) - len(counts))
    for cell_id, (cell, one) in asked.items():
        if isinstance(counts, str):
            found[cell_id] = counts
            continue
        at, counted = list(of_models).index(_model_of(one)), of_models[_model_of(one)]["methods"][cell.method]
        answer = counts[at]
        if "error" not in answer:
            answer = answer | {"methods": {cell.method: [answer["methods"][cell.method][counted.index(cell.config)]]}}
        of_shape = predicted(cell, answer, every_token=cell.task in every_token)
        if isinstance(of_shape, Predicted):
            of_shape = of_shape.model_copy(update=counts[len(of_models) + step_of[cell_id]])
        found[cell_id] = of_shape
    return found


def _step(cell: Cell, one: Mapping[str, Any], steps: dict[str, dict[str, Any]], every_token: Collection[str]) -> int:
    """Ask for a Cell's training step, unless one like it is in `steps`; return which of them it is."""
    same = {
        "seed": 0,
        "evaluation": Evaluation(items=0),
        "task": "",
        "training": cell.training.model_copy(update=_SAME),
    }
    whole = cell.task in every_token or cell.evaluation.items == 0
    step = {
        "cell": cell.model_copy(update=same).model_dump(mode="json"),
        "config": one["config"],
        "kind": one["kind"],
        "checkpoint": one["checkpoint"],
        "answer": cell.training.max_tokens if whole else 1,
    }
    key = json.dumps(step, sort_keys=True)
    steps.setdefault(key, step)
    return list(steps).index(key)


def _model_of(asked: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in asked.items() if key != "methods"}, sort_keys=True)


def _at_hand(source: Source) -> tuple[dict[str, Any], str] | str:
    """Return the config.json of a model on this machine and the folder of its weights, empty for a shape; or why not."""
    try:
        if (here := fetch.at_hand(source)) is None:
            return f"{source.name} is not on this machine yet"
        return shapes.read(here / "config.json", source.name), str(here) if source.scheme != "shape" else ""
    except HarnessError as error:
        return error.what
