"""A report as its readers see it: the page as a browser parses it, and the rows of its tables by column names."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from harness.records.record import Record


class Page(HTMLParser):
    """Parsed page: elements with their attributes, the text, and the raw scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.words: list[str] = []
        self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        self._inside = tag if tag in self.raw else ""
        if self._inside:
            self.raw[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw[self._inside][-1] += data
        else:
            self.words.append(data)

    def attributes(self, name: str) -> list[str]:
        return [a[name] for _, a in self.tags if name in a]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def row(table: dict[str, Any], record: Record) -> dict[str, dict[str, Any]]:
    found = next(r for g in table["groups"] for r in g["rows"] if r["record"] == record.id)
    return {c["label"]: f for c, f in zip(table["columns"], found["fields"], strict=True)}
