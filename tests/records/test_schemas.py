"""The shipped JSON Schemas say what the models say, and what runs leave is what they describe."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from harness.records import store
from harness.records.schemas import FOLDER, current
from support.repository import PUBLISHED
from support.sandbox import Finished

RUNS = sorted(p.parent for p in PUBLISHED.glob("*/run.json"))


def fields(schema: dict[str, Any]) -> dict[str, tuple[list[str], list[str]]]:
    """Return the fields of every model, and which are needed; the rest of a schema varies with pydantic's release."""
    models = {"": schema} | schema.get("$defs", {})
    return {name: (sorted(m.get("properties", {})), sorted(m.get("required", []))) for name, m in models.items()}


def test_the_shipped_schemas_are_those_of_the_models() -> None:
    for name, text in current().items():
        shipped = json.loads((FOLDER / name).read_text(encoding="utf-8"))
        assert fields(shipped) == fields(json.loads(text)), f"{name} is old: python -m harness.records.schemas"


@cache
def validator(kind: str) -> Draft202012Validator:
    schema = json.loads((FOLDER / f"{kind}.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    return Draft202012Validator(schema)


def valid(run: Path, every: int = 1) -> int:
    """Validate the files of a run, of its Records each `every`th, as somebody without our models would.

    Return how many Records were validated.
    """
    for name in ("run", "footer"):
        validator(name).validate(json.loads((run / f"{name}.json").read_text(encoding="utf-8")))
    records = sorted((run / "cells").glob("*.json"))[::every]
    for path in records:
        validator("record").validate(json.loads(path.read_text(encoding="utf-8")))
    return len(records)


def test_what_a_run_of_today_leaves_is_valid(smoke: tuple[Finished, store.Run]) -> None:
    assert valid(smoke[1].path) == len(smoke[1].records) > 0


@pytest.mark.parametrize(
    "every", [pytest.param(1, marks=pytest.mark.nightly), pytest.param(10, marks=pytest.mark.slow)]
)
def test_what_published_runs_left_is_valid_still(every: int) -> None:
    """The promise of the README: fields are only added, so that older Records stay valid."""
    assert sum(valid(run, every) for run in RUNS) >= 10


def unknown_field(record: dict[str, Any]) -> None:
    record["measurements"]["speed"] = 1.0


def negative_bytes(record: dict[str, Any]) -> None:
    record["measurements"]["memory"]["weights_B"] = -1


def no_cell(record: dict[str, Any]) -> None:
    del record["cell"]


def unknown_status(record: dict[str, Any]) -> None:
    record["status"] = "fine"


def text_for_a_number(record: dict[str, Any]) -> None:
    record["duration_s"] = "12"


@pytest.mark.parametrize("spoil", [unknown_field, negative_bytes, no_cell, unknown_status, text_for_a_number])
def test_what_is_no_record_is_refused(spoil: Callable[[dict[str, Any]], None]) -> None:
    good = json.loads(next((RUNS[0] / "cells").glob("*.json")).read_text(encoding="utf-8"))
    bad = copy.deepcopy(good)
    spoil(bad)
    validator("record").validate(good)
    with pytest.raises(ValidationError):
        validator("record").validate(bad)
