"""Stops at once where Triton would compile for a GPU in the place of interpreting."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest


def pytest_configure() -> None:
    if find_spec("triton") is None:
        raise pytest.UsageError(
            "tests/interpreted need Triton, which is not installed: pip install triton (Linux only)"
        )
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "tests/interpreted run kernels by Triton's interpreter, which is off: "
            "TRITON_INTERPRET=1 python -m pytest tests/interpreted"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the case that takes a quarter of all the time to the nightly tier."""
    for item in items:
        if "fused_for_any_number_of_tokens::shape=[300, 512] rows=[130]" in item.nodeid:
            item.add_marker(pytest.mark.nightly)
