"""Run `check PATH`: judge one adapter file, and compare the logits of loaders with the reference. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.adapter_files.findings import Finding, judge
from harness.conformance.adapter_files.loader_readings import LoaderVerdict, features, verdicts
from harness.console import align_columns, hold_output, print_json, print_lines
from harness.errors import Exit, Unsupported, UsageError, first_names, plural
from harness.methods.base_model import empty_base
from harness.process.time_limit import TimeLimitError, time_limit

if TYPE_CHECKING:
    from harness.conformance.adapter_files.loader_protocol import LoaderLogits


_JUDGE_S = 60.0
"""Limit of CPU time for judging one adapter, in seconds. An adapter with 36,864 tensors takes 5 s."""
_WRONG = ("differs", "raises")
"""Verdicts on a loader's logits that count as failures."""


@dataclass(frozen=True)
class _Report:
    """Findings about one adapter."""

    path: Path
    adapter: AdapterFile
    folder: Path | None
    """Folder of the base model. None if the adapter was judged without a base."""
    base_class: str
    """Name of the class of the base model. Empty if the adapter was judged without a base."""
    findings: Sequence[Finding]
    features: Sequence[str]
    readings: Sequence[LoaderVerdict]
    logits: Sequence[LoaderLogits]
    """Comparisons of logits, one per loader. Empty if there is no base, or if the file does not conform."""

    @property
    def exit(self) -> Exit:
        """Exit code of `check PATH`.

        FAIL if the file does not conform, or if a loader raises an error or computes other logits than the reference.
        NOTHING_COMPARED if a finding prevented the comparison of the file with the base model.
        """
        if any(one.nonconforming for one in self.findings) or any(one.verdict in _WRONG for one in self.logits):
            return Exit.FAIL
        return Exit.NOTHING_COMPARED if any(one.leaves_all for one in self.findings) else Exit.PASS

    def document(self) -> dict[str, object]:
        """Return the report as a JSON document."""
        return {
            "schema": 1, "exit": int(self.exit), "adapter": str(self.path),
            "base": None if self.folder is None else str(self.folder), "base_class": self.base_class or None,
            "findings": [vars(one) | {"nonconforming": one.nonconforming} for one in self.findings],
            "features": list(self.features), "loaders": [vars(one) for one in self.readings],
            "logits": [one.model_dump() for one in self.logits],
        }  # fmt: skip


def check(
    path: Path, base_model: Path | None, loaders: Sequence[str], patience: float, as_json: bool, junit: Path | None
) -> Exit:
    """Judge an adapter, print the findings and how known loaders read it, and return the exit code.

    base_model: folder of the base. By default, the adapter's base_model_name_or_path if that is a folder. Without a
    base, the file is judged by itself. loaders: names of loaders; if there are none, HF peft. If the file conforms to a
    base, the logits of the loaders are compared with the reference. patience: seconds without a result after which a
    loader counts as hanging. Raises UsageError if the adapter or the base cannot be read.
    """
    adapter = AdapterFile.read(path)
    folder = base_model or adapter.local_base
    if loaders and folder is None:
        raise UsageError("a loader needs the base", where=loaders[0], hint="add --base-model FOLDER")
    with hold_output():
        report, base = _judge(path, adapter, folder)
    if folder is not None and base is not None and report.exit is not Exit.FAIL:
        from harness.conformance.adapter_files.loader_logits import LoaderRequest, compare

        report = replace(
            report, logits=compare(adapter, folder, base, report.features, LoaderRequest(loaders, patience))
        )
    if junit is not None:
        from harness.report.adapter_junit import write_junit

        write_junit(str(path), _cases(report), junit)
    if as_json:
        print_json(report.document())
    else:
        print_lines(_lines(report))
    return report.exit


def _cases(report: _Report) -> Iterator[tuple[str, str, str]]:
    """Yield the cases of the JUnit file: conformance, each finding, and each loader. Harmless findings are skipped
    cases.
    """
    if not any(one.nonconforming for one in report.findings):
        yield "conforms", "", ""
    for one in report.findings:
        yield f"{one.kind}: {one.where}", "failure" if one.nonconforming else "skipped", one.message
    tags = {"agrees": "", **dict.fromkeys(_WRONG, "failure")}
    for loaded in report.logits:
        yield f"logits of {loaded.loader}", tags.get(loaded.verdict, "skipped"), f"{loaded.verdict}: {_because(loaded)}"


def _judge(path: Path, adapter: AdapterFile, folder: Path | None) -> tuple[_Report, Any]:
    """Judge an adapter without running a loader.

    Return the report, and the base model without weights, or None if the adapter was judged without a base.
    """
    base, notes = _base(adapter, folder)
    try:
        with time_limit(_JUDGE_S):
            findings = [*judge(adapter, base), *notes]
            used = features(adapter, findings, base)
    except TimeLimitError as error:
        what = f"it cannot be judged in {_JUDGE_S:g} s of CPU time; one of its regular expressions may backtrack without end"
        hint = "write target_modules, exclude_modules and the patterns as plain names"
        raise UsageError(what, where=str(path), hint=hint) from error
    name = "" if base is None else type(base).__name__
    return _Report(path, adapter, folder, name, findings, used, list(verdicts(used)), []), base


def _base(adapter: AdapterFile, folder: Path | None) -> tuple[Any, list[Finding]]:
    """Return the base model without weights, and notes. Without a folder, return None and no notes.

    If no class fits the adapter's task, return None and a note.
    """
    if folder is None:
        return None, []
    try:
        return empty_base(adapter.base_for_task(folder)), []
    except Unsupported as error:
        return None, [Finding("not-compared", "task_type", str(error))]


def _lines(report: _Report) -> Iterator[str]:
    yield from _summary(report)
    yield ""
    yield from _findings(report.findings)
    if report.logits:
        yield ""
        yield from _logits(report.logits)
    yield ""
    yield from _readings(report.readings)


def _summary(report: _Report) -> Iterator[str]:
    adapter, settings = report.adapter, report.adapter.settings
    dtypes = sorted({one.dtype for one in adapter.header.values()})
    scaling = f"alpha {settings.lora_alpha:g} / {'sqrt(r)' if settings.use_rslora else 'r'} = {settings.scaling(''):g}"
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if getattr(settings, name)]
    usual = " unless a pattern says otherwise" if patterns else ""
    yield f"{adapter.weights}: {plural(len(adapter.header), 'tensor')} in {', '.join(dtypes) or 'no dtype'}"
    yield f"rank {settings.r}, scaling {scaling}{usual}"
    if report.folder is None:
        yield "base: none, so keys, shapes and logits are not compared with it (name one by --base-model FOLDER)"
    else:
        yield f"base: {report.folder}{f', as {report.base_class}' if report.base_class else ''}"


def _findings(findings: Sequence[Finding]) -> Iterator[str]:
    if not findings:
        yield "no findings: the file conforms"
        return
    rows = [["finding", "where", "message"]]
    for _, same in groupby(findings, key=lambda one: one.kind):
        one, *others = same
        more = f"; and {len(others)} more: {first_names([other.where for other in others])}" if others else ""
        head = one.kind if one.nonconforming else f"note: {one.kind}"
        rows.append([head, one.where, f"{one.message}{more}{f'; hint: {one.hint}' if one.hint else ''}"])
    yield from align_columns(rows, indent="")


def _logits(logits: Sequence[LoaderLogits]) -> Iterator[str]:
    rows = [["loader", "logits", "max |Δ|", "of allowed", "because"]]
    for one in logits:
        largest = "" if one.largest is None else f"{one.largest:.1e}"
        share = "" if one.share is None else f"{one.share:.0%}"
        rows.append([one.loader, one.verdict, largest, share, _because(one)])
    yield from align_columns(rows, right=(2, 3), indent="")
    if any(one.largest is not None for one in logits):
        yield "Δ: logit of the loader in float32 minus that of the float64 reference"


def _because(one: LoaderLogits) -> str:
    defect = f"known defect {one.defect} (`peft-harness explain {one.defect}`)" if one.defect else ""
    return "; ".join(filter(None, [defect, one.detail]))


def _readings(readings: Sequence[LoaderVerdict]) -> Iterator[str]:
    rows = [["known loader", "reads it", "because", "source"]]
    for one in readings:
        because = ": ".join(filter(None, [one.feature, one.because]))
        rows.append([one.loader, one.verdict, because, one.source])
    yield from align_columns(rows, indent="")
