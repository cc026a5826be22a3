"""Write and read the claim ledger as a JSON document. No torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.claims.judge import STAND_IN, JudgedClaim
from harness.claims.printed_number import shortly
from harness.errors import UsageError

SCHEMA = 3
KIND = "claims"


def document(rows: Sequence[JudgedClaim], software: Mapping[str, str]) -> dict[str, Any]:
    """Return the ledger for JSON. software: library -> version used for the computation."""
    claims = [row.model_dump(mode="json") for row in rows]
    return {"schema": SCHEMA, "kind": KIND, "software": dict(software), "claims": claims}


def read(path: Path) -> tuple[list[JudgedClaim], dict[str, str]]:
    """Read a ledger written by `--json`. Raises UsageError for any other, damaged or newer file."""
    hint = "name a file that `peft-harness claims --json > FILE` wrote"
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read: {error.strerror}", where=str(path), hint=hint) from error
    except ValueError as error:
        raise UsageError(f"is not JSON: {error}", where=str(path), hint=hint) from error
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise UsageError("is not a claim ledger", where=str(path), hint=hint)
    schema = data.get("schema")
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        what = f"unsupported schema {schema!r}; this version reads 1 to {SCHEMA}"
        newer = isinstance(schema, int) and schema > SCHEMA
        raise UsageError(what, where=str(path), hint="update peft-harness, or " * newer + "compute the claims again")
    if not isinstance(data.get("claims"), list) or not isinstance(data.get("software"), dict):
        raise UsageError("lacks `claims` or `software`", where=str(path), hint="compute the claims again")
    rows: list[JudgedClaim] = []
    wrong: list[str] = []
    for number, one in enumerate(data["claims"], start=1):
        try:
            rows.append(_row(one, schema))
        except ValidationError as error:
            wrong.append(_mistake(one, number, error))
    if wrong:
        more = f"; {len(wrong) - 1} more claims are damaged" if len(wrong) > 1 else ""
        hint = "restore the file, or compute the claims again: `peft-harness claims --json > FILE`"
        raise UsageError(f"{wrong[0]}{more}", where=str(path), hint=hint)
    counts = Counter(row.id for row in rows)
    if twice := [name for name, count in counts.items() if count > 1]:
        hint = "remove one of the two, or compute the claims again"
        raise UsageError(f"duplicate claim {twice[0]}", where=str(path), hint=hint)
    return rows, dict(data["software"])


def _mistake(written: Any, number: int, error: ValidationError) -> str:
    """Describe the first error of a damaged claim."""
    name = written.get("id") if isinstance(written, dict) else None
    which = f"the claim {name}" if isinstance(name, str) else f"claim number {number}"
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{which} lacks `{key}`"
    if first["type"] == "extra_forbidden":
        return f"{which} has an unknown key `{key}`"
    what = f"`{key}` of {which} is {shortly(first['input'])}" if key else f"{which} is {shortly(first['input'])}"
    return f"{what}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _row(written: Any, schema: int) -> JudgedClaim:
    row = JudgedClaim.model_validate_json(json.dumps(written))
    if schema == 1 and row.why.startswith(STAND_IN):  # schema 1 has the scale in `why` only
        return row.model_copy(update={"scale": row.why.removeprefix(STAND_IN)})
    return row
