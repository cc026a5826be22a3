"""Drawings: scales, lines, fronts, bars and names."""

from __future__ import annotations

import itertools
import random
import re
from types import SimpleNamespace
from typing import Any

import pytest

from harness.records.record import Cell, Evaluation, Training
from harness.report import chart_sets, html
from harness.report.svg import charts
from harness.report.svg.charts import Point, Series
from harness.report.svg.scales import Axis

WRITE = "{:g}".format
Marks = list[dict[str, Any]]


def marks(drawing: dict[str, Any], kind: str) -> Marks:
    """Return the marks of a drawing that have a class."""
    return [m for m in drawing["marks"] if kind in m["attributes"]["class"].split()]


def points(path: dict[str, Any]) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path["attributes"]["d"])]


def drawn(*series: Series, front: bool = False) -> dict[str, Any]:
    return charts.xy(Axis("x", WRITE), Axis("y", WRITE), series, front=front)


def test_a_line_joins_points_in_their_order_and_under_their_symbols() -> None:
    zigzag = [Point(x, y, tip=f"{x}") for x, y in ((5, 1), (2, 3), (9, 2))]
    drawing = drawn(Series("a", 0, zigzag))
    (line,), dots = marks(drawing, "line"), marks(drawing, "dot")
    assert [x for x, _ in points(line)] == [points(dot)[0][0] for dot in dots]
    assert [dot["tip"] for dot in dots] == ["5", "2", "9"]
    assert drawing["marks"].index(line) < drawing["marks"].index(dots[0])


def test_a_band_goes_through_the_intervals_of_a_line_in_place_of_bars() -> None:
    ranks = [Point(x, y, (y - 1, y + 1), tip=f"{x}") for x, y in ((2, 3), (5, 6), (9, 5))]
    both = Series("a", 0, ranks), Series("b", 1, [Point(4, 4, (3, 5), tip="alone")])
    drawing = charts.xy(Axis("x", WRITE), Axis("y", WRITE), both, bands=True)
    (band,), (bar,), dots = marks(drawing, "ribbon"), marks(drawing, "bar"), marks(drawing, "dot")
    (low, high), places = (points(band)[:3], points(band)[:2:-1]), [points(dot)[0] for dot in dots[:3]]
    assert all(a[0] == b[0] == c[0] and a[1] > b[1] > c[1] for a, b, c in zip(low, places, high, strict=True))
    assert bar["attributes"]["data-series"] == 1
    assert drawing["marks"].index(band) < drawing["marks"].index(marks(drawing, "line")[0])
    assert marks(drawn(*both), "ribbon") == []


@pytest.mark.parametrize(
    ("steps", "ticks"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (5, [0, 1, 2, 3, 4]), (72, [0, 20, 40, 60])]
)
def test_an_axis_of_counts_has_whole_ticks_inside_its_values(steps: int, ticks: list[int]) -> None:
    values = [float(step) for step in range(steps)]
    assert Axis("step", WRITE, log=False, whole=True).over(values, 0, 500).ticks() == ticks


def test_pareto_keeps_what_nothing_beats() -> None:
    assert charts.pareto([(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9)]) == [1, 3, 0]


def test_the_front_rises_in_steps_through_the_points_on_it() -> None:
    places = [(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9)]
    drawing = drawn(*(Series(str(k), k, [Point(x, y, tip="t")]) for k, (x, y) in enumerate(places)), front=True)
    (front,), dots = marks(drawing, "front"), marks(drawing, "dot")
    way = points(front)
    assert {points(dots[k])[0] for k in (0, 1, 3)} <= set(way)
    assert points(dots[2])[0] not in way
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in itertools.pairwise(way))


def test_a_busy_point_has_a_ring_and_a_hidden_series_is_not_shown() -> None:
    drawing = drawn(
        Series("a", 0, [Point(1, 1, tip="t", busy=True), Point(2, 1, tip="t")]),
        Series("b", 1, [Point(3, 2, tip="t")], shown=False),
    )
    (ring,) = marks(drawing, "ring")
    assert points(ring) == points(marks(drawing, "dot")[0])
    assert {m["attributes"]["data-series"] for m in marks(drawing, "off")} == {1}
    assert [m["text"] for m in marks(drawing, "own")] == ["a"]


def test_the_points_of_a_curve_have_texts_and_no_symbols() -> None:
    drawing = drawn(Series("a", 0, [Point(0, 1), Point(1, 2)], kind="curve", texts=["0: 1", "1: 2"]))
    (curve,) = marks(drawing, "curve")
    assert (curve["attributes"]["data-at"], curve["tip"]) == ("0: 1|1: 2", "a")
    assert marks(drawing, "dot") == []


@pytest.mark.parametrize("seed", range(6))
def test_names_cover_neither_each_other_nor_a_point(seed: int) -> None:
    rng = random.Random(seed)
    series = [
        Series("lora r=8 [reference]"[: rng.randint(4, 20)], k, [Point(rng.random(), rng.random(), tip="t")])
        for k in range(12)
    ]
    drawing = drawn(*series)
    share = {"start": 0, "middle": 0.5, "end": 1}
    boxes = []
    for m in marks(drawing, "own"):
        at, wide = m["attributes"], 6 * len(m["text"])
        left = at["x"] - share[at["text-anchor"]] * wide
        boxes.append((left, at["y"] - 9, left + wide, at["y"] + 2))
    spots = [points(dot)[0] for dot in marks(drawing, "dot")]
    assert len(boxes) > 4
    for (left, top, right, bottom), others in ((box, [o for o in boxes if o != box]) for box in boxes):
        assert not any(left < o[2] and o[0] < right and top < o[3] and o[1] < bottom for o in others)
        assert not any(left < x < right and top < y < bottom for x, y in spots)
        assert left >= charts.LEFT
        assert right <= charts.RIGHT


@pytest.mark.parametrize(("low", "high"), [(0.62, 0.85), (712.0, 1085.0), (0.0, 1e-6)])
def test_linear_ticks_are_few_and_inside(low: float, high: float) -> None:
    axis = Axis("x", WRITE, log=False).over([low, high], 0, 100, 0.0)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 9
    assert all(0 <= axis.at(t) <= 100 for t in ticks)


def test_an_axis_is_logarithmic_if_its_values_range_wide_and_says_so() -> None:
    wide = Axis("x", WRITE).over([1, 1000], 0, 300, 0.0)
    assert [round(wide.at(v)) for v in (1, 10, 100, 1000)] == [0, 100, 200, 300]
    assert wide.at(0) == 0
    assert wide.name == "x (logarithmic)"
    assert Axis("x", WRITE).over([1, 9], 0, 300).name == "x"
    assert Axis("x", WRITE).over([0, 1000], 0, 300).name == "x"


def test_an_axis_names_each_value_that_has_room() -> None:
    assert Axis("rank", WRITE, log=True, each=True).over([32, 8, 2, 2.2, 8], 0, 300).ticks() == [2, 8, 32]


@pytest.mark.parametrize("length", [10, 200])
def test_the_parts_of_a_bar_abut_and_no_name_leaves_the_drawing(length: int) -> None:
    series = [Series("start-up", charts.OUTLINED, kind="fill"), Series("train", 0, kind="fill")]
    names = [f"{'lora r=8 [reference] ' * 20}"[:length] + f" seed={seed}" for seed in (0, 1)]
    drawing = charts.bars(Axis("seconds", WRITE), {name: [2.0, 3.0] for name in names}, series, WRITE)
    start, train, *_ = (m["attributes"] for m in marks(drawing, "fill"))
    assert round(start["x"] + start["width"]) == round(train["x"])
    assert round(train["width"] / start["width"], 1) == 1.5
    shown = [m for m in marks(drawing, "tick") if "seed=" in m["text"]]
    assert {m["text"][-7:] for m in shown} == {" seed=0", " seed=1"}
    assert all(len(m["text"]) * charts._LETTER < m["attributes"]["x"] for m in shown)


def test_colours_differ_from_each_other_and_from_the_page_in_light_and_dark() -> None:
    style = html.template_text("report.css", "charts.css")
    dark = re.compile(r"@media \(prefers-color-scheme: dark\) \{\n(.*?)\n\}", re.DOTALL)
    for text in (dark.sub("", style), "".join(dark.findall(style))):
        named = dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)[;\s]", text))
        hues = [named[f"c{k}"] for k in range(charts.HUES)]
        assert len(set(hues)) == charts.HUES
        # WCAG asks for 3:1 between a graphic and what it stands on.
        assert all(_contrast(hue, named["page"]) >= 3 for hue in hues)


def _contrast(one: str, other: str) -> float:
    """Return the contrast of WCAG 2 between two colours like #fff or #0757b5."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        shares = [int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_series_of_equal_colours_have_other_symbols() -> None:
    looks = {(Series("s", k).look, Series("s", k).shape) for k in range(4 * charts.HUES)}
    assert len(looks) == 4 * charts.HUES
    assert len({Series("s", 3, variant=k).shape for k in range(4)}) == 4


def test_one_comparison_over_two_models_has_a_line_and_a_limit_for_each() -> None:
    lora: dict[str, Any] = {"task": "t", "method": "lora", "implementation": "reference"}
    lora |= {"training": Training(steps=2), "evaluation": Evaluation(items=1)}
    both = [Cell(model=model, **lora) for model in ("small", "large")]
    ids = [cell.cell_id for cell in both]
    facts: Any = SimpleNamespace(
        run=SimpleNamespace(manifest=SimpleNamespace(cells=both)),
        names=dict.fromkeys(ids, "lora"),
        titles=dict(zip(ids, ("small lora", "large lora"), strict=True)),
    )
    compared = [
        SimpleNamespace(cell_id=one, errors=[1e-6, 2e-6], by="noise", limited_by=one, allowed=[limit] * 2)
        for one, limit in zip(ids, (1e-5, 4e-5), strict=True)
    ]
    judgement: Any = SimpleNamespace(trajectories=compared, comparison=SimpleNamespace(says="the same run"))
    found = chart_sets.errors(facts, judgement)
    assert found is not None
    assert [entry["name"] for entry in found["legend"]] == [
        "small lora", "large lora", "allowed by small lora", "allowed by large lora",
    ]  # fmt: skip
    heights = [points(mark)[0][1] for mark in marks(found["figures"][0], "bound")]
    assert len(heights) == len(set(heights)) == 2
