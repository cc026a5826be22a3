"""Placement of names next to points so that no two names overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SIZE = 11.5
_LINE = 14.0
_DOT = 7.0


@dataclass(frozen=True)
class Box:
    """A rectangle. y grows downwards."""

    x: float
    y: float
    width: float
    height: float

    def overlaps(self, other: Box) -> bool:
        """Return whether two rectangles share an area. Rectangles that only touch do not overlap."""
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )

    def inside(self, other: Box) -> bool:
        """Return whether this rectangle lies completely in the other."""
        return (
            self.x >= other.x
            and self.y >= other.y
            and self.x + self.width <= other.x + other.width
            and self.y + self.height <= other.y + other.height
        )


def text_width(text: str) -> float:
    """Return the estimated width of a text. The estimate is high, because the font of the reader is unknown."""
    return 0.6 * SIZE * len(text) + 2


def fitted(text: str, width: float) -> str:
    """Return a label that is no wider than `width`. A long label loses its start, since labels differ at their ends."""
    room = int((width - 2) / (0.6 * SIZE))
    return text if len(text) <= room else f"…{text[len(text) - room + 1 :]}"


def place(
    points: Sequence[tuple[float, float]], texts: Sequence[str], bounds: Box, avoid: Sequence[Box] = ()
) -> list[Box | None]:
    """Return one box per text, near the point of the text. The box covers no point and no other text.

    The box is None if there is no room. avoid: boxes that a text covers only if there is no better place, e.g. interval
    bars.
    """
    dots = [Box(x - _DOT, y - _DOT, 2 * _DOT, 2 * _DOT) for x, y in points]
    placed: list[Box | None] = [None] * len(points)
    taken: list[Box] = list(dots)
    # Start on the right, where there is least room.
    for i in sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1])):
        width = text_width(texts[i])
        best: tuple[float, Box] | None = None
        for box, cost in _candidates(points[i], width):
            if not box.inside(bounds) or any(box.overlaps(other) for other in taken):
                continue
            total = cost + 18 * sum(box.overlaps(other) for other in avoid)
            total += 12 * sum(_crosses(points[i], box, other) for other in taken if other is not dots[i])
            # If a name is nearer to another point, it seems to belong to that point.
            own = _distance(points[i], box)
            total += 40 * sum(_distance(other, box) <= own for k, other in enumerate(points) if k != i)
            if best is None or total < best[0]:
                best = (total, box)
        if best:
            placed[i] = best[1]
            taken.append(best[1])
    return placed


def _candidates(point: tuple[float, float], width: float) -> list[tuple[Box, float]]:
    x, y = point
    found = []
    for radius in (_DOT + 3, 22.0, 36.0, 52.0, 70.0, 90.0, 115.0, 140.0):
        for angle in range(0, 360, 20):
            dx, dy = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
            left = x + dx if dx > 1e-6 else x + dx - width
            if angle in (80, 100, 260, 280):
                left = x + dx - width / 2
            # Places to the left and below cost slightly more, so that neighbours with similar room get similar places.
            cost = radius + (3 if dx < 0 else 0) + (1 if dy > 0 else 0)
            found.append((Box(left, y + dy - _LINE / 2, width, _LINE), cost))
    return found


def anchor(point: tuple[float, float], box: Box) -> tuple[float, float]:
    """Return the place on the edge of `box` nearest to `point`. The line from a point to its name ends there."""
    return min(max(point[0], box.x), box.x + box.width), min(max(point[1], box.y), box.y + box.height)


def _distance(point: tuple[float, float], box: Box) -> float:
    return math.dist(point, anchor(point, box))


def _crosses(point: tuple[float, float], box: Box, other: Box) -> bool:
    """Return whether the line from `point` to `box` crosses `other`. Only three points of the line are tested."""
    end = anchor(point, box)
    for share in (0.25, 0.5, 0.75):
        x, y = point[0] + share * (end[0] - point[0]), point[1] + share * (end[1] - point[1])
        if other.x < x < other.x + other.width and other.y < y < other.y + other.height:
            return True
    return False


def spread(wanted: Sequence[float], low: float, high: float, gap: float = _LINE) -> list[float]:
    """Return a height for each name, as near as possible to its wanted height. Heights differ by at least `gap`.

    The order of the heights stays the same. If there is not enough room between `low` and `high`, the largest heights
    exceed `high`.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    heights = [min(max(w, low), high) for w in wanted]
    floor = low
    for i in order:
        heights[i] = max(heights[i], floor)
        floor = heights[i] + gap
    if low + gap * (len(order) - 1) > high:
        return heights
    ceiling = high
    for i in reversed(order):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    return heights
