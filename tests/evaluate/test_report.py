"""The report: complete, escaped, without a network, the same bytes twice, and right where parts are missing."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from evaluating import evaluation_json, measurement

from shikomi.evaluate.loss_picture import POINTS, curves, describe, inline_svg, loss_svg, smoothed, thinned
from shikomi.evaluate.report import render_report, write_report

VOID = {"meta", "br", "line", "path", "use"}
RECORDS: list[dict[str, Any]] = [
    *({"step": s, "loss": 3.0 / s, "learning_rate": 1e-4 / s, "stage": "sft"} for s in range(1, 41)),
    {"step": 40, "eval_loss": 0.5, "stage": "sft"},
]
RESULT: dict[str, Any] = {
    "model": "smollm2",
    "adapter": "lora",
    "device": "cpu",
    "wall_seconds": 301.2,
    "training_seconds": 177.4,
    "trained_tokens": 4321,
    "total_tokens": 160_000,
    "tokens_per_second": 902.1,
    "peak_memory_bytes": 1.34e9,
    "peak_device_memory_bytes": None,
    "trainable_parameters": 2_442_240,
    "total_parameters": 134_515_008,
    "final_loss": 0.912,
    "planned": {"peak_memory_bytes": 1.5e9, "layers_recomputed": 10},
    "stages": [{"name": "sft", "steps": 40, "final_loss": 0.912, "training_seconds": 177.4}],
    "evaluation": evaluation_json(),
    "versions": {"torch": "2.13.0", "absent": None},
}


class Page(HTMLParser):
    """Text of a page, its attributes, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def page(**changes: Any) -> Page:
    return Page(render_report("sections", {**RESULT, **changes}, RECORDS, "model: smollm2\nlr: <1>\n"))


def test_the_page_says_what_the_run_was() -> None:
    text = page().text
    for expected in [
        "Training was worth it: better than the best baseline (few-shot).",
        "Accuracy 25.5% \u2192 60.0% on the same 200 rows: +34.5 points",
        "few-shot (5 examples)",
        "53.1 to 66.5%",
        "902",
        "1.34 GB",
        "1.5 GB",
        "2 min 57 s",
        "5 min 01 s",
        "Layers recomputed",
        "smollm2 with lora on cpu",
        "2,442,240 trained parameters",
        "model: smollm2\nlr: <1>",
        "2.13.0",
        "Training loss from 3.000 at step 1",
        "3 of 200 rows had room",
    ]:
        assert expected in text, expected
    assert "absent" not in text


def test_everything_from_data_is_escaped() -> None:
    html = render_report("<i>name</i>", RESULT, RECORDS, "</pre><script>")
    parsed = Page(html)
    assert "<script>alert(1)</script> & [bold]x[/bold]" in parsed.text and "<i>name</i>" in parsed.text
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "i", "b") and tag != "b"]
    # the beginning that all inputs share stands there once, not before every input
    assert parsed.text.count("Which section of the archive") == 1


def test_the_page_loads_nothing() -> None:
    html = render_report("x", RESULT, RECORDS, "")
    parsed = Page(html)
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "img", "iframe", "object", "embed"}
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert (value or "").startswith("#"), (tag, name, value)
    assert not re.search(r"url\((?!#)", html) and "@import" not in html
    assert "default-src 'none'" in html and "prefers-color-scheme: dark" in html


def test_headings_and_tables_are_marked_up_for_readers_of_all_kinds() -> None:
    tags = page().tags
    headings = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(headings, headings[1:], strict=False))
    assert ("html", {"lang": "en"}) in tags
    assert all("scope" in attributes for tag, attributes in tags if tag == "th")
    assert [a["aria-label"] for _, a in tags if a.get("role") == "img"] == [describe(RECORDS)]


@pytest.mark.parametrize("missing", sorted(RESULT))
def test_any_part_may_be_missing(missing: str) -> None:
    without = {key: value for key, value in RESULT.items() if key != missing}
    for result in (without, {**RESULT, missing: None}):
        assert "model: x" in Page(render_report("x", result, [], "model: x")).text


def test_a_run_without_comparison_says_how_to_get_one() -> None:
    text = Page(render_report("x", {}, [], "")).text
    assert "Not compared with the untouched model" in text and "data.test" in text
    assert "No loss was recorded" in text and "Comparison" not in text and "Examples" not in text


def test_several_stages_are_listed() -> None:
    stages = [{"name": name, "steps": 1200, "final_loss": 0.5, "training_seconds": 9.0} for name in ("a", "b")]
    assert "1,200" in page(stages=stages).text and "Stages" not in page().text


def test_bars_share_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = evaluation_json()
    for system, loss in ((evaluation["baseline"]["zero-shot"], 4.0), (evaluation["trained"], 1.0)):
        system["metrics"] = {"loss": measurement(loss, loss - 0.5, loss + 1, "nats", higher_is_better=False)}
    evaluation["baseline"].pop("few-shot")
    evaluation["difference"] = None
    lines = [a for tag, a in page(evaluation=evaluation).tags if tag == "line" and a["y1"] == "3"]
    assert [float(a["x1"] or 0) for a in lines] == [80, 20]  # of 5, the highest upper bound


def test_write_report_writes_both_files(tmp_path: Path) -> None:
    path = write_report(tmp_path, "sections", RESULT, RECORDS, "model: smollm2")
    first = path.read_bytes(), (tmp_path / "loss.svg").read_bytes()
    write_report(tmp_path, "sections", RESULT, RECORDS, "model: smollm2")
    assert first == (path.read_bytes(), (tmp_path / "loss.svg").read_bytes())
    root = ElementTree.fromstring(first[1])
    assert root.tag.endswith("svg") and "evaluation loss" in first[1].decode()


def test_pictures_of_unusual_runs() -> None:
    for records in (
        [],
        [{"step": 1, "loss": 2.0}],
        [{"step": s, "loss": None, "eval_loss": 1.0} for s in (1, 2)],
        [{"step": s, "loss": 2.0} for s in range(1, 9)],
    ):
        ElementTree.fromstring(loss_svg(records))
    assert describe([{"step": 1, "loss": 2.0}]) == "Training loss 2.000 at step 1."
    assert "NaN" not in loss_svg([{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}])


def test_long_runs_keep_a_small_picture_and_the_mean() -> None:
    records = [{"step": s, "loss": 1.0 + s % 2} for s in range(20_000)]
    (curve,) = curves(records, "loss")
    assert len(thinned(curve).steps) == POINTS and thinned(curve).values.mean() == pytest.approx(1.5)
    assert len(loss_svg(records)) < 150_000


def test_stages_are_separate_curves() -> None:
    records = [{"step": s, "loss": 1.0, "stage": "a" if s < 5 else "b"} for s in range(10)]
    assert [list(curve.steps) for curve in curves(records, "loss")] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_smoothing_starts_at_the_first_value_and_keeps_constants() -> None:
    (curve,) = curves([{"step": s, "loss": 2.0} for s in range(100)], "loss")
    assert smoothed(curve.values) == pytest.approx(curve.values)
    (noisy,) = curves([{"step": s, "loss": 2.0 + (-1) ** s} for s in range(400)], "loss")
    assert smoothed(noisy.values)[0] == 3.0 and abs(smoothed(noisy.values)[-1] - 2) < 0.1


def test_the_inline_picture_follows_the_theme() -> None:
    svg = inline_svg(loss_svg(RECORDS))
    assert svg.startswith("<svg") and "#ffffff" not in svg and "var(--accent)" in svg
    assert not set(re.findall(r"#[0-9a-f]{6}", svg)) - {"#000000"}
