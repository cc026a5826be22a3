"""The shipped JSON Schemas say what the models say."""

from __future__ import annotations

import json
from typing import Any

from harness.schemas import FOLDER, current


def fields(schema: dict[str, Any]) -> dict[str, tuple[list[str], list[str]]]:
    """Return the fields of every model, and which are needed; the rest of a schema varies with pydantic's release."""
    models = {"": schema} | schema.get("$defs", {})
    return {name: (sorted(m.get("properties", {})), sorted(m.get("required", []))) for name, m in models.items()}


def test_the_shipped_schemas_are_those_of_the_models() -> None:
    for name, text in current().items():
        shipped = json.loads((FOLDER / name).read_text(encoding="utf-8"))
        assert fields(shipped) == fields(json.loads(text)), f"{name} is old: python -m harness.schemas"
