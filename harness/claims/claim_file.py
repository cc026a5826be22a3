"""Claim files: `suites/claims/PAPER.yaml`, or a user's own. Every mistake of a file at once, with its line. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from harness import suite_file, yaml_lines
from harness.claims.claim import Asking, Claim, Reading, Tier
from harness.claims.measuring import Measure, measures
from harness.claims.printed import Dimension, Printed, Rounding, exact, parse, shortly
from harness.errors import Problem, SuiteError, UsageError
from harness.methods import methods
from harness.resources import folder
from harness.spelling import near
from harness.suite_file import Id, Keys, Word
from harness.yaml_lines import Document, Way


def _text(written: Any) -> Any:
    """Return the characters of what YAML reads as a number: `printed: 0.10` has two digits."""
    is_number = isinstance(written, int | float) and not isinstance(written, bool)
    return getattr(written, "text", str(written)) if is_number else written


_Text = Annotated[str, BeforeValidator(_text)]
_RULES = ("nearest", "cut", "magnitude")


_MEASURED = "-measured"
"""How the name of a paper's second file ends: of claims that need Records."""
_SMALL = "small scale"


class OtherwiseKeys(Keys):
    """One entry of `otherwise:`: what is changed of the claim's measure and arguments."""

    under: Word | None = None
    measure: Word | None = None
    with_: dict[str, Any] = Field(default={}, alias="with")


class RowKeys(Keys):
    """One entry of `rows:`: a claim that shares all else with its table."""

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
    """One entry of `claims:`."""

    tier: Tier | None = None
    scale: Word | None = None
    rows: list[RowKeys] = Field(default=[])


class FileKeys(Keys):
    """The top level of a claim file. shared: a place for anchors."""

    paper: Id | None = None
    title: Word | None = None
    version: Word | None = None
    about: str = ""
    shared: Any = None
    claims: list[ClaimKeys] | None = Field(default=None, min_length=1)


def names() -> list[str]:
    """List the papers that have a file in `suites/claims`."""
    return sorted(path.stem for path in _room().glob("*.yaml") if not path.stem.endswith(_MEASURED))


def paths(papers: Iterable[str]) -> list[Path]:
    """Return the files of papers: what arithmetic settles, and what needs Records. Raises UsageError for one without any."""
    found = []
    for paper in papers:
        if paper not in names():
            mend = f"{near(paper, names(), 'there are')}; or --file FILE for your own"
            raise UsageError(f"no claims of a paper called `{paper}`", where="PAPER", mend=mend)
        files = [_room() / f"{paper}.yaml", _room() / f"{paper}{_MEASURED}.yaml"]
        found += [file for file in files if file.is_file()]
    return found


def _room() -> Path:
    return folder("suites") / "claims"


def load(paths: Iterable[Path]) -> list[Claim]:
    """Read claim files. Raises SuiteError with every mistake of all of them."""
    found: list[Claim] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            document = yaml_lines.load(path, texts=True)
        except SuiteError as error:
            problems += error.problems
            continue
        reading = _Reading(document)
        found += reading.claims()
        problems += reading.problems
    first: dict[str, str] = {}
    for claim in found:
        if claim.id in first:
            what = f"the id `{claim.id}` is taken already, at {first[claim.id]}"
            problems.append(Problem(claim.where, what, "give each claim an id of its own"))
        first.setdefault(claim.id, claim.where)
    if problems:
        raise SuiteError(problems, "claim file")
    return found


class _Reading:
    """One reading of one file; collects the problems on the way."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []

    def claims(self) -> list[Claim]:
        keys, self.problems, self.cut = suite_file.read(self.document, FileKeys)
        for name in ("paper", "title", "version"):
            if not getattr(keys, name) and (name,) not in self.cut:
                self.problem((), f"`{name}` is missing", _MISSING[name])
        if keys.claims is None and ("claims",) not in self.cut:
            self.problem((), "`claims` is missing", "write a list of claims: `peft-harness explain claims` shows one")
        return [
            one for index, claim in enumerate(keys.claims or ()) for one in self._rows(keys, claim, ("claims", index))
        ]

    def problem(self, way: Way, what: str, mend: str) -> None:
        self.problems.append(Problem(self.document.where(*way), what, mend))

    def _rows(self, keys: FileKeys, table: ClaimKeys, way: Way) -> Iterator[Claim]:
        if not table.rows:
            found = self._claim(keys, table, table, way, way)
            if found is not None:
                yield found
            return
        if table.printed:
            self.problem((*way, "printed"), "`printed` stands beside `rows`", "give it to each row")
        for index, row in enumerate(table.rows):
            found = self._claim(keys, table, row, way, (*way, "rows", index))
            if found is not None:
                yield found

    def _claim(self, keys: FileKeys, table: ClaimKeys, row: RowKeys, way: Way, at: Way) -> Claim | None:
        """Return one claim, or None where something that it needs is missing or wrong; that is a problem already."""
        before = len(self.problems)
        is_row = row is not table
        values: dict[str, Any] = {}
        for name in ("sentence", "source", "measure"):
            values[name] = getattr(row, name) or getattr(table, name)
        values["tier"], values["printed"] = table.tier, row.printed
        for name, value in (*values.items(), ("id", row.id), *([("id of the table", table.id)] if is_row else [])):
            place = at if name in ("printed", "id") else way
            if not value and (*place, name.partition(" ")[0]) not in self.cut:
                self.problem(place, f"`{name}` is missing", _MISSING[name.partition(" ")[0]])
        arguments = dict(table.with_) | (dict(row.with_) if is_row else {})
        measure = self._measure(values["measure"], at, is_row and row.measure is None, way)
        asking = self._asking(measure, arguments, (*at, "with"), [(*way, "with")]) if measure else None
        figure = self._figure(values["printed"], measure, at)
        rounding = self._rounding(row.rounding if row.rounding is not None else table.rounding, at)
        otherwise = row.otherwise if row.otherwise is not None else table.otherwise
        owner = at if row.otherwise is not None else way
        readings = [
            reading
            for index, other in enumerate(otherwise or ())
            if (reading := self._otherwise(other, values["measure"], measure, arguments, (*owner, "otherwise", index)))
        ]
        if (
            len(self.problems) > before
            or asking is None
            or measure is None
            or any(gone[: len(at)] == at for gone in self.cut)
        ):
            return None
        name = f"{table.id}-{row.id}" if is_row else str(row.id)
        return Claim(
            id=name,
            sentence=" ".join(self._filled(values["sentence"], values["printed"], arguments).split()),
            paper=str(keys.paper),
            version=str(keys.version),
            source=values["source"],
            tier=values["tier"],
            printed=values["printed"],
            dimension=measure.dimension,
            asking=asking,
            figure=figure,
            rounding=rounding,
            otherwise=tuple(readings),
            scale=table.scale or (_SMALL if values["tier"] == "trained" else ""),
            headline=row.headline or table.headline or "",
            needs=row.needs or table.needs or "",
            note=" ".join((row.note or table.note or "").split()),
            where=self.document.where(*at),
        )

    @staticmethod
    def _filled(sentence: str, printed: str, arguments: Mapping[str, Any]) -> str:
        """Put the row's own values into a sentence that its table shares: `{printed}`, `{rank}`, `{model}`."""
        flat = {**arguments, **arguments.get("config", {}), "printed": printed}
        for key, value in flat.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            sentence = sentence.replace("{" + key + "}", shown)
        return sentence

    def _measure(self, name: str | None, at: Way, inherited: bool, way: Way) -> Measure | None:
        if not name:
            return None
        if name not in measures():
            place = (*way, "measure") if inherited else (*at, "measure")
            one = Problem(self.document.where(*place), f"no measure is called `{name}`", near(name, measures()))
            if one not in self.problems:  # of a table it is one mistake, however many rows
                self.problems.append(one)
            return None
        return measures()[name]

    def _asking(self, measure: Measure, arguments: Mapping[str, Any], at: Way, also: list[Way]) -> Asking | None:
        """Check the arguments of a measure. also: where else a key may stand, for a row inherits those of its table."""
        before = len(self.problems)
        given = {key: value for key, value in arguments.items() if key not in measure.nested}
        asked = {
            key: self._argued(measure, key, arguments[key], self._place(key, at, also))
            for key in arguments
            if key in measure.nested
        }
        try:
            standing_in: dict[str, Any] = {k: [] if isinstance(v, list) else Fraction(0) for k, v in asked.items()}
            model = measure.arguments.model_validate(given | standing_in)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                self._argument(measure, dict(detail), at, also)
            return None
        checked = {key: getattr(model, key) for key in given if key in measure.arguments.model_fields}
        if "config" in checked:
            self._config(checked.get("method"), checked["config"], self._place("config", at, also))
        return Asking(measure.name, checked | asked) if len(self.problems) == before else None

    def _place(self, key: str, at: Way, also: list[Way]) -> Way:
        return next((way for one in (at, *also) if (way := (*one, key)) in self.document.lines), at)

    def _argument(self, measure: Measure, detail: dict[str, Any], at: Way, also: list[Way]) -> None:
        key = str(detail["loc"][0])
        place = self._place(key, at, also)
        known = list(measure.arguments.model_fields)
        if detail["type"] == "extra_forbidden":
            self.problem(place, f"`{measure.name}` has no argument `{key}`", near(key, known, "it takes"))
        elif detail["type"] == "missing":
            self.problem(place, f"`{measure.name}` needs `{key}`", f"add {key} to `with`")
        else:
            what = detail["msg"].removeprefix("Value error, ")
            self.problem(
                place,
                f"`{key}` of `{measure.name}` is {shortly(detail['input'])}: {what}",
                f"see `peft-harness explain {measure.name}`",
            )

    def _argued(self, measure: Measure, key: str, written: Any, way: Way) -> Any:
        """Return an argument that is a quantity, or a list of them."""
        nested = measure.nested[key]
        if nested.several != isinstance(written, list):
            form = "a list of quantities: [a, b]" if nested.several else "one quantity, no list"
            self.problem(way, f"`{key}` of `{measure.name}` is {shortly(written)}", f"write {form}")
            return [] if nested.several else None
        if not nested.several:
            return self._quantity(written, way, nested.dimensions)
        return [self._quantity(one, (*way, index), nested.dimensions) for index, one in enumerate(written)]

    def _quantity(self, written: Any, way: Way, dimensions: tuple[Dimension, ...]) -> Any:
        """Return a number of the paper's, or what is asked of another measure."""
        if (number := exact(written)) is not None:
            return number
        name = written.get("measure") if isinstance(written, dict) and written.keys() <= {"measure", "with"} else None
        inside = written.get("with", {}) if isinstance(name, str) else None
        if not isinstance(inside, dict):
            mend = "write a number of the paper's, or {measure: NAME, with: {...}}"
            self.problem(way, f"{shortly(written)} is no quantity", mend)
            return None
        inner = self._measure(name, way, False, way)
        if inner is None:
            return None
        if inner.dimension == "property" or (dimensions and inner.dimension not in dimensions):
            what = "finds no number" if inner.dimension == "property" else f"is in {inner.dimension}"
            mend = f"name a measure in {' or '.join(dimensions)}" if dimensions else "name a measure that does"
            self.problem(way, f"`{inner.name}` {what}", mend)
            return None
        return self._asking(inner, inside, (*way, "with"), [])

    def _config(self, method: str | None, config: Mapping[str, Any], way: Way) -> None:
        fields = methods()[method].fields if method else {}
        for key, value in config.items():
            if key not in fields:
                self.problem((*way, key), f"{method} has no `{key}`", near(key, fields))
            elif wrong := fields[key].problem(value):
                self.problem((*way, key), f"`{key}` of {method}: {wrong}", fields[key].mend)

    def _figure(self, printed: str | None, measure: Measure | None, at: Way) -> Printed | None:
        if not printed or measure is None or measure.dimension == "property":
            return None
        try:
            return parse(printed, measure.dimension)
        except ValueError as error:
            what, _, mend = str(error).partition("; ")
            self.problem((*at, "printed"), what, mend)
            return None

    def _rounding(self, written: Any, at: Way) -> Rounding:
        if written is None or written in _RULES:
            return Rounding(written or "nearest")
        try:
            within = parse(str(written["about"]), "share").number
        except (KeyError, TypeError, ValueError):
            within = Fraction(-1)
        if not 0 <= within < 1:
            known = ", ".join(_RULES)
            self.problem((*at, "rounding"), f"`rounding` is {written!r}", f"write {known}, or {{about: 5%}}")
            return Rounding()
        return Rounding("about", within)

    def _otherwise(
        self, other: OtherwiseKeys, name: str | None, measure: Measure | None, arguments: Mapping[str, Any], at: Way
    ) -> Reading | None:
        if not other.under and (*at, "under") not in self.cut:
            self.problem(at, "`under` is missing", "say in words which convention, rank or unit this is")
        same = measure
        if other.measure and (same := self._measure(other.measure, at, False, at)) is None:
            return None
        if same is None or measure is None:
            return None
        if same.dimension != measure.dimension:
            what = f"`{same.name}` is in {same.dimension}, but the claim's `{name}` is in {measure.dimension}"
            self.problem((*at, "measure"), what, "name a measure in the same unit")
            return None
        config = {**arguments.get("config", {}), **other.with_.get("config", {})}
        inherited = arguments if other.measure is None else {}
        changed = {**inherited, **other.with_} | ({"config": config} if config and other.measure is None else {})
        asking = self._asking(same, changed, (*at, "with"), [(*at[:-2], "with")])
        return Reading(other.under or "", asking) if asking else None


_MISSING = {
    "paper": "name it in one word, e.g. `paper: lora`",
    "title": "write the paper's title",
    "version": "say which version was read, e.g. `version: arXiv:2106.09685v2`",
    "id": "give it a name of its own",
    "sentence": "say in a sentence of your own what the paper claims",
    "source": "say where it stands, e.g. `source: Table 2`",
    "measure": "name what decides it; `peft-harness list measures` shows them",
    "tier": "write exact, gpu-synthetic or trained",
    "printed": "write the figure as the paper prints it, or of a property what it says",
}
