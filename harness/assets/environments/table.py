"""Declarations of environments: rows of `suites/environments.yaml` or of a user's file, and requirements of `--with`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from pydantic import Field, field_validator

from harness import yaml_validation
from harness.errors import Problem, SuiteError, UsageError, did_you_mean
from harness.records.base_model import FrozenModel
from harness.resources import data_folder

_NAME = r"[a-z0-9][a-z0-9._-]{0,59}"
_HASH = re.compile(r"\s--hash=sha256:[0-9a-f]{64}")


class EnvironmentSpec(FrozenModel):
    """One environment, as a file or an option declares it."""

    name: str = Field(pattern=f"^{_NAME}$")
    requirements: list[str] = Field(min_length=1)
    """Requirements as pip reads them, e.g. `peft==0.19.1`. A requirement may end in `--hash=sha256:...`."""
    isolated: bool = False
    """False: the environment sees all packages of the Python that runs the harness, except those that it replaces. True:
    it holds everything itself, even torch."""
    without: list[str] = Field(default=[])
    """Packages that are not installed although pip would install them, e.g. because their build breaks an import."""
    dependencies: bool = True
    """False if pip installs the requirements alone, without their own requirements. This is useful for a library that
    pins other versions of its requirements, but works with the installed versions."""
    implementations: list[str] = Field(default=[])
    """Names of implementations and of training loops. If their libraries are not installed, `check` and `bench` run
    them in this environment."""
    about: str = ""
    """Purpose of the environment, in a sentence."""

    @field_validator("requirements")
    @classmethod
    def _are_requirements(cls, value: list[str]) -> list[str]:
        for one in value:
            try:
                _parse(one)
            except InvalidRequirement as error:
                what = " ".join(str(error).split())
                raise ValueError(f"{one!r} is no requirement: {what}; write e.g. peft==0.19.1") from error
        return value

    @property
    def projects(self) -> list[str]:
        """Names of the required projects, normalised, e.g. `galore-torch`."""
        return [canonicalize_name(_parse(one).name) for one in self.requirements]


def _parse(text: str) -> Requirement:
    return Requirement(_HASH.sub("", f" {text}").strip())


class _Table(FrozenModel):
    """Top level of environments.yaml."""

    environments: list[EnvironmentSpec]


def path() -> Path:
    """Return the path of the harness's own table of environments."""
    return data_folder("suites") / "environments.yaml"


def load(file: Path | None = None) -> dict[str, EnvironmentSpec]:
    """Read a table, by default the harness's own. Return the environments by name.

    Raises one SuiteError that lists all mistakes.
    """
    try:
        document, table = yaml_validation.load_model(
            file or path(), _Table, start="`environments:`, or see the manual of `check`"
        )
    except SuiteError as error:
        raise SuiteError(error.problems, "table of environments") from error
    found: dict[str, EnvironmentSpec] = {}
    problems = []
    for index, spec in enumerate(table.environments):
        if spec.name in found:
            where = document.where("environments", index, "name")
            problems.append(Problem(where, f"a second environment named `{spec.name}`", "rename one of the two"))
        found[spec.name] = spec
    if problems:
        raise SuiteError(problems, "table of environments")
    return found


def home_of(implementation: str) -> str:
    """Return the name of the environment that the harness's own table declares for an implementation or a loop.

    If it declares none, return an empty string.
    """
    return next((spec.name for spec in load().values() if implementation in spec.implementations), "")


def of_requirement(text: str) -> EnvironmentSpec:
    """Return the environment in which only the requirement `text` differs from the Python that runs the harness.

    text: a requirement with a version, e.g. `peft==0.19.1`. Raises UsageError for any other text.
    """
    hint = "write a library and a version, e.g. peft==0.19.1"
    try:
        requirement = _parse(text)
    except InvalidRequirement as error:
        raise UsageError(f"{text!r} is no requirement", hint=hint) from error
    if not requirement.specifier and not requirement.url:
        raise UsageError(f"{text!r} names no version", hint=hint)
    version = requirement.url.rpartition("/")[2] if requirement.url else str(requirement.specifier)
    slug = re.sub(r"[^a-z0-9._]+", "-", f"{canonicalize_name(requirement.name)}-{version}".lower()).strip("-")
    return EnvironmentSpec(name=slug[:60].rstrip("-"), requirements=[text.strip()])


def resolve(text: str, known: Mapping[str, EnvironmentSpec]) -> EnvironmentSpec:
    """Return the environment for a name in a table, or for a requirement such as `peft==0.19.1`.

    Raises UsageError with the closest known name if the text is neither.
    """
    if text in known:
        return known[text]
    if re.fullmatch(_NAME, text, re.IGNORECASE):
        hint = did_you_mean(text, known, "there are", "write a requirement with a version, e.g. peft==0.19.1")
        raise UsageError(f"unknown environment {text!r}", hint=hint)
    return of_requirement(text)
