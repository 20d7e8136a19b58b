"""Labels of the pictures: none over another, none over a point, all within the frame; also where points crowd."""

import itertools
import random
import re

import pytest

from shikomi.sweep.pictures import overlap, place_labels, score_svg
from shikomi.sweep.table import count

FRAME = (0.0, 0.0, 700.0, 360.0)


def boxes(points, sizes, bars=()):
    corners = place_labels(points, sizes, FRAME, bars)
    return [(x, y, x + w, y + h) for (x, y), (w, h) in zip(corners, sizes, strict=True)]


@pytest.mark.parametrize("spread", [0, 3, 60])
def test_labels_of_crowded_points_do_not_overlap(spread):
    chance = random.Random(1)
    points = [(350 + chance.uniform(-spread, spread), 180 + chance.uniform(-spread, spread)) for _ in range(16)]
    sizes = [(chance.uniform(30, 130), 14.0) for _ in points]
    bars = [(x - 1, y - 40, x + 1, y + 40) for x, y in points]
    placed = boxes(points, sizes, bars)
    for a, b in itertools.combinations(placed, 2):
        assert not overlap(a, b)
    for box in placed:
        assert 0 <= box[0] and 0 <= box[1] and box[2] <= 700 and box[3] <= 360
        assert not any(overlap(box, (x - 4, y - 4, x + 4, y + 4)) for x, y in points)
        assert not any(overlap(box, bar) for bar in bars)


def test_a_lonely_label_stands_beside_its_point_and_at_the_edge_on_the_inner_side():
    (right,) = boxes([(100.0, 100.0)], [(80.0, 14.0)])
    assert 105 < right[0] < 115 and right[1] < 100 < right[3]
    (left,) = boxes([(690.0, 100.0)], [(80.0, 14.0)])
    assert left[2] < 686 and left[1] < 100 < left[3]


def test_more_labels_than_the_frame_holds_still_do_not_overlap():
    points = [(350.0, 180.0)] * 60
    placed = boxes(points, [(300.0, 20.0)] * 60)
    assert not any(overlap(a, b) for a, b in itertools.combinations(placed, 2))


def results(rows):
    settings = [
        {
            "name": name,
            "trainable_parameters": {"mean": parameters},
            "peak_memory_bytes": {"mean": memory},
            "score": {"mean": score, "ci95": [score - 0.1, score + 0.1], "unit": "share", "higher_is_better": True},
        }
        for name, parameters, memory, score in rows
    ]
    measured = {"value": 0.25, "higher_is_better": True}
    baselines = {"zero-shot": {"metrics": {"accuracy": measured}}}
    return {"metric": "accuracy", "reference": "full", "settings": settings, "baselines": baselines}


ROWS = [("full", 134_515_008, 2.9e9, 0.7), ("lora", 4_884_480, 1.4e9, 0.69), ("prompt", 11_520, 1.3e9, 0.4)]


def test_parameters_stand_on_a_logarithmic_axis():
    text = score_svg(results(ROWS), "trainable_parameters", "a")
    for mark in ("10 k", "100 k", "1 M", "10 M", "100 M", "full", "lora", "prompt", "untouched model, zero-shot"):
        assert f">{mark}<" in text, mark
    memory = score_svg(results(ROWS), "peak_memory_bytes", "b")
    assert ">peak memory, MB<" in memory and re.search(r">1,\d00<", memory)


def test_a_picture_is_a_function_of_its_numbers():
    assert score_svg(results(ROWS), "peak_memory_bytes", "b") == score_svg(results(ROWS), "peak_memory_bytes", "b")


def test_one_cell_and_equal_cells_are_drawn():
    assert ">lora<" in score_svg(results(ROWS[1:2]), "trainable_parameters", "a")
    same = [("a", 5000, 1e9, 0.5), ("b", 5000, 1e9, 0.5)]
    text = score_svg(results(same), "trainable_parameters", "a")
    assert ">a<" in text and ">b<" in text and ">5 k<" in text


def test_without_a_score_there_is_no_picture():
    nothing = results(ROWS)
    for row in nothing["settings"]:
        row["score"] = None
    assert score_svg(nothing, "peak_memory_bytes", "b") == ""


def test_counts_are_short():
    assert [count(n) for n in (7, 11_520, 921_600, 134_515_008, 6.7e9)] == ["7", "11.5 k", "922 k", "135 M", "6.7 G"]
