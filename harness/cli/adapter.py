"""Work of `check PATH`: judge one adapter file, without running any loader. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.adapter_files.findings import Finding, judge
from harness.conformance.adapter_files.loader_readings import LoaderVerdict, features, verdicts
from harness.console import align_columns, foreign_output, print_json, print_lines
from harness.errors import Exit, Unsupported, plural
from harness.methods.base_model import empty_base


def check(path: Path, base_model: Path | None, as_json: bool) -> Exit:
    """Judge an adapter, print the findings and how known loaders read it, and return the exit code.

    base_model: folder of the base. By default, base_model_name_or_path if that is a folder; otherwise the file is
    judged by itself. Raises UsageError if the adapter or the base cannot be read.
    """
    adapter = AdapterFile.read(path)
    folder = base_model or adapter.local_base
    with foreign_output():
        base, not_judged = _base(adapter, folder)
    findings = [*judge(adapter, base), *not_judged]
    used = features(adapter, findings, bool(getattr(getattr(base, "config", None), "tie_word_embeddings", False)))
    loaders = list(verdicts(used))
    code = Exit.FAIL if any(one.nonconforming for one in findings) else Exit.PASS
    if as_json:
        print_json(
            {
                "schema": 1, "exit": int(code), "adapter": str(path), "base": None if folder is None else str(folder),
                "base_class": None if base is None else type(base).__name__,
                "findings": [vars(one) | {"nonconforming": one.nonconforming} for one in findings],
                "features": used, "loaders": [vars(one) for one in loaders],
            }
        )  # fmt: skip
    else:
        print_lines([*_summary(adapter, folder, base), "", *_findings(findings), "", *_loaders(loaders)])
    return code


def _base(adapter: AdapterFile, folder: Path | None) -> tuple[Any, list[Finding]]:
    """Return the base without weights, and a note if there is no class for the adapter's task."""
    if folder is None:
        return None, []
    try:
        return empty_base(adapter.base(folder)), []
    except Unsupported as error:
        return None, [Finding("not-judged", "task_type", f"{error}; keys and shapes are not compared with the base")]


def _summary(adapter: AdapterFile, folder: Path | None, base: Any) -> Iterator[str]:
    settings: Any = adapter.settings
    dtypes = sorted({one.dtype for one in adapter.header.values()})
    scaling = f"alpha {settings.lora_alpha:g} / {'sqrt(r)' if settings.use_rslora else 'r'} = {settings.scaling(''):g}"
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if getattr(settings, name)]
    usual = " unless a pattern says otherwise" if patterns else ""
    yield f"{adapter.weights}: {plural(len(adapter.header), 'tensor')} in {', '.join(dtypes) or 'no dtype'}"
    yield f"rank {settings.r}, scaling {scaling}{usual}"
    if folder is None:
        yield "base: none; keys and shapes are not compared with one (--base-model FOLDER)"
    else:
        yield f"base: {folder}{f', as {type(base).__name__}' if base is not None else ''}"


def _findings(findings: list[Finding]) -> Iterator[str]:
    if not findings:
        yield "no findings: the file conforms"
        return
    rows = [["finding", "where", "message"]]
    for one in findings:
        head = one.kind if one.nonconforming else f"note: {one.kind}"
        rows.append([head, one.where, f"{one.message}{f'; hint: {one.hint}' if one.hint else ''}"])
    yield from align_columns(rows, indent="")


def _loaders(loaders: list[LoaderVerdict]) -> Iterator[str]:
    rows = [["known loader", "reads it", "because", "source"]]
    for one in loaders:
        because = ": ".join(filter(None, [one.feature, one.because]))
        rows.append([one.loader, one.verdict, because, one.source])
    yield from align_columns(rows, indent="")
