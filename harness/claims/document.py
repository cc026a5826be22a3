"""Write and read the claim ledger as a JSON document. Imports no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.claims.judge import STAND_IN, JudgedClaim
from harness.errors import UsageError
from harness.records.base_model import mistake

SCHEMA = 4
"""Versions before 4 have no verdict `reproduced-mixed`."""
KIND = "claims"


def document(rows: Sequence[JudgedClaim], software: Mapping[str, str]) -> dict[str, Any]:
    """Return the ledger of judged claims as a document for JSON.

    software: library -> version used for the computation.
    """
    claims = [row.model_dump(mode="json") for row in rows]
    return {"schema": SCHEMA, "kind": KIND, "software": dict(software), "claims": claims}


def read(path: Path) -> tuple[list[JudgedClaim], dict[str, str]]:
    """Read a ledger that `--json` wrote. Returns the judged claims and the software versions.

    Raises UsageError if the file is damaged, comes from a newer version, or is not a ledger.
    """
    again = "compute the claims again: `peft-harness claims --json > FILE`"

    def refuse(what: str, hint: str = f"name a file of `peft-harness claims --json`, or {again}") -> UsageError:
        return UsageError(what, where=str(path), hint=hint)

    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise refuse(f"cannot read: {error.strerror}") from error
    except ValueError as error:
        raise refuse(f"is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise refuse("is not a claim ledger")
    schema = data.get("schema")
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        what = f"unsupported schema {schema!r}; this version reads 1 to {SCHEMA}"
        raise refuse(what, "update peft-harness, or " * newer + again)
    if not isinstance(data.get("claims"), list) or not isinstance(data.get("software"), dict):
        raise refuse("lacks `claims` or `software`", again)
    rows: list[JudgedClaim] = []
    wrong: list[str] = []
    for number, one in enumerate(data["claims"], start=1):
        name = one.get("id") if isinstance(one, dict) else None
        try:
            rows.append(_row(one, schema))
        except ValidationError as error:
            wrong.append(f"{f'claim {name}' if isinstance(name, str) else f'claim number {number}'}: {mistake(error)}")
    if wrong:
        more = f"; {len(wrong) - 1} more claims are damaged" if len(wrong) > 1 else ""
        raise refuse(f"{wrong[0]}{more}", f"restore the file, or {again}")
    counts = Counter(row.id for row in rows)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise refuse(f"duplicate claim {twice[0]}", f"remove one of the two, or {again}")
    return rows, dict(data["software"])


def _row(written: Any, schema: int) -> JudgedClaim:
    row = JudgedClaim.model_validate_json(json.dumps(written))
    if schema == 1 and row.why.startswith(STAND_IN):  # schema 1 has the scale in `why` only
        return row.model_copy(update={"scale": row.why.removeprefix(STAND_IN)})
    return row
