"""Import a finished training: judge its adapter, and run one Cell that loads and evaluates it instead of training."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.assets import fetch
from harness.assets.table import Source, load_table, resolve
from harness.cell.job import ImportedAdapter
from harness.console import hold_output, print_lines
from harness.errors import Exit, SuiteError, UsageError
from harness.methods.peft_config import KEY
from harness.process.signals import handle_termination
from harness.records.imported import Imported
from harness.records.record import ADAPTER_SHA256, Base, Cell, Dtype, Training
from harness.resources import data_folder
from harness.runner.run import run_suite
from harness.runner.tool_layouts import FinishedRun
from harness.suites import loader
from harness.suites.expand import select
from harness.suites.schema import SYNTHETIC
from harness.suites.suite import Suite

if TYPE_CHECKING:
    from harness.conformance.adapter_files.adapter_file import AdapterFile

_SUITE = """\
suite: import
title: {title}
matrix:
  - model: {model}
    task: {task}
    method: frozen
    training: {{steps: 0, max_tokens: {max_tokens}}}
    evaluation: {{{items}}}
"""
"""Template of a suite with one Cell. `_with_import` replaces the Method and the config of this Cell."""


@dataclass(frozen=True)
class ImportRequest:
    """Arguments of the command `import`."""

    folder: Path
    model: str | None = None
    """Name or folder of the base model. If None, it is the model of the first Cell of `beside` or, without `beside`,
    the base that the adapter's config names."""
    task: str | None = None
    """Name or file of the task. If None, it is the task of the first Cell of `beside`; without `beside`, nothing is
    scored."""
    checkpoint: int | None = None
    beside: str | None = None
    """Suite whose Cells are run too. None for the imported Cell alone."""
    only: str | None = None
    """Expression that selects Cells of `beside`. None for all of them."""
    items: int = 100
    max_tokens: int = 64
    dtype: Dtype = "float32"


@handle_termination()
def import_run(
    request: ImportRequest, *, out: Path | None, device: Literal["auto", "cpu", "cuda"], timeout: float
) -> Exit:
    """Judge the adapter of a finished training and evaluate it. Print the summary, and return the exit code.

    A nonconforming file is not evaluated; its findings are printed, and the exit code is 1. Raises UsageError if the
    folder, the base or the task cannot be used.
    """
    from harness.conformance.adapter_files.adapter_file import AdapterFile

    finished = FinishedRun.find(request.folder, request.checkpoint)
    adapter, facts = AdapterFile.read(finished.adapter), finished.facts()
    if adapter.settings.modules_to_save or adapter.settings.bias != "none":
        what = "the adapter also replaces modules or biases of its base (modules_to_save, bias)"
        hint = "`peft-harness check FOLDER` judges such a file; `import` cannot evaluate it yet"
        raise UsageError(what, where=str(finished.adapter), hint=hint)
    suite = _suite(request, adapter)
    first = suite.plan.cells[0]
    source = resolve(first.model, suite.sources, suite.path.resolve().parent)
    if source.kind != "causal" or source.scheme == "shape":
        what = f"model {first.model} is {'an encoder' if source.kind != 'causal' else 'a shape without weights'}"
        raise UsageError(what, where="--model", hint="`import` evaluates adapters of causal models with weights")
    if code := _judge(adapter, fetch.ensure(source)):
        return code
    return run_suite(
        _with_import(suite, first, request, adapter, facts),
        out=out, device=device, timeout=timeout,
        imported=ImportedAdapter(folder=str(finished.adapter.resolve()), facts=facts),
    )  # fmt: skip


def _judge(adapter: AdapterFile, base: Path) -> Exit:
    """Print the findings about an adapter file. Return FAIL if it does not conform.

    Raises UsageError if the adapter's `task_type` needs another class of the base model, e.g. with a classification
    head, because a Cell evaluates the base model unchanged.
    """
    from harness.conformance.adapter_files.findings import judge
    from harness.methods.base_model import empty_base

    with hold_output():
        if adapter.base_for_task(base) != base:
            hint = "give the base as it was trained on: saved with the class and the labels of the task"
            task = adapter.settings.task_type
            raise UsageError(
                f"the adapter's task_type {task} needs another class of this base", where=str(base), hint=hint
            )
        findings = judge(adapter, empty_base(base))
    for one in findings:
        hint = f"; hint: {one.hint}" if one.hint else ""
        print_lines([f"{'' if one.nonconforming else 'note: '}{one.kind}: {one.where}: {one.message}{hint}"])
    if not any(one.nonconforming for one in findings):
        return Exit.PASS
    print_lines([f"not imported: {adapter.weights} does not conform; `peft-harness check {adapter.folder}` says more"])
    return Exit.FAIL


def _suite(request: ImportRequest, adapter: AdapterFile) -> Suite:
    """Return the suite `request.beside`, with its first Cell of the requested model and task moved to the front.

    Cells that `request.only` does not select are left out. Without `beside`, return a suite with a single Cell, from
    the template `_SUITE`.
    """
    if request.beside is not None:
        suite = loader.load(request.beside)
        plan = select(suite.plan, request.only) if request.only else suite.plan
        cells = [
            cell for cell in plan.cells if request.model in (None, cell.model) and request.task in (None, cell.task)
        ]
        if not cells:
            what = f"no Cell of {suite.name} has this model and task"
            raise UsageError(what, where="--beside", hint="leave out --model and --task: the first Cell decides")
        ordered = (cells[0], *(cell for cell in plan.cells if cell is not cells[0]))
        return replace(suite, plan=replace(plan, cells=ordered))
    task = request.task or SYNTHETIC
    items = "" if task == SYNTHETIC else f"items: {request.items}"
    values = {"model": _model(request, adapter), "task": _absolute(task), "title": f"Imported from {request.folder}"}
    text = _SUITE.format(
        **{name: json.dumps(value) for name, value in values.items()}, max_tokens=request.max_tokens, items=items
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "import.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            return loader.load(path)
        except SuiteError as error:
            problem = error.problems[0]
            raise UsageError(problem.what, where="--model, --task", hint=problem.hint) from error


def _model(request: ImportRequest, adapter: AdapterFile) -> str:
    """Return the name or the absolute path of the base. Raises UsageError if it is not known."""
    if request.model is not None:
        return _absolute(request.model)
    if adapter.local_base is not None:
        return str(adapter.local_base.resolve())
    named = adapter.config.get("base_model_name_or_path")
    hint = "name the base by --model: a folder, or a name of `peft-harness list models`"
    what = f"its base {named!r} is no folder on this machine" if named else "its config names no base"
    raise UsageError(what, where=str(adapter.folder), hint=hint)


def _absolute(name: str) -> str:
    """Return the absolute path of a file or folder that exists. Return any other name unchanged."""
    path = Path(name)
    return str(path.resolve()) if path.exists() and name not in _sources() else name


def _sources() -> Mapping[str, Source]:
    return load_table(data_folder("suites") / "sources.yaml")


def _with_import(suite: Suite, first: Cell, request: ImportRequest, adapter: AdapterFile, facts: Imported) -> Suite:
    """Return the suite with a Cell for the imported adapter, which has the model and task of `first`.

    If `request.beside` names a suite, the Cell comes after the Cells of this suite. Otherwise it is the only Cell.
    """
    config: dict[str, Any] = {KEY: dict(adapter.config), ADAPTER_SHA256: facts.adapter_sha256}
    training = Training(steps=0, batch=first.training.batch, max_tokens=first.training.max_tokens)
    cell = first.model_copy(
        update={
            "method": "peft", "implementation": "hf-peft", "config": config, "base": Base(), "optimizer": "adamw",
            "dtype": request.dtype, "seed": 0, "training": training, "environment": "",
            "evaluation": first.evaluation.model_copy(update={"skip": 0, "latency": True}),
        }
    )  # fmt: skip
    cells = (cell,) if request.beside is None else (*suite.plan.cells, cell)
    ids = suite.plan.ids | {cell.cell_id: suite.plan.ids[first.cell_id]}
    return replace(suite, plan=replace(suite.plan, cells=cells, ids=ids))
