"""Fixture that opens pages in headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from support import browser
from support.browser import Open


@pytest.fixture(scope="module")
def show() -> Iterator[Open]:
    """Return a function that opens a file in a window of its own. Without playwright or a browser, skip the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = browser.chromium()
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=path)
        yield partial(browser.opened, running)
        running.close()
