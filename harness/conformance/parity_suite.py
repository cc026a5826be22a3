"""Parity suites: the cases that `check` tries for a Method, an Operation or a loader. Each suite is a YAML file in
suites/parity/.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field

from harness import yaml_validation
from harness.conformance import suite_problems
from harness.conformance.adapter_files import corpus
from harness.conformance.case_role import CaseRole, Dtype
from harness.conformance.case_selection import CaseSelection, Values
from harness.conformance.tolerance_constants import long_sum_factor
from harness.errors import Problem, SuiteError, UsageError
from harness.methods.registry import DTYPES, TargetKind
from harness.records.record import FrozenModel
from harness.resources import data_folder

Kind = Literal[
    "linear", "conv1d", "embedding", "embedding-scaled", "conv2d", "conv2d-dilated", "conv2d-reflect", "conv2d-grouped",
    "conv2d-pointwise", "nn-conv1d", "conv3d", "conv3d-pointwise", "experts"
]  # fmt: skip
GROUPS = 2
"""Number of groups in a convolution whose kind is `conv2d-grouped`."""
ModelForm = Literal["plain", "wide", "deep", "tied"]
"""Forms of the ParityModel. `plain` has two layers to adapt. `wide` adds a larger layer that must not be adapted, and
three to adapt that have one input. `deep` has ten to adapt. `tied` has three, of which two share a weight; all its
parameters are frozen."""
Magnitude = Literal["normal", "large", "outlier", "zero-rows", "small", "huge", "tiny", "constant", "positive"]
"""Size of the values of a drawn input; see `harness.conformance.comparison.magnitudes`."""
MAIN_MAGNITUDES = 5
"""The sample of `check --wide` combines the first MAIN_MAGNITUDES values of Magnitude with other settings, and tries the
rest alone."""
WeightSize = Literal["normal", "large", "small", "tiny"]
"""Size of the ParityModel's weights. `large` is 256 times `normal`, and `small` is `normal` / 256. `tiny` weights are
so small that usual guards against a division by zero treat them as 0."""


class CaseShape(FrozenModel):
    """The rows of the input, and the input and output features of the first adapted layer.

    The second layer maps the output features back to the input features.
    """

    tokens: int = Field(ge=1)
    inputs: int = Field(ge=1, alias="in")
    outputs: int = Field(ge=1, alias="out")

    def square(self) -> CaseShape:
        """Return a shape with as many input as output features: the smaller of the two numbers. Both layers then have
        the same size.
        """
        side = min(self.inputs, self.outputs)
        return CaseShape.model_validate({"tokens": self.tokens, "in": side, "out": side})

    def __str__(self) -> str:
        return f"{self.tokens}x{self.inputs}x{self.outputs}"


class Tolerance(FrozenModel):
    """The factor that replaces NOISE_FACTOR for one check of a suite. The report shows the reason, `because`."""

    factor: float = Field(gt=0, le=1000)
    because: str = Field(min_length=10)
    link: str = ""


class SettingRange(FrozenModel):
    """Bounds of a setting's random values, narrower than those in the Method's Config. `because` is the reason."""

    least: float | None = None
    most: float | None = None
    because: str = Field(min_length=10)


class _Tolerant(FrozenModel):
    tolerances: dict[str, Tolerance] = Field(default={})
    checks: list[str] = Field(min_length=1)

    def factors(self) -> dict[str, float]:
        """Map the checks in `tolerances` to the factor that replaces the usual one for them."""
        return {check: looser.factor for check, looser in self.tolerances.items()}

    def long_sums(self, terms: int, **terms_in: int) -> dict[str, float]:
        """Map each check with a long sum to the further factor on its allowed error (see `long_sum_factor`).

        terms: largest number of terms of a sum. terms_in: the same number for single checks that have longer sums.
        """
        found = {check: long_sum_factor(max(terms, terms_in.get(check, 0))) for check in self.checks}
        return {check: factor for check, factor in found.items() if factor > 1}


class MethodSuite(_Tolerant):
    """The cases of one Method: combinations of its configs, kinds of layers, shapes and dtypes, and the checks that try
    them.
    """

    method: str
    base: str = ""
    """Name of the base quantisation that this suite judges, such as `nf4`. The reference adapts the packed base.

    Empty if the suite judges the Method.
    """
    follows: str = "the paper"
    """Source that the reference follows, in words: the paper, or a library where the paper leaves something open."""
    states: list[Literal["init", "warm"]] = Field(min_length=1)
    configs: list[Values] = Field(min_length=1)
    layers: list[Kind] = Field(default=["linear"], min_length=1)
    shapes: list[CaseShape] = Field(min_length=1)
    shapes_of_typical: list[CaseShape] = Field(default=[])
    """Further shapes. Each is tried once, with the config, kind of layer and dtype of the suite's typical case."""
    settings: dict[str, SettingRange] = Field(default={})
    """Name of a setting -> narrower range for its random values, if the range in the Method's Config is too wide."""
    dtypes: list[Dtype] = Field(min_length=1)

    def cases(self, wanted: CaseSelection, dtypes: Collection[str] = DTYPES) -> Iterator[MethodCase]:
        """Yield the suite's cases in each dtype of the suite that is also in `dtypes`.

        With `wanted.full`, all combinations are tried, and then the cases of the last item below. Otherwise:

        - The first kind of layer, which all implementations support, is tried with every config and every shape in one main
          dtype: float32 or, without it, the first other dtype; float64 only if it is the only one.
        - Each other dtype tries a part of these configs and shapes, and a config with dropout if the suite has one.
        - Every other kind of layer is tried in the main dtype and in one other dtype, with one config and one shape.
        - Without `wanted.is_wide`, float64 tries the first config and shape only. Nobody trains adapters in float64.
        - The typical case is tried again with each of `shapes_of_typical`, in `wide` models, and with a `tied` model.
          If no layer is linear or a base is judged, the models are `plain`, and there is no `tied` one.
        """
        if not (there := [dtype for dtype in self.dtypes if dtype in dtypes]):
            return
        few = list(self._few(there, wanted.is_wide))
        plain = [c for c in few if c.dtype == _main(there) and c.kind == self.layers[0] and not _is_random(c.config)]
        oblong = [c for c in plain if c.shape.inputs != c.shape.outputs]  # a square layer hides a transposed matrix
        typical = min(oblong or plain or few, key=lambda c: (*_oddness(c.config), c.shape.inputs * c.shape.outputs))
        if wanted.full:
            for config, kind, shape, dtype in itertools.product(self.configs, self.layers, self.shapes, there):
                if _fits(config, kind):
                    yield MethodCase(config, kind, shape, dtype)
        else:
            yield from (replace(case, typical=case is typical) for case in few)
        further = self.layers[0] == "linear" and not self.base
        form: ModelForm = "wide" if further else "plain"
        yield from (replace(typical, shape=shape, model=form) for shape in self.shapes_of_typical)
        if further:
            yield replace(typical, model="tied")

    def _few(self, dtypes: Sequence[Dtype], wide: bool) -> Iterator[MethodCase]:
        for dtype in dtypes:
            shift, every = _share(self.dtypes, dtypes, dtype, wide)
            configs, shapes = self.configs[every] or self.configs, self.shapes[every] or self.shapes
            if every != _FIRST_ITEM and not any(map(_is_random, configs)):  # only dropout makes training mode differ
                configs = [*configs, *(c for c in self.configs if c.get("dropout"))][: len(configs) + 1]
            for index in range(max(len(configs), len(shapes))):
                shape = shapes[(index + shift) % len(shapes)]
                yield MethodCase(configs[index % len(configs)], self.layers[0], shape, dtype)
            for number, kind in enumerate(self.layers[1:] if every != _FIRST_ITEM else (), start=1):
                if every.step is not None and (number + shift) % every.step:
                    continue
                if suitable := [config for config in self.configs if _fits(config, kind)]:
                    config = suitable[(number + shift) % len(suitable)]
                    yield MethodCase(config, kind, self.shapes[(number + shift) % len(self.shapes)], dtype)


@dataclass(frozen=True)
class MethodCase(CaseRole):
    """One case of a Method's parity suite."""

    config: Values
    kind: Kind
    shape: CaseShape
    dtype: Dtype
    model: ModelForm = "plain"
    magnitude: Magnitude = "normal"
    weights: WeightSize = "normal"

    def __str__(self) -> str:
        kind = "" if self.kind == "linear" else self.kind
        named = {"model": self.model, "magnitude": self.magnitude, "weights": self.weights}
        odd = in_words({name: value for name, value in named.items() if value not in ("plain", "normal")})
        return " ".join(filter(None, [in_words(self.config), kind, str(self.shape), odd]))


class OperationSuite(_Tolerant):
    """The cases of one Operation: each of `values` in each of `dtypes`."""

    operation: str
    follows: str = "the paper"
    values: list[Values] = Field(min_length=1, alias="cases")
    """One entry per case: keyword arguments for the function that draws the Operation's arguments."""
    dtypes: list[Dtype] = Field(min_length=1)

    def cases(self, wanted: CaseSelection, dtypes: Collection[str] = DTYPES) -> Iterator[OperationCase]:
        """Yield the suite's cases in each dtype of the suite that is also in `dtypes`.

        With `wanted.full`, each of `values` is tried in each dtype. Otherwise each of `values` is tried in one main
        dtype: float32 or, if float32 is not requested, the first requested dtype. Each other dtype tries a part of
        `values`.
        """
        there = [dtype for dtype in self.dtypes if dtype in dtypes]
        if not there:
            return
        typical = min(self.values, key=_oddness)
        for dtype in there:
            every = slice(None) if wanted.full else _share(self.dtypes, there, dtype, wanted.is_wide)[1]
            for values in self.values[every] or self.values:
                yield OperationCase(values, dtype, typical=dtype == _main(there) and values is typical)


class LoaderSuite(_Tolerant):
    """The cases of a loader of adapter files: each adapter in suites/adapters in each of `dtypes`."""

    loader: str
    follows: str
    dtypes: list[Dtype] = Field(min_length=1)

    def cases(self, wanted: CaseSelection, dtypes: Collection[str] = DTYPES) -> Iterator[LoaderCase]:
        """Yield the suite's cases in each dtype of the suite that is also in `dtypes`.

        All adapters are read in the first dtype. With `wanted.is_wide`, some adapters are also read in the other
        dtypes. With `wanted.full`, all adapters are read in every dtype.
        """
        there = [dtype for dtype in self.dtypes if dtype in dtypes]
        for dtype in there if wanted.is_wide else there[:1]:
            every = slice(None) if wanted.full else _share(self.dtypes, there, dtype, wide=True)[1]
            yield from (
                LoaderCase(name, dtype, typical=dtype == _main(there) and name == corpus.TYPICAL)
                for name in corpus.names()[every]
            )


ParitySuite = MethodSuite | OperationSuite | LoaderSuite
_PlainSuite = TypeVar("_PlainSuite", OperationSuite, LoaderSuite)


@dataclass(frozen=True)
class OperationCase(CaseRole):
    """One case of an Operation's parity suite."""

    values: Values
    """Keyword arguments for the function that draws the Operation's arguments."""
    dtype: Dtype
    magnitude: Magnitude = "normal"

    def __str__(self) -> str:
        magnitude = "" if self.magnitude == "normal" else f"magnitude={self.magnitude}"
        return " ".join(filter(None, [in_words(self.values), magnitude]))


@dataclass(frozen=True)
class LoaderCase(CaseRole):
    """One case of a loader: one adapter from suites/adapters, in one dtype of the base model."""

    adapter: str
    dtype: Dtype

    def __str__(self) -> str:
        return self.adapter


AnyCase = MethodCase | OperationCase | LoaderCase


def _is_random(config: Values) -> bool:
    """Return whether the layer draws random numbers in training mode with this config."""
    return any(value for name, value in config.items() if name.endswith("dropout"))


def _oddness(values: Values) -> tuple[int, int]:
    """Return a sort key that puts plain settings first: (number of sizes that are 0 or 1, number of settings)."""
    sizes = itertools.chain.from_iterable(one if isinstance(one, list) else [one] for one in values.values())
    return sum(type(size) is int and size < 2 for size in sizes), len(values)


def _main(dtypes: Sequence[Dtype]) -> Dtype:
    """Return the main dtype of a suite: float32 or, without it, the first other one; float64 only if it is the only one."""
    return min(dtypes, key=lambda dtype: (dtype != "float32", dtype == "float64"))


def _fits(config: Values, kind: Kind) -> bool:
    """Return whether a layer of this kind accepts a config of the suite. `conv` changes convolutions only.

    Experts have no dropout, experts and embeddings no bias of B. Only linear layers have a magnitude per input feature.
    The groups of a convolution share the rank, a multiple of GROUPS. With init=orthogonal B A is 0 over the whole rank only.
    """
    if config.get("conv") and not kind.startswith("conv2d"):
        return False
    if config.get("lora_bias") and kind.startswith(("embedding", "experts")):
        return False
    if kind == "conv2d-grouped" and (config.get("rank", 0) % GROUPS or config.get("init") == "orthogonal"):
        return False
    if config.get("per") == "input" and kind not in ("linear", "conv1d"):
        return False
    return kind != "experts" or not config.get("dropout")


_FIRST_ITEM = slice(1)
"""Part of each list of a suite that float64 tries, unless the selection is wide."""


def _share(there: Sequence[Dtype], wanted: Sequence[Dtype], dtype: Dtype, wide: bool) -> tuple[int, slice]:
    """Return a number for `dtype`, and the slice of each list of the suite (such as its configs) to try in `dtype`.

    there: dtypes of the suite. wanted: requested dtypes. The main dtype (see `_main`) has the number n and tries whole
    lists. The other dtypes have the numbers 0, 1 and so on, and share the items: if there are two, each tries every second
    item. Unless `wide`, float64 does not share them, and tries the first item.
    """
    whole = _main(wanted)
    others = [one for one in there if one != whole]
    if dtype == whole:
        return len(others), slice(None)
    sharing: list[Dtype] = [one for one in others if wide or one != "float64"]
    return others.index(dtype), slice(sharing.index(dtype), None, len(sharing)) if dtype in sharing else _FIRST_ITEM


def path_of(name: str) -> Path:
    """Return the path of the parity suite of a Method, an Operation, the loaders or a quantisation of the base."""
    return data_folder("suites") / "parity" / f"{name}.yaml"


def names() -> list[str]:
    """List the names of all parity suites."""
    return sorted(file.stem for file in path_of("any").parent.glob("*.yaml"))


def check_names() -> set[str]:
    """Return the names of the checks of all parity suites. Raises SuiteError if a file is no valid YAML."""
    documents = (yaml_validation.load(path_of(name)).data for name in names())
    return {check for one in documents if isinstance(one, dict) for check in one.get("checks", ())}


def kind_of(name: str) -> TargetKind:
    """Return what the parity suite of this name judges: `method`, `base`, `operation` or `loader`."""
    data = yaml_validation.load(_existing(name)).data
    kinds: tuple[TargetKind, ...] = ("operation", "loader", "base")
    return next((kind for kind in kinds if isinstance(data, dict) and data.get(kind)), "method")


def load_plan(name: str) -> ParitySuite:
    """Read any parity suite by its name. Raises UsageError if there is none, and SuiteError if it has mistakes."""
    match kind_of(name):
        case "operation":
            return load_operation(name)
        case "loader":
            return _load_plain(name, LoaderSuite)
    return load(name)


def in_words(values: Values) -> str:
    """Format the values of a case: `rank=3 alpha=8`."""
    return " ".join(f"{key}={value}" for key, value in values.items())


def load(method: str) -> MethodSuite:
    """Read the parity suite of a Method, or of a quantisation of the base.

    Raises UsageError if there is no such suite. Raises SuiteError, which lists all mistakes, if the suite has any.
    """
    document, plan = yaml_validation.load_model(_existing(method), MethodSuite)
    problems: list[Problem] = []
    if (plan.base or plan.method) != method:
        what = "base" if plan.base else "method"
        problems.append(Problem(document.where(what), f"`{what}` is not {method!r}", "it must be the file's own name"))
    problems += suite_problems.of_checks(document, plan.checks, plan.tolerances)
    problems += suite_problems.of_settings(document, plan.method, plan.configs, plan.settings)
    if problems:
        raise SuiteError(problems)
    return plan


def load_operation(name: str) -> OperationSuite:
    """Read an Operation's parity suite.

    Raises UsageError if there is no such suite. Raises SuiteError, which lists all mistakes, if the suite has any.
    """
    return _load_plain(name, OperationSuite)


def _load_plain(name: str, kind: type[_PlainSuite]) -> _PlainSuite:
    document, plan = yaml_validation.load_model(_existing(name), kind)
    if problems := list(suite_problems.of_checks(document, plan.checks, plan.tolerances)):
        raise SuiteError(problems)
    return plan


def _existing(name: str) -> Path:
    path = path_of(name)
    if not path.is_file():
        raise UsageError(
            f"no parity suite for {name}", where=str(path), hint="write this file: checks, cases and dtypes"
        )
    return path
