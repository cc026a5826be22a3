"""The claim ledger as a JSON document, written and read again. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.claims.judging import STAND_IN, Judged
from harness.errors import UsageError

SCHEMA = 3
KIND = "claims"


def document(rows: Sequence[Judged], software: Mapping[str, str]) -> dict[str, Any]:
    """Return the ledger as JSON can hold it. software: library -> version, with which it was computed."""
    claims = [row.model_dump(mode="json") for row in rows]
    return {"schema": SCHEMA, "kind": KIND, "software": dict(software), "claims": claims}


def read(path: Path) -> tuple[list[Judged], dict[str, str]]:
    """Read what `--json` printed. Raises UsageError for another file, a torn one, or one of another schema than 1 to 3."""
    mend = "name a file that `peft-harness claims --json > FILE` wrote"
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read: {error.strerror}", where=str(path), mend=mend) from error
    except ValueError as error:
        raise UsageError(f"no JSON: {error}", where=str(path), mend=mend) from error
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise UsageError("no ledger of claims", where=str(path), mend=mend)
    schema = data.get("schema")
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        what = f"has schema {schema!r}, and this version reads 1 to {SCHEMA}"
        newer = isinstance(schema, int) and schema > SCHEMA
        raise UsageError(what, where=str(path), mend="update peft-harness, or " * newer + "compute the claims again")
    if not isinstance(data.get("claims"), list) or not isinstance(data.get("software"), dict):
        raise UsageError("lacks `claims` or `software`", where=str(path), mend="compute the claims again")
    try:
        rows, software = [_row(one, schema) for one in data["claims"]], dict(data["software"])
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"not as it was written: {str(error).splitlines()[0]}", where=str(path), mend="compute the claims again"
        ) from error
    if len({row.id for row in rows}) < len(rows):
        raise UsageError("a claim stands in it twice", where=str(path), mend="compute the claims again")
    return rows, software


def _row(written: Any, schema: int) -> Judged:
    row = Judged.model_validate_json(json.dumps(written))
    if schema == 1 and row.why.startswith(STAND_IN):  # which said it in words alone
        return row.model_copy(update={"scale": row.why.removeprefix(STAND_IN)})
    return row
