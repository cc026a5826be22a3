"""Take measures, in a process of its own: `python -m harness.claims.worker LINE ASKED ANSWERS [RUN]...`.

LINE is a descriptor: when its other end closes, this process ends too. Then come two JSON Lines files, and run folders whose
Records come before the published ones.
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
from harness.process.lifeline import die_with_parent

_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, StopIteration,
    TypeError, ValueError, re.error,
)  # fmt: skip
"""What transformers and the references raise for a shape or a config that does not fit; one claim never takes the others."""


_LARGEST = 1e300
"""What a report can still show."""


def find(asked: dict[str, Any]) -> MeasureResult:
    """Take one measure; first those that its arguments ask for."""
    measure = measures()[asked["measure"]]
    arguments = {k: _quantity(v) if k in measure.nested else v for k, v in asked["with"].items()}
    return measure.function(**arguments)


def _quantity(value: Any) -> Any:
    if isinstance(value, list):
        return [_quantity(one) for one in value]
    if not isinstance(value, dict):
        return Fraction(str(value))
    found = find(value)
    if found.most is not None:
        what = f"`{value['measure']}` finds a range, and arithmetic goes on with one number only: {found.how}"
        raise ValueError(what)
    return Fraction(found.value)


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Return what a measure found as JSON can hold it; or what is missing, and whether that is a failure."""
    try:
        found = find(asked)
        numbers = {name: _written(value) for name, value in (("value", found.value), ("most", found.most))}
        within = [_written(end) for end in found.within] if found.within else None
    except NotRunError as error:
        return {"missing": str(error), "failed": False}
    except (*_ERRORS, HarnessError) as error:
        hint = getattr(error, "hint", "") or f"correct its `with`: `peft-harness explain {asked['measure']}`"
        return {"missing": f"could not be computed: {_told(error)}; {hint}", "failed": True}
    return {"how": found.how, **numbers, "within": within}


def _told(error: Exception) -> str:
    """Return an error as part of a sentence. Of what nobody wrote for a reader, such as a KeyError, its kind too."""
    if isinstance(error, HarnessError):
        return f"{error.what} ({error.where})" if error.where else error.what
    return str(error) if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: {error}"


def _written(value: Any) -> bool | str | None:
    """Write a number so that nothing of it is lost. Raises ValueError and OverflowError for NaN and infinities."""
    if isinstance(value, bool | None):
        return value
    if abs(value) > _LARGEST:
        raise OverflowError(f"a number above {_LARGEST:g}")
    return str(Fraction(value))


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    record_sources.look_in(map(Path, sys.argv[4:]))
    with Path(sys.argv[3]).open("w", encoding="utf-8") as answers:
        for line in Path(sys.argv[2]).read_text(encoding="utf-8").splitlines():
            print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
