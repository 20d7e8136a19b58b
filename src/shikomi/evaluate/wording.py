"""Numbers and the verdict as a reader sees them, on the terminal and in the report alike."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

METRIC_NAMES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "exact_match": "exact match",
    "rouge": "ROUGE-L",
    "chrf": "chrF",
    "bleu": "BLEU",
    "loss": "loss",
    "perplexity": "perplexity",
}


def metric_name(name: str) -> str:
    """What the field calls a metric: macro_f1 -> macro-F1."""
    return METRIC_NAMES.get(name, name.replace("_", " "))


def number(value: float, unit: str) -> str:
    """A value of a metric: 64.0%, 23.4, 1.234."""
    if not math.isfinite(value):
        return "not finite"
    if unit == "share":
        return f"{100 * value:.1f}%"
    return f"{value:.1f}" if unit == "points" else f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def interval(measured: Mapping[str, Any]) -> str:
    """The 95% interval of a metric: 56.0 to 71.2%."""
    low, high = (number(bound, measured["unit"]) for bound in measured["ci95"])
    return f"{low.removesuffix('%')} to {high}"


def change(value: float, unit: str) -> str:
    """A difference with its sign: +39.0 points for shares (percentage points) and scores of 100."""
    scaled = 100 * value if unit == "share" else value
    digits = 1 if unit in ("share", "points") else 3
    text = f"{scaled:+.{digits}f}".replace("-", "\u2212")
    return f"{text} points" if unit in ("share", "points") else text


def change_interval(difference: Mapping[str, Any]) -> str:
    """The 95% interval of a difference: +31.0 to +47.0 points."""
    low, high = (change(bound, difference["unit"]) for bound in difference["ci95"])
    return f"{low.removesuffix(' points')} to {high}"


def duration(seconds: float) -> str:
    """Seconds as 0.4 s, 12 s, 2 min 57 s, 3 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(n_bytes: float) -> str:
    """Bytes in powers of 1000: 1.42 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.3g} {unit}"
    return f"{n_bytes:.0f} bytes"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Verdict:
    """Whether training was worth it, from the interval of the difference on the main metric."""

    outcome: Literal["better", "worse", "unclear"]
    headline: str
    detail: str


def verdict(evaluation: Mapping[str, Any]) -> Verdict | None:
    """The verdict on an `evaluation` of result.json; None where it holds no comparison with a baseline."""
    difference = evaluation.get("difference")
    if not difference or evaluation["main_metric"] not in difference["metrics"]:
        return None
    name, against = evaluation["main_metric"], difference["against"]
    gap = difference["metrics"][name]
    before = evaluation["baseline"][against]["metrics"][name]
    after = evaluation["trained"]["metrics"][name]
    low, high = gap["ci95"] if gap["higher_is_better"] else [-bound for bound in reversed(gap["ci95"])]
    outcome: Literal["better", "worse", "unclear"]
    outcome = "better" if low > 0 else "worse" if high < 0 else "unclear"
    headline = {
        "better": f"Training was worth it: better than the best baseline ({against}).",
        "worse": f"Training made it worse than the best baseline ({against}).",
        "unclear": f"No measurable difference from the best baseline ({against}).",
    }[outcome]
    detail = (
        f"{_capital(metric_name(name))} {number(before['value'], before['unit'])} \u2192 "
        f"{number(after['value'], after['unit'])} on the same {gap['n']:,} rows: "
        f"{change(gap['value'], gap['unit'])} (95% interval {change_interval(gap)}"
    )
    p = gap["p_value"]
    detail += ")." if p is None else f"; McNemar's exact p {'< 0.0001' if p < 1e-4 else f'= {p:.2g}'})."
    if outcome == "unclear":
        detail += " More test rows would narrow the interval."
    return Verdict(outcome, headline, detail)
