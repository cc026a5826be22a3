"""Worker process that computes measures: `python -m harness.claims.worker LINE REQUESTS ANSWERS [RUN]...`.

LINE is the file descriptor of a pipe. The worker dies when the other end of the pipe closes. REQUESTS and ANSWERS are
JSON Lines files. RUN is a run folder, whose Records (results) are preferred to published ones.
"""

from __future__ import annotations

import json
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

from harness.claims import record_sources
from harness.claims.measure import MeasureResult, NotRunError, measures
from harness.errors import HarnessError
from harness.process import short_worker
from harness.process.lifeline import die_with_parent

_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, StopIteration,
    TypeError, ValueError, re.error,
)  # fmt: skip
"""Errors that transformers and the references raise if a model or a config does not fit. Only the claim that caused the
error fails."""


_UNUSED = ("torchao",)
"""Packages that are hidden from transformers, because it would import them if they are installed. Only claims about an
implementation need them."""
_LARGEST = 1e300
"""Largest number that a report can show."""


def find(request: dict[str, Any]) -> MeasureResult:
    """Compute the measure that a request names, and return the result.

    If an argument of the measure is itself a measure, compute the argument first.
    """
    measure = measures()[request["measure"]]
    arguments = {k: _quantity(v) if k in measure.nested else v for k, v in request["with"].items()}
    return measure.function(**arguments)


def _quantity(value: Any) -> Any:
    if isinstance(value, list):
        return [_quantity(one) for one in value]
    if not isinstance(value, dict):
        return Fraction(str(value))
    found = find(value)
    if found.most is not None:
        raise ValueError(f"`{value['measure']}` returns a range, but a single number is needed: {found.how}")
    return Fraction(found.value)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Compute the measure that a request names, and return the answer for JSON.

    If there is no result, `missing` holds the reason, and `failed` says whether an error is the reason.
    """
    try:
        found = find(request)
        numbers = {name: _written(value) for name, value in (("value", found.value), ("most", found.most))}
        within = [_written(end) for end in found.within] if found.within else None
    except NotRunError as error:
        return {"missing": str(error), "failed": False}
    except (*_ERRORS, HarnessError) as error:
        hint = getattr(error, "hint", "") or f"correct its `with`: `peft-harness explain {request['measure']}`"
        return {"missing": f"could not be computed: {_reason(error)}; {hint}", "failed": True}
    return {"how": found.how, **numbers, "within": within}


def _reason(error: Exception) -> str:
    """Return an error's message as part of a sentence.

    If the message is not written for users, e.g. of a KeyError, the name of the error's type comes first.
    """
    if isinstance(error, HarnessError):
        return f"{error.what} ({error.where})" if error.where else error.what
    return str(error) if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: {error}"


def _written(value: Any) -> bool | str | None:
    """Return a number as exact text. Return a bool or None unchanged.

    Raises ValueError or OverflowError for NaN, infinity and numbers above `_LARGEST`.
    """
    if isinstance(value, bool | None):
        return value
    if abs(value) > _LARGEST:
        raise OverflowError(f"a number above {_LARGEST:g}")
    return str(Fraction(value))


def main(argv: list[str]) -> None:
    """Write the answer to each request of the file REQUESTS to the file ANSWERS. argv: the command line."""
    die_with_parent(int(argv[1]))
    record_sources.look_in(map(Path, argv[4:]))
    requests = [json.loads(line) for line in Path(argv[2]).read_text(encoding="utf-8").splitlines()]
    if not any(map(_names_implementation, requests)):
        short_worker.hide(_UNUSED)
    with Path(argv[3]).open("w", encoding="utf-8") as answers:
        for request in requests:
            print(json.dumps(answer(request)), file=answers, flush=True)


def _names_implementation(request: Any) -> bool:
    """Return whether a request, or a request among its arguments, names an implementation."""
    if isinstance(request, dict):
        return "implementation" in request or any(map(_names_implementation, request.values()))
    return isinstance(request, list) and any(map(_names_implementation, request))


if __name__ == "__main__":
    main(sys.argv)
    short_worker.end()
