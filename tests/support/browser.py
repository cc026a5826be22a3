"""A page in headless Chromium, with what a test reads from it."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest


def chromium() -> str:
    """Return the path of a browser. Without one, skip the test."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("there is no chromium, chromium-browser or google-chrome")


class Shown:
    """A page that a browser shows. `messages` has its console messages, errors and dialogs; `requests` its requests."""

    def __init__(self, page: Any, file: Path, hash_: str) -> None:
        self.page, self.url = page, file.as_uri()
        self.messages: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("dialog", lambda dialog: (self.messages.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(self.url + hash_)

    def follow(self, hash_: str) -> None:
        """Change the hash in the same tab, as a user who pastes a link."""
        self.page.evaluate(
            "hash => new Promise(done => { addEventListener('hashchange', done); location.hash = hash; })", hash_
        )

    def rows(self, table: str) -> list[str]:
        """Return the names of the rows that a table shows."""
        names = f"#{table} tr:not(.group) th[scope=row]"
        return [name.inner_text() for name in self.page.locator(names).all() if name.is_visible()]

    def count(self, table: str) -> str:
        """Return the text beside the filter of a table."""
        return str(self.page.locator(f".tools:has([data-filter={table}]) output").inner_text())

    def sort(self, table: str, column: str) -> list[str]:
        """Click the head of a column. Return the texts of the column, from the first to the last row."""
        self.page.locator(f"#{table} thead").get_by_role("button", name=column, exact=True).click()
        heads = self.page.locator(f"#{table} thead th").all_inner_texts()
        fields = f"#{table} tbody tr:not(.group) > :nth-child({heads.index(column) + 1})"
        return [str(text) for text in self.page.locator(fields).all_inner_texts()]

    def csv(self, table: str) -> tuple[str, list[dict[str, str]]]:
        """Return the name and the rows of the CSV file of a table."""
        with self.page.expect_download() as found:
            self.page.locator(f"[data-csv={table}]").click()
        with Path(found.value.path()).open(encoding="utf-8", newline="") as file:
            return found.value.suggested_filename, list(csv.DictReader(file))

    def in_view(self, selector: str) -> bool:
        """Return whether the top of an element is inside the window."""
        top = self.page.locator(selector).evaluate("element => element.getBoundingClientRect().top")
        return bool(0 <= top < self.page.viewport_size["height"])


Open = Callable[..., AbstractContextManager[Shown]]
"""`opened` without its first parameter."""


@contextmanager
def opened(
    browser: Any, file: Path, width: int = 1280, hash_: str = "", *, scheme: str = "light", script: bool = True
) -> Iterator[Shown]:
    """Open a file in a window of its own. scheme: light or dark. A window of 390 pixels has a touch screen."""
    context = browser.new_context(
        viewport={"width": width, "height": 800},
        color_scheme=scheme,
        java_script_enabled=script,
        has_touch=width == 390,
    )
    context.set_default_timeout(10_000)
    try:
        yield Shown(context.new_page(), file, hash_)
    finally:
        context.close()
