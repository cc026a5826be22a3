"""JSON Schemas of a run's files. `python -m harness.records.schemas` regenerates the schema files in this folder."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel

from harness.records.manifest import Footer, Manifest
from harness.records.record import Record

FOLDER = Path(__file__).resolve().parent

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
"""The JSON Schema dialect of the files. Without this entry, a validator would apply its newest dialect."""


def current() -> dict[str, str]:
    """Map the file name of each schema to its content according to the current models."""
    kinds: dict[str, type[BaseModel]] = {
        "run.schema.json": Manifest,
        "record.schema.json": Record,
        "footer.schema.json": Footer,
    }
    return {
        name: json.dumps({"$schema": _DIALECT, **kind.model_json_schema()}, indent=1) + "\n"
        for name, kind in kinds.items()
    }
