"""What the terminal says: numbers with their units, the verdict by the interval, data never read as markup."""

import copy
from typing import Any

import pytest
from evaluating import evaluation_json, measurement
from rich.console import Console, RenderableType

from shikomi.evaluate.tables import comparison, evaluation_table, examples, shorten
from shikomi.evaluate.wording import change, duration, interval, number, size, verdict


def shown(renderable: RenderableType, width: int = 120) -> str:
    console = Console(width=width, color_system=None, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_numbers_have_their_units() -> None:
    assert number(0.6404, "share") == "64.0%" and number(23.456, "points") == "23.5"
    assert number(1.2345, "nats") == "1.234" and number(12345.6, "ratio") == "12,346"
    assert number(float("inf"), "ratio") == "not finite"
    assert interval(measurement(0.6, 0.531, 0.665)) == "53.1 to 66.5%"
    assert change(0.39, "share") == "+39.0 points" and change(-0.25, "nats") == "\u22120.250"
    assert [duration(s) for s in (0.42, 12.3, 177, 11_100)] == ["0.4 s", "12 s", "2 min 57 s", "3 h 05 min"]
    assert duration(59.7) == "1 min 00 s" and duration(9.96) == "10 s" and duration(3599.8) == "1 h 00 min"
    assert [size(b) for b in (1.34e9, 52.4e6, 999, 12_000)] == ["1.34 GB", "52.4 MB", "999 bytes", "12 kB"]


def changed(low: float, high: float, higher_is_better: bool = True) -> dict[str, Any]:
    evaluation = copy.deepcopy(evaluation_json())
    gap = evaluation["difference"]["metrics"]["accuracy"]
    gap.update(ci95=[low, high], value=(low + high) / 2, higher_is_better=higher_is_better)
    return evaluation


@pytest.mark.parametrize(
    ("low", "high", "higher_is_better", "outcome"),
    [
        (0.1, 0.2, True, "better"),
        (-0.1, 0.2, True, "unclear"),
        (0.0, 0.2, True, "unclear"),
        (-0.2, -0.1, True, "worse"),
        (-0.2, -0.1, False, "better"),
        (0.1, 0.2, False, "worse"),
    ],
)
def test_the_verdict_goes_by_the_interval(low: float, high: float, higher_is_better: bool, outcome: str) -> None:
    said = verdict(changed(low, high, higher_is_better))
    assert said is not None and said.outcome == outcome
    assert ("More test rows" in said.detail) == (outcome == "unclear")


def test_there_is_no_verdict_without_a_pair() -> None:
    evaluation = evaluation_json()
    evaluation["difference"]["metrics"] = {}
    assert verdict(evaluation) is None and verdict({**evaluation, "difference": None}) is None and verdict({}) is None


def test_the_comparison_is_complete_and_one_system_one_line() -> None:
    text = shown(comparison(evaluation_json()), width=200)
    for expected in ("zero-shot", "few-shot", "trained", "60.0%", "53.1 to 66.5%", "31 s", "+34.5 points", "note: few"):
        assert expected in text, expected
    assert "Training was worth it" in text and "p < 0.0001" in text
    line = next(line for line in text.splitlines() if line.strip().startswith("trained"))
    assert "60.0%" in line and "31 s" in line


def test_a_metric_that_a_system_lacks_is_a_dash() -> None:
    systems = evaluation_json()["baseline"]
    systems["few-shot"]["metrics"] = {"loss": measurement(1.25, 1.2, 1.3, "nats")}
    text = shown(evaluation_table(systems))
    assert "loss" in text and "1.250" in text and "-" in text


def test_examples_are_no_markup_and_leave_out_what_all_share() -> None:
    text = shown(examples(evaluation_json()))
    assert "[bold]x[/bold]" in text and "a<b" in text
    assert "Which section of the archive" not in text
    none = {**evaluation_json(), "examples": [], "examples_base": None, "examples_common": ""}
    assert "trained" in shown(examples(none))


def test_shortened_text_keeps_both_ends() -> None:
    assert shorten("a  b\nc", 10) == "a b c"
    short = shorten("start " + "middle " * 100 + "end", 40)
    assert len(short) <= 40 and short.startswith("start") and short.endswith("end")
