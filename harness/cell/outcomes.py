"""Exceptions that end a Cell with a status, e.g. because a check failed. Such a Cell has not crashed. Imports no torch."""

from __future__ import annotations

from typing import ClassVar

from harness.records.record import Status


class CellOutcomeError(Exception):
    """An error that ends a Cell with a status. Its message is one line."""

    status: ClassVar[Status]
    """The status of the Cell's Record."""


class NonconformingError(CellOutcomeError):
    """A check failed, so the Cell is not measured."""

    status = Status.NONCONFORMING


class Diverged(CellOutcomeError):  # noqa: N818  # Records store this name
    """Training gave a NaN or infinite loss or gradient."""

    status = Status.NONCONFORMING


class Untrained(CellOutcomeError):  # noqa: N818  # Records store this name
    """Training left a trainable tensor at its first value, or gave gradients that are all exactly zero."""

    status = Status.UNTRAINED
