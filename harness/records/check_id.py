"""Identifiers of checks, `target/check/dtype/state`. Only this module splits and joins them."""

from __future__ import annotations

from typing import NamedTuple

_SEPARATOR = "/"


class CheckId(NamedTuple):
    """Identifier of a check. Each part may also be a pattern, e.g. `lora/merge/*/*`."""

    target: str
    """The Method or Operation."""
    check: str = ""
    """The check's name, e.g. `gradient`."""
    dtype: str = ""
    state: str = ""
    """`init`, `warm`, `trained` or `call`; `-` for a check without a state."""

    def __str__(self) -> str:
        return _SEPARATOR.join(self)

    @property
    def is_complete(self) -> bool:
        """True if all four parts are present and none contains a separator."""
        return all(self) and _SEPARATOR not in self.state

    @classmethod
    def parse(cls, text: str) -> CheckId:
        """Split an identifier. Missing parts are empty, so an incomplete identifier from an old file is no error."""
        return cls(*text.split(_SEPARATOR, 3))
