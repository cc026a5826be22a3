"""Check whether Cells fit the models that are on this machine: their layers and the lengths of texts. Imports no torch.

The check runs before anything is fetched, and again when all models have been fetched. The headers of the weight files
list every layer with weights of its own, but not, e.g., tied layers. If a target is not found in the headers, a child
process builds the model without weights and looks for the layer there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.assets import fetch, misfit, model_folder
from harness.assets.table import resolve
from harness.errors import Problem, SuiteError, closest_match
from harness.methods.spec import TARGET_WORDS
from harness.process import supervisor
from harness.records.record import DECODED
from harness.suites.lm_eval_keys import max_answer_tokens, too_long

if TYPE_CHECKING:
    from harness.records.record import Cell
    from harness.suites.expand import Plan
    from harness.suites.suite import Suite

_TIMEOUT_S = 120.0
"""Maximum time to build one model, in seconds."""


@dataclass(frozen=True)
class _Unseen:
    """The names of layers that a suite gives for one model, and that match no layer in the headers of its weight files."""

    folder: Path
    kind: str
    wanted: dict[str, dict[str, str]]
    """Name of a layer -> (place where the suite has this name, as `file:line` -> name of the model)."""


def check_models(suite: Suite, plan: Plan) -> None:
    """Raise SuiteError if a Cell of the plan does not fit its model. Only models on this machine are checked."""
    places = {entry.id: entry.places for entry in suite.entries}
    of_model: dict[str, list[tuple[Cell, dict[str, str]]]] = {}
    for cell in plan.cells:
        of_model.setdefault(cell.model, []).append((cell, places[plan.ids[cell.cell_id]]))
    found: list[Problem] = []
    unseen: list[_Unseen] = []
    for model, cells in of_model.items():
        source = resolve(model, suite.sources, suite.path.resolve().parent)
        folder = fetch.local_folder(source)
        if folder is not None:
            found += _too_long(folder, source.kind, cells, suite)
            found += _none_of_them(folder, cells)
            found += _dropout(folder, cells)
            unseen += _unseen(folder, source.kind, cells)
    found += _no_layers(unseen)
    if found:
        raise SuiteError(list(dict.fromkeys(found)))


def _too_long(folder: Path, kind: str, cells: list[tuple[Cell, dict[str, str]]], suite: Suite) -> Iterator[Problem]:
    most = model_folder.positions(folder)
    if most is None:
        return
    for cell, places in cells:
        task = suite.tasks[cell.task]
        if problem := too_long(cell, most, max_answer_tokens(task.spec) if task.answers else 0):
            yield Problem(places["max_tokens"], *problem)
        prompt = cell.evaluation.later().get("prompt_tokens")  # the default is cut to the positions of the model
        decoded = DECODED if kind == "causal" else 0
        if cell.evaluation.latency and isinstance(prompt, int) and prompt + decoded > most:
            more = f" and {decoded} decoded ones" if decoded else ""
            what = f"`prompts` have {prompt} tokens{more}, but {cell.model} has {most} positions"
            yield Problem(places["tokens"], what, f"write at most {most - decoded}")


def _unseen(folder: Path, kind: str, cells: list[tuple[Cell, dict[str, str]]]) -> Iterator[_Unseen]:
    paths = model_folder.layers(folder)
    wanted: dict[str, dict[str, str]] = {}
    for cell, places in cells:
        targets = cell.config.get("targets")
        for name in targets if isinstance(targets, list) else ():
            if not _seen(name, paths):
                wanted.setdefault(name, {})[places["targets"]] = cell.model
    if wanted:
        yield _Unseen(folder, kind, wanted)


def _no_layers(unseen: Sequence[_Unseen]) -> Iterator[Problem]:
    requests = tuple((one.folder, one.kind, tuple(one.wanted)) for one in unseen)
    for one, misfits in zip(unseen, _misfits(requests) if requests else (), strict=True):
        for name, found in misfits.items():
            for where, model in one.wanted[name].items():
                yield Problem(where, f"`targets`: {found['reason']}", misfit.hint(found, model))


def _none_of_them(folder: Path, cells: list[tuple[Cell, dict[str, str]]]) -> Iterator[Problem]:
    """Yield a problem for each adapter config whose target_modules match no layer. PEFT accepts a config with one match."""
    paths = model_folder.layers(folder)
    for cell, places in cells:
        config = cell.config.get("adapter_config")
        names = config.get("target_modules") if isinstance(config, dict) else None
        if paths and isinstance(names, list) and names and not any(_seen(str(name), paths) for name in names):
            what = f"`adapter_config`: no target_modules ({', '.join(map(str, names))}) is a layer of {cell.model}"
            ends = sorted({path.rpartition(".")[2] for path in paths})
            close = dict.fromkeys(filter(None, (closest_match(str(name), ends) for name in names)))
            guess = f"did you mean {', '.join(f'`{name}`' for name in close)}? " if close else ""
            yield Problem(places["adapter_config"], what, f"{guess}it has {', '.join(ends)}")


def _dropout(folder: Path, cells: list[tuple[Cell, dict[str, str]]]) -> Iterator[Problem]:
    """Yield a problem for each Cell that trains with another library's loop although its model has dropout.

    SFTTrainer pads texts on one side and the harness on the other, so dropout would hit other tokens.
    """
    dropped = model_folder.dropout(folder)
    for cell, places in cells:
        if dropped and cell.training.steps and cell.training.loop != "harness":
            what = f"`loop` is {cell.training.loop}, but {cell.model} has dropout (`{dropped}` of its config.json)"
            yield Problem(places["loop"], what, "write `loop: harness`, or set the dropout to 0 in a copy of the model")


def _seen(name: str, paths: Collection[str]) -> bool:
    """Return whether `name` matches one of the layers at `paths`.

    The word `attention` matches every path with `attn` or `attention`. The word `all-linear` always matches.
    """
    if name in TARGET_WORDS:
        return name != "attention" or any("attn" in path or "attention" in path.lower() for path in paths)
    return any(path == name or path.endswith(f".{name}") for path in paths)


@functools.cache
def _misfits(requests: tuple[tuple[Path, str, tuple[str, ...]], ...]) -> list[dict[str, misfit.Misfit]]:
    """Return one dict per request, with each name that matches no layer.

    requests: tuples (folder of a model, its kind, names of layers). If a model cannot be built here, its dict is empty,
    and its Cells report the failure.
    """
    found: list[dict[str, misfit.Misfit]] = []
    while left := requests[len(found) :]:
        request = json.dumps([[str(folder), kind, names] for folder, kind, names in left])
        with supervisor.python(["-P", "-m", "harness.assets.structure", request], {"HF_HUB_OFFLINE": "1"}) as child:
            child.wait(_TIMEOUT_S * len(left))
        lines = [line for line in child.output.splitlines() if line.endswith("}")]  # a kill may leave a torn line
        answers = [line.removeprefix(supervisor.ANSWER) for line in lines if line.startswith(supervisor.ANSWER)]
        found += map(json.loads, answers)
        if len(answers) < len(left):
            found.append({})  # the process ended or hung at this model; continue with the others
    return found
