"""A drawing as a list of plain dicts. The template of the report writes each mark as one SVG element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Drawing = dict[str, Any]


class Canvas:
    """The marks of one drawing. Colours are class names, so that one style sheet works for light, dark and print."""

    def __init__(self, title: str, description: str, width: int, height: int) -> None:
        self.title, self.description, self.width, self.height = title, description, width, height
        self.marks: list[dict[str, Any]] = []

    def _add(self, tag: str, attributes: dict[str, Any], text: str = "", tip: str = "", href: str = "") -> None:
        self.marks.append({"tag": tag, "attributes": attributes, "text": text, "tip": tip, "href": href})

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """Draw a straight line."""
        self._add("line", {"x1": _r(x1), "y1": _r(y1), "x2": _r(x2), "y2": _r(y2), "class": kind})

    def path(self, points: Sequence[tuple[float, float]], kind: str, tip: str = "") -> None:
        """Draw a line through `points`."""
        if points:
            self._add("path", {"d": "M" + "L".join(f"{_r(x)} {_r(y)}" for x, y in points), "class": kind}, tip=tip)

    def rectangle(self, x: float, y: float, width: float, height: float, kind: str, tip: str = "") -> None:
        """Draw a filled rectangle."""
        box = {"x": _r(x), "y": _r(y), "width": _r(max(width, 0)), "height": _r(height), "class": kind}
        self._add("rect", box, tip=tip)

    def dot(self, x: float, y: float, kind: str, tip: str, href: str) -> None:
        """Draw a point that links to a row of a table."""
        self._add("circle", {"cx": _r(x), "cy": _r(y), "r": 5, "class": kind}, tip=tip, href=href)

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start", tip: str = "") -> None:
        """Write one line of text."""
        attributes = {"x": _r(x), "y": _r(y), "class": kind, "text-anchor": anchor}
        self._add("text", attributes, text, tip)

    def drawing(self, **extra: Any) -> Drawing:
        """Return the drawing as a dict for the template. The entries of `extra` are added to the dict."""
        return {
            "title": self.title,
            "description": self.description,
            "width": self.width,
            "height": self.height,
            "marks": self.marks,
            **extra,
        }


def _r(value: float) -> float:
    return round(value, 2)
