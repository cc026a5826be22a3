from __future__ import annotations

import itertools
import random

import pytest

from harness.report.svg import charts, labels, scales
from harness.report.svg.labels import Box


@pytest.mark.parametrize("seed", range(8))
def test_labels_overlap_neither_each_other_nor_a_point(seed: int) -> None:
    rng = random.Random(seed)
    points = [(300 + rng.gauss(0, 40), 150 + rng.gauss(0, 15)) for _ in range(9)] + [(300.0, 150.0)] * 3
    texts = ["lora r=8 [reference]"[: rng.randint(6, 20)] for _ in points]
    bounds = Box(50, 10, 540, 330)
    boxes = [b for b in labels.place(points, texts, bounds) if b]
    assert len(boxes) == len(points)
    assert all(b.inside(bounds) for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(b.overlaps(Box(x - 5, y - 5, 10, 10)) for b in boxes for x, y in points)


def test_a_label_without_room_is_listed() -> None:
    placed = labels.place([(10.0, 10.0)] * 2, ["a name", "a name"], Box(0, 0, 60, 20))
    assert sum(box is not None for box in placed) < 2
    point = charts.Point("a name of great length" * 4, 1.0, 0.5, 0.4, 0.6, True, "tip", "#x")
    assert charts.cost("t", "x", [point, point], log=True)["unnamed"]


def test_line_ends_are_spread_in_order() -> None:
    heights = labels.spread([100.0, 100.0, 100.0, 20.0, 299.0], 0, 300, gap=14)
    ordered = sorted(heights)
    assert all(b - a >= 14 for a, b in itertools.pairwise(ordered))
    assert 0 <= ordered[0] <= ordered[-1] <= 300
    assert heights[3] < heights[0] < heights[4]


def test_pareto_keeps_what_nothing_beats() -> None:
    assert charts.pareto([(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9)]) == [1, 3, 0]


@pytest.mark.parametrize(("low", "high"), [(0.62, 0.85), (712.0, 1085.0), (0.0, 1e-6)])
def test_linear_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = scales.Scale(low, high, 0, 100).ticks()
    assert 2 <= len(ticks) <= 8
    assert all(low <= t <= high for t in ticks)


def test_logarithmic_scale_is_even_in_decades() -> None:
    scale = scales.Scale(1, 1000, 0, 300, log=True)
    assert [scale.at(v) for v in (1, 10, 100, 1000)] == [0, 100, 200, 300]
    assert scale.at(0) == 0


def test_phases_put_start_up_before_zero() -> None:
    drawing = charts.phases("t", [charts.PhaseBars("a", 2.0, [("load", 1.0), ("train", 3.0)])])
    bars = [m["attributes"] for m in drawing["marks"] if m["tag"] == "rect" and m["tip"]]
    start, load, train = bars
    assert start["class"] == "startup"
    assert round(start["x"] + start["width"], 2) == load["x"]
    assert round(load["x"] + load["width"], 2) == train["x"]
    assert start["width"] > load["width"]
    assert train["width"] > start["width"]


@pytest.mark.parametrize("length", [10, 60, 200])
def test_no_name_leaves_its_drawing(length: int) -> None:
    names = [f"{'lora r=8 [reference] ' * 20}"[:length] + f" seed={seed}" for seed in (0, 1)]
    cells = [charts.PhaseBars(name, 2.0, [("train", 3.0)]) for name in names]
    series = [charts.ChartSeries(name, [3.0, 2.0, 1.0]) for name in names]
    for drawing in (charts.phases("t", cells), charts.learning("t", series), charts.errors("t", series, series[0])):
        shown = [m for m in drawing["marks"] if m["tag"] == "text" and "seed=" in m["text"]]
        assert {m["text"][-7:] for m in shown} == {" seed=0", " seed=1"}
        for mark in shown:
            x, wide = mark["attributes"]["x"], labels.text_width(mark["text"])
            left = x - wide if mark["attributes"]["text-anchor"] == "end" else x
            assert left >= 0
            assert left + wide <= drawing["width"] + 1
