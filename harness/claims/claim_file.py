"""Read claim files, `suites/claims/PAPER.yaml` or a user's own. Imports no torch.

All errors are reported at once, with their lines. An entry of `claims:` is a claim, or a table whose `rows:` are
claims.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from harness import yaml_validation
from harness.claims.arguments import Arguments
from harness.claims.claim import Claim, Reading, Tier
from harness.claims.measure import Measure
from harness.claims.printed_number import Printed, Rounding, parse
from harness.errors import Problem, SuiteError, UsageError, did_you_mean, sort_problems
from harness.resources import data_folder
from harness.suites.schema import Id, Keys, Word
from harness.yaml_validation import Document, KeyPath


def _text(written: Any) -> Any:
    """Return the text of a YAML number, so that `printed: 0.10` keeps its two digits. Return other values unchanged."""
    is_number = isinstance(written, int | float) and not isinstance(written, bool)
    return getattr(written, "text", str(written)) if is_number else written


_Text = Annotated[str, BeforeValidator(_text)]
_PLACE = re.compile(r"\{\w+\}")
_FILL = "use {printed}, or an argument or config key that every row has"
_RULES = ("nearest", "cut", "magnitude")
_MEASURED = "-measured"
"""End of the file name of a paper's second claim file. This file has the claims that need Records."""
_SMALL = "small scale"


class OtherwiseKeys(Keys):
    """One entry of `otherwise:`, another way to read a claim. `with:` replaces single arguments of the claim.
    `measure:` replaces the measure and all arguments."""

    under: Word | None = None
    measure: Word | None = None
    with_: dict[str, Any] = Field(default={}, alias="with")


class RowKeys(Keys):
    """One entry of `rows:`, which is a claim. Keys that it lacks are taken from the table around it."""

    id: Id | None = None
    sentence: Word | None = None
    source: Word | None = None
    printed: _Text | None = None
    with_: dict[str, Any] = Field(default={}, alias="with")
    measure: Word | None = None
    rounding: Any = None
    otherwise: list[OtherwiseKeys] | None = None
    headline: Word | None = None
    needs: Word | None = None
    note: Word | None = None


class ClaimKeys(RowKeys):
    """One entry of `claims:`, which is a single claim or, with `rows:`, a table of similar claims."""

    tier: Tier | None = None
    scale: Word | None = None
    rows: list[RowKeys] | None = Field(default=None, min_length=1)


class FileKeys(Keys):
    """The top level of a claim file."""

    paper: Id | None = None
    title: Word | None = None
    version: Word | None = None
    about: str = ""
    shared: Any = None
    """Any content, for YAML anchors of the file. Nothing reads it."""
    claims: list[ClaimKeys] | None = Field(default=None, min_length=1)


def names() -> list[str]:
    """List the papers that have a file in `suites/claims`."""
    return sorted(path.stem for path in _folder().glob("*.yaml") if not path.stem.endswith(_MEASURED))


def paths(papers: Iterable[str]) -> list[Path]:
    """Return the claim files of `papers`. A paper may have a second file, with the claims that need Records of runs.

    Raises UsageError for an unknown paper.
    """
    found = []
    for paper in papers:
        if paper not in names():
            hint = did_you_mean(paper, names(), "there are", "use --file FILE for your own")
            raise UsageError(f"unknown paper `{paper}`", where="PAPER", hint=hint)
        files = [_folder() / f"{paper}.yaml", _folder() / f"{paper}{_MEASURED}.yaml"]
        found += [file for file in files if file.is_file()]
    return found


def _folder() -> Path:
    return data_folder("suites") / "claims"


def load(paths: Iterable[Path]) -> list[Claim]:
    """Read claim files and return their claims. Raises SuiteError with the errors of all files."""
    found: list[Claim] = []
    problems: list[Problem] = []
    first: dict[str, str] = {}
    for path in paths:
        try:
            start = "`paper: NAME`; `peft-harness explain claims` shows a file"
            document = yaml_validation.read(path, texts=True, start=start)
            keys = yaml_validation.validate(document, FileKeys)
        except SuiteError as error:
            problems += error.problems
            continue
        reader = _ClaimFileReader(document)
        found += reader.claims(keys)
        problems += reader.problems
        for where, name in reader.ids:
            if name in first:
                problems.append(
                    Problem(where, f"duplicate id `{name}`, first at {first[name]}", "give each claim its own id")
                )
            first.setdefault(name, where)
    if problems:
        raise SuiteError(sort_problems(problems), "claim file")
    return found


class _ClaimFileReader:
    """Reader of one claim file. `problems` lists the errors. `ids` lists the place and the id of each claim."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []
        self.ids: list[tuple[str, str]] = []
        self.arguments = Arguments(document, self.problems)

    def claims(self, keys: FileKeys) -> list[Claim]:
        self._require({name: getattr(keys, name) for name in ("paper", "title", "version", "claims")}, ())
        return [
            claim
            for index, table in enumerate(keys.claims or ())
            for row, at in self._rows(table, ("claims", index))
            if (claim := self._claim(keys, table, row, ("claims", index), at)) is not None
        ]

    def problem(self, way: KeyPath, what: str, hint: str) -> None:
        self.arguments.problem(way, what, hint)

    def _require(self, values: Mapping[str, Any], way: KeyPath) -> None:
        for name, value in values.items():
            if not value:
                self.problem(way, f"`{name}` is missing", _MISSING[name.partition(" ")[0]])

    def _rows(self, table: ClaimKeys, way: KeyPath) -> list[tuple[RowKeys, KeyPath]]:
        """Return the rows of a table, each with its place in the file. An entry without `rows` is its own only row."""
        if table.rows is None:
            return [(table, way)]
        if table.printed:
            self.problem((*way, "printed"), "`printed` and `rows` exclude each other", "write `printed` in each row")
        return [(row, (*way, "rows", index)) for index, row in enumerate(table.rows)]

    def _claim(self, keys: FileKeys, table: ClaimKeys, row: RowKeys, way: KeyPath, at: KeyPath) -> Claim | None:
        """Return the claim in a row of a table. If the row has errors, add them to `problems` and return None.

        way: place of the table in the file. at: place of the row.
        """
        before = len(self.problems)
        own = {key: value for key, value in row if value not in (None, {})}
        merged = table.model_copy(
            update=own | {"id": row.id, "printed": row.printed, "with_": {**table.with_, **row.with_}}
        )
        self._require({name: getattr(merged, name) for name in ("sentence", "source", "measure", "tier")}, way)
        self._require({"printed": row.printed, "id": row.id}, at)
        name = str(row.id)
        if row is not table:
            self._require({"id of the table": table.id}, way)
            name = f"{table.id}-{row.id}"
        if row.id and table.id:
            self.ids.append((self.document.where(*at), name))
        measure = self.arguments.measure(merged.measure, (*(at if row.measure else way), "measure"))
        places = [(*at, "with"), (*way, "with")]
        request = self.arguments.request(measure, merged.with_, places[0], places[1:]) if measure else None
        figure = self._figure(row.printed, measure, at)
        rounding = self._rounding(merged.rounding, at)
        others = (*(at if row.otherwise is not None else way), "otherwise")
        readings = [
            reading
            for index, other in enumerate(merged.otherwise or ())
            if (reading := self._otherwise(other, measure, merged.with_, (*others, index)))
        ]
        sentence = self._filled(merged.sentence or "", row.printed or "", merged.with_)
        if request and (left := _PLACE.findall(sentence)):
            place = at if row.sentence else way
            self.problem(place, f"the sentence has an unknown placeholder `{left[0]}`", _FILL)
        if len(self.problems) > before or request is None or measure is None or merged.tier is None:
            return None
        return Claim(
            id=name,
            sentence=" ".join(sentence.split()),
            paper=str(keys.paper),
            version=str(keys.version),
            source=str(merged.source),
            tier=merged.tier,
            printed=str(row.printed),
            dimension=measure.dimension,
            request=request,
            figure=figure,
            rounding=rounding,
            otherwise=tuple(readings),
            scale=table.scale or (_SMALL if merged.tier == "trained" else ""),
            headline=merged.headline or "",
            needs=merged.needs or "",
            note=" ".join((merged.note or "").split()),
            where=self.document.where(*at),
            entry=self.document.where(*way),
        )

    @staticmethod
    def _filled(sentence: str, printed: str, arguments: Mapping[str, Any]) -> str:
        """Return a table's sentence with the values of a row in place of `{printed}`, `{rank}`, `{model}` and so on."""
        config = arguments.get("config", {})
        flat = {**arguments, **(config if isinstance(config, dict) else {}), "printed": printed}
        for key, value in flat.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            sentence = sentence.replace("{" + key + "}", shown)
        return sentence

    def _figure(self, printed: str | None, measure: Measure | None, at: KeyPath) -> Printed | None:
        if not printed or measure is None or measure.dimension == "property":
            return None
        try:
            return parse(printed, measure.dimension)
        except ValueError as error:
            what, _, hint = str(error).partition("; ")
            self.problem((*at, "printed"), what, hint)
            return None

    def _rounding(self, written: Any, at: KeyPath) -> Rounding:
        if written is None or written in _RULES:
            return Rounding(written or "nearest")
        try:
            figure = parse(str(written["about"]), "share")
            within = figure.number if not figure.relation and written.keys() == {"about"} else Fraction(-1)
        except (KeyError, TypeError, ValueError):
            within = Fraction(-1)
        if not 0 <= within < 1:
            known = ", ".join(_RULES)
            self.problem((*at, "rounding"), f"unknown `rounding` {written!r}", f"write {known}, or {{about: 5%}}")
            return Rounding()
        return Rounding("about", within)

    def _otherwise(
        self, other: OtherwiseKeys, measure: Measure | None, arguments: Mapping[str, Any], at: KeyPath
    ) -> Reading | None:
        self._require({"under": other.under}, at)
        chosen = self.arguments.measure(other.measure, (*at, "measure")) if other.measure else measure
        if chosen is None or measure is None:
            return None
        is_same_unit = chosen.dimension == measure.dimension
        if not is_same_unit:
            what = (
                f"`{chosen.name}` is in {chosen.dimension}, but the claim's `{measure.name}` is in {measure.dimension}"
            )
            self.problem((*at, "measure"), what, "name a measure in the same unit")
        inherited = arguments if other.measure is None else {}
        changed = {**inherited, **other.with_}
        own, another = inherited.get("config"), other.with_.get("config")
        if isinstance(own, dict) and isinstance(another, dict):
            changed["config"] = own | another
        request = self.arguments.request(chosen, changed, (*at, "with"), [(*at[:-2], "with")])
        return Reading(other.under or "", request) if request and is_same_unit else None


_MISSING = {
    "paper": "name it in one word, e.g. `paper: lora`",
    "title": "write the paper's title",
    "version": "write the version that was read, e.g. `version: arXiv:2106.09685v2`",
    "claims": "write a list of claims; `peft-harness explain claims` shows an example",
    "under": "say what this reading changes, e.g. `under: rank 8`",
    "id": "write a unique name",
    "sentence": "write the claim in a sentence of your own",
    "source": "write the section or table, e.g. `source: Table 2`",
    "measure": "name the measure that decides it; `peft-harness list measures` shows all",
    "tier": "write exact, gpu-synthetic or trained",
    "printed": "write the figure as the paper prints it, or the statement of a property",
}
