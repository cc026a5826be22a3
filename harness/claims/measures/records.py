"""Measures: memory of Cells, from the Records of a run, and functions that all measures of Records share.

An entry of a suite is a training setup. Its Cells differ only in the seed, and each has a Record with its results. An
uncertain measurement is an interval. It reproduces a claim only if the whole interval agrees with the claim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo

from harness import resources
from harness.analysis import measurements
from harness.assets import shapes
from harness.claims import attached_model, record_sources
from harness.claims.interval import ONE, Interval
from harness.claims.measure import FOLDER, MeasureResult, Model, NotRunError, measure
from harness.errors import SuiteError, did_you_mean
from harness.records.record import Cell, Predicted, Record


def _suite(name: str, info: ValidationInfo) -> str:
    from harness.suites import loader

    if not name.endswith(".yaml"):
        if name not in (there := loader.names()):
            hint = did_you_mean(name, there, instead="write the path of a .yaml file")
            raise ValueError(f"unknown suite `{name}`; {hint}")
        return name
    path = (info.context or {}).get(FOLDER, Path()) / resources.user_path(name)
    if not path.exists():
        raise ValueError(f"there is no file {path.resolve()}; write the path of a suite, relative to the claim file")
    try:
        record_sources.entries(str(path.resolve()))
    except SuiteError as error:
        several = f"{len(error.problems)} mistakes, the first is " if len(error.problems) > 1 else ""
        raise ValueError(f"{several}{error.problems[0]}") from error
    return str(path.resolve())


def _entry(name: str, info: ValidationInfo) -> str:
    suite = info.data.get("whole_suite" if info.field_name == "whole" else "suite")  # None if the suite is invalid
    if suite is not None and name not in (there := record_sources.entries(suite)):
        raise ValueError(record_sources.unknown(suite, name, there))
    return name


SuiteName = Annotated[str, AfterValidator(_suite)]
"""A parameter that is the name of a suite, or the path of a suite file relative to the claim file."""
Entry = Annotated[str, AfterValidator(_entry)]
"""A parameter that is the id of an entry of `suite`. If the parameter is called `whole`, it is the id of an entry of
`whole_suite`."""
Depths = Annotated[list[Entry], Field(min_length=2)]
"""A parameter that lists the ids of entries of `suite`. They differ only in the number of blocks of their model."""
LABELS = 2
"""Number of classes of the new classification head of an encoder, as in tasks with random labels."""
_EQUAL_FIELDS = ("method", "base", "dtype", "optimizer")
"""Fields of a Cell. `scaled_memory` requires equal values of these fields in the whole Cell and in the smaller Cells."""
_LEFT_OUT = "without CUDA's context and memory that the allocator holds beyond tensors"


@measure("bytes")
def peak_memory(suite: SuiteName, cell: Entry) -> MeasureResult:
    """Peak memory of a Cell's training, as a range over seeds.

    On a GPU, this is the peak of the tensors, without CUDA's context. On a CPU, it is the peak of the process, minus
    the memory that the process had after its imports.
    """
    (own,) = record_sources.records(suite, cell)
    return _peak(own).measured(f"{_peaks(own)}; {record_sources.place(own[0])}")


@measure("bytes")
def device_memory(suite: SuiteName, cell: Entry) -> MeasureResult:
    """GPU memory that a Cell's training needs, as a range.

    The least value is the peak of the tensors. The largest value is the memory that torch's allocator held, or the
    memory that the driver counted, whichever is larger. The driver also counts CUDA's context and other processes. On a
    CPU, or if the Record has neither of these two numbers, the result is that of `peak_memory`.
    """
    (own,) = record_sources.records(suite, cell)
    peak, seen = _peak(own), [gpu for record in own if (gpu := measurements.training_gpu(record))]
    held = max((gpu.reserved_B for gpu in seen if gpu.reserved_B), default=0)
    used = max((gpu.driver_B for gpu in seen if gpu.driver_B), default=0)
    how = [_peaks(own), f"the allocator held {held:,} B" * bool(held)]
    if seen:
        how += [f"the driver counted {used:,} B, with CUDA's context" if used else "without CUDA's context"]
    whole = Interval(peak.value, peak.least, max(peak.most, Fraction(held), Fraction(used)))
    return whole.measured(f"{', '.join(filter(None, how))}; {record_sources.place(own[0])}")


@measure("ratio")
def memory_ratio(suite: SuiteName, of: Entry, to: Entry) -> MeasureResult:
    """Ratio of the peak memory in training: `of` / `to`."""
    a, b = pair(suite, of, to)
    return over(_peak(a), _peak(b)).measured(f"{_peaks(a)} / {_peaks(b)}; {record_sources.place(a[0])}")


@measure("share")
def memory_less(suite: SuiteName, of: Entry, than: Entry) -> MeasureResult:
    """Relative reduction of the peak memory in training: 1 - `of` / `than`."""
    a, b = pair(suite, of, than)
    less = ONE - over(_peak(a), _peak(b))
    return less.measured(f"1 - {_peaks(a)} / {_peaks(b)}; {record_sources.place(a[0])}")


@measure("bytes")
def memory_more(suite: SuiteName, of: Entry, than: Entry) -> MeasureResult:
    """Difference `of` - `than` of the peak memory in training, in bytes."""
    a, b = pair(suite, of, than)
    return (_peak(a) - _peak(b)).measured(f"{_peaks(a)} - {_peaks(b)}; {record_sources.place(a[0])}")


@measure("bytes")
def extrapolated_memory(suite: SuiteName, cells: Depths) -> MeasureResult:
    """Peak memory of training a whole model, extrapolated linearly from Cells with only the model's first blocks.

    Each pair of Cells with neighbouring numbers of blocks gives a line. If there are several lines, the result is a
    range.
    """
    value, how, own = _extrapolated(suite, cells)
    return value.measured(f"{how}; {record_sources.place(own)}")


@measure("ratio")
def extrapolated_memory_ratio(suite: SuiteName, of: Depths, to: Depths) -> MeasureResult:
    """Ratio `of` / `to` of two peak memories, each extrapolated as in `extrapolated_memory`."""
    for a, b in zip(of, to, strict=True):
        pair(suite, a, b)
    (x, above, own), (y, below, _) = _extrapolated(suite, of), _extrapolated(suite, to)
    return over(x, y).measured(f"({above}) / ({below}); {record_sources.place(own)}")


@measure("bytes")
def scaled_memory(suite: SuiteName, cells: Depths, whole_suite: SuiteName, whole: Entry) -> MeasureResult:
    """Training memory of the Cell `whole`, estimated from two Cells with a narrower model.

    cells: the two narrower entries, one with a single block and one with two blocks. Their ranks are smaller in
    proportion. The bytes of weights, adapter, gradients, the optimizer's states and the temporary tensors of the
    optimizer's step are taken from the Records of `cells`. They are multiplied by the ratio of the numbers of
    parameters: one ratio for the blocks, and one for the rest of the model.

    `harness.memory_model` predicts all other bytes: activations, logits, and the states that a paged optimizer leaves
    on the GPU because they are small. The result is a range. The least value is without activations and logits, and the
    largest value is with all of them.
    """
    at = record_sources.cell(whole_suite, whole)
    prediction = predicted(at)
    value, how, own = _scaled(suite, cells, at.model.removeprefix(shapes.PREFIX), prediction.optimizer_B)
    if unlike := [key for key in _EQUAL_FIELDS if getattr(own.cell, key) != getattr(at, key)]:
        raise ValueError(f"{own.cell.label} is not a rehearsal of {at.label}: different {', '.join(unlike)}")
    if prediction.activations_B is None or prediction.logits_B is None:
        raise NotRunError(f"there is no formula for the activations of {at.label}")
    passing = prediction.activations_B + prediction.logits_B
    recomputed = ", with checkpointing" if at.training.checkpointing else ""
    texts = f"{at.training.batch} x {at.training.max_tokens} tokens{recomputed}"
    how += f"; at most {passing:,} B more for activations and logits, by formula for {texts}; {_LEFT_OUT}"
    return MeasureResult(value.least, f"{how}; {record_sources.place(own)}", value.most + passing)


@measure("ratio")
def scaled_memory_ratio(suite: SuiteName, of: Depths, to: Depths, model: Model) -> MeasureResult:
    """Ratio `of` / `to` of two training memories, each scaled up to `model` as in `scaled_memory`.

    Activations and logits are left out.
    """
    for a, b in zip(of, to, strict=True):
        pair(suite, a, b)
    (x, above, own), (y, below, _) = _scaled(suite, of, model), _scaled(suite, to, model)
    return over(x, y).measured(f"({above}) / ({below}), without activations; {record_sources.place(own)}")


@measure("count")
def trained_parameters(suite: SuiteName, cell: Entry) -> MeasureResult:
    """Number of parameters that a Cell's Method trains, without a new head."""
    (own,) = record_sources.records(suite, cell)
    counts = {record.measurements.parameters.adapter for record in own if record.measurements}
    return MeasureResult(max(counts), f"counted in {own[0].cell.label}; {record_sources.place(own[0])}")


@measure("property")
def undecidable(needs: str) -> MeasureResult:
    """A property that the harness cannot decide, e.g. a score of GPT-3. It never has a result.

    needs: what a decision would require.
    """
    raise NotRunError(f"a decision requires {needs}")


def over(x: Interval, y: Interval) -> Interval:
    """Return the quotient of two measurements. Raises NotRunError for a divisor of 0."""
    if not y.least > 0:
        raise NotRunError("the divisor was measured as 0")
    return x / y


def pair(suite: str, of: str, to: str) -> tuple[list[Record], list[Record]]:
    """Return the Records of two entries. Raises ValueError if their model, task or budget differs."""
    a, b = record_sources.records(suite, of, to)
    record_sources.comparable(a, b)
    return a, b


def _depths(suite: str, cells: Sequence[str]) -> tuple[str, dict[int, list[Record]]]:
    """Return a model's name without its number of blocks, and number of blocks -> Records, in ascending order.

    cells: entries that differ only in the number of blocks of their model. Raises ValueError if they differ in anything
    else.
    """
    sides = record_sources.records(suite, *cells)
    names = {own[0].cell.model.removeprefix(shapes.PREFIX).partition("/")[0] for own in sides}
    else_equal = {own[0].cell.model_copy(update={"model": ""}).cell_id for own in sides}
    found = {_blocks(own[0].cell.model): own for own in sides}
    if len(names) > 1 or len(else_equal) > 1 or len(found) < len(sides):
        raise ValueError(f"{', '.join(cells)} must differ only in the number of blocks")
    return names.pop(), dict(sorted(found.items()))


def _extrapolated(suite: str, cells: Sequence[str]) -> tuple[Interval, str, Record]:
    model, at = _depths(suite, cells)
    blocks, lines, terms = _blocks(model), [], []
    for low, high in itertools.pairwise(at):
        least, most = _peak(at[low]).value, _peak(at[high]).value
        each = (most - least) / (high - low)
        lines.append(least + (blocks - low) * each)
        terms.append(f"{int(least):,} B at {low} + {blocks - low} x {float(each):,.0f} B")
    how = f"{' or '.join(terms)}, for {blocks} blocks"
    return Interval(lines[-1], min(lines), max(lines)), how, next(iter(at.values()))[0]


def _scaled(suite: str, cells: Sequence[str], model: str, paged: int | None = None) -> tuple[Interval, str, Record]:
    """Scale the bytes in the Records of `cells` up to `model`. Return the bytes, the arithmetic as text, and one Record.

    paged: bytes of the states that a paged optimizer leaves on the GPU when it trains `model`.
    """
    narrow, at = _depths(suite, cells)
    if [*at] != [1, 2]:
        raise ValueError(f"{', '.join(cells)} have {', '.join(map(str, at))} blocks; name Cells with 1 and 2 blocks")
    one, two = (_counted(own[0]) for own in at.values())
    block, rest = _sizes(narrow)
    per_block, per_rest = (two - one) / block, (one - (two - one)) / rest
    block, rest = _sizes(model)
    value = per_block * block * _blocks(model) + per_rest * rest
    how = f"{float(per_block):.4g} B x {_blocks(model)} x {block:,} + {float(per_rest):.4g} B x {rest:,} parameters"
    how += f", with the bytes per parameter of {narrow}"
    if _is_paged(at[1][0]):
        if paged is None:
            raise ValueError(
                f"{at[1][0].cell.label} pages its optimizer: its states on a GPU are not proportional to size"
            )
        value, how = value + paged, f"{how}, + {paged:,} B of states that the paged optimizer leaves on the GPU"
    return Interval(value, value, value), how, at[1][0]


def _blocks(address: str) -> int:
    return shapes.blocks(shapes.config_of(address.removeprefix(shapes.PREFIX)))


def _sizes(model: str) -> tuple[int, int]:
    """Return the number of parameters in one block, and the number outside of all blocks."""
    one, two = (attached_model.parameter_count(f"{model}/{n}-blocks") for n in (1, 2))
    return two - one, 2 * one - two


def _counted(record: Record) -> Fraction:
    memory = record.measurements.memory if record.measurements else None
    if memory is None or memory.predicted is None:
        raise NotRunError(f"the Record of {record.cell.label} lacks the memory of the optimizer's step")
    states = 0 if _is_paged(record) else memory.optimizer_B  # paged states on a GPU are not proportional to parameters
    return Fraction(memory.weights_B + memory.adapter_B + memory.gradients_B + states + memory.predicted.step_B)


def _is_paged(record: Record) -> bool:
    return record.cell.optimizer.startswith("paged")


def predicted(cell: Cell) -> Predicted:
    """Return the memory that a Cell's training would need on a GPU, as `harness.memory_model` predicts it."""
    from harness.memory_model import counting, plan_prediction

    config, kind = shape_of(cell)
    counted = counting.answer(plan_prediction.count_request(cell, config, kind, LABELS))
    found = plan_prediction.prediction(cell, counted, every_token=True)
    if isinstance(found, str):
        raise NotRunError(f"the memory of {cell.label} cannot be predicted: {found}")
    return found


def shape_of(cell: Cell) -> tuple[dict[str, Any], str]:
    """Return the config.json of the Cell's model, and the kind of the model: `causal` or `encoder`."""
    config, kind = attached_model.config_and_kind(cell.model.removeprefix(shapes.PREFIX))
    return (shapes.with_classes(config, LABELS) if kind == "encoder" else config), kind


def _peak(own: Sequence[Record]) -> Interval:
    peaks = [
        measurements.above_imports(record, peak)
        for record in own
        if (peak := measurements.training_peak(record)) is not None
    ]
    if len(peaks) < len(own):
        raise NotRunError(f"the system reported no peak memory for {own[0].cell.label}")
    return Interval.around(max(peaks), min(peaks), max(peaks))


def _peaks(own: Sequence[Record]) -> str:
    x = _peak(own)
    several = f" to {int(x.most):,}" if x.least != x.most else ""
    return f"peak of {int(x.least):,}{several} B in training ({own[0].cell.label})"
