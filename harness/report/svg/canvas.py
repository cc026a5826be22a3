"""A drawing as a list of plain dicts, called marks. A template writes each mark as one SVG element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Drawing = dict[str, Any]


class Canvas:
    """The marks of one drawing. Colours are CSS classes, so that one style sheet works for light, dark and print."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.marks: list[dict[str, Any]] = []

    def add(self, tag: str, kind: str, text: str = "", tip: str = "", href: str = "", **attributes: Any) -> None:
        """Add an SVG element `tag` with the CSS class `kind`. tip: its tooltip. href: its link.

        In the names of further attributes, an underscore becomes a hyphen.
        """
        named = {name.replace("_", "-"): _r(value) for name, value in attributes.items()}
        self.marks.append({"tag": tag, "attributes": {**named, "class": kind}, "text": text, "tip": tip, "href": href})

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str, **more: Any) -> None:
        """Draw a straight line from (x1, y1) to (x2, y2)."""
        self.add("line", kind, x1=x1, y1=y1, x2=x2, y2=y2, **more)

    def path(self, points: Sequence[tuple[float, float]], kind: str, shape: str = "", **more: Any) -> None:
        """Draw a line through `points`. shape: SVG path data, relative to the last point, where it is drawn."""
        self.add("path", kind, d="M" + "L".join(f"{_r(x)} {_r(y)}" for x, y in points) + shape, **more)

    def text(self, x: float, y: float, text: str, kind: str, anchor: str = "start", **more: Any) -> None:
        """Write one line of text."""
        self.add("text", kind, text, x=x, y=y, text_anchor=anchor, **more)

    def drawing(self) -> Drawing:
        """Return the drawing for the template."""
        return {"width": self.width, "height": self.height, "marks": self.marks}


def _r(value: Any) -> Any:
    return round(value, 1) if isinstance(value, float) else value
