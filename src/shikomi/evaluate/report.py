"""report.html and loss.svg of a run, from what the run directory already holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from shikomi.evaluate.explanations import of_metric
from shikomi.evaluate.loss_picture import describe, inline_svg, loss_svg
from shikomi.evaluate.page import render_page
from shikomi.evaluate.report_page import CLOSING, PAGE
from shikomi.evaluate.wording import (
    change,
    change_interval,
    duration,
    interval,
    metric_name,
    number,
    size,
    verdict,
)

LONGEST_TEXT = 4000
"""Characters of an example that are shown; a page of novels is no report."""

_COSTS = (
    ("peak_memory_bytes", "Peak memory", size),
    ("peak_device_memory_bytes", "Peak GPU memory", size),
    ("tokens_per_second", "Tokens per second", lambda value: f"{value:,.0f}"),
    ("training_seconds", "Training time", duration),
    ("wall_seconds", "Whole run", duration),
    ("trainable_parameters", "Trained parameters", lambda value: f"{value:,}"),
    ("total_parameters", "All parameters", lambda value: f"{value:,}"),
)


def write_report(
    folder: Path,
    name: str,
    result: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    recipe: str,
) -> Path:
    """Write loss.svg and report.html into a run's folder and return the report's path.

    `result` is result.json, `records` are the lines of metrics.jsonl, `recipe` is the resolved YAML.
    """
    (folder / "loss.svg").write_text(loss_svg(records), encoding="utf-8")
    path = folder / "report.html"
    path.write_text(render_report(name, result, records, recipe), encoding="utf-8")
    return path


def render_report(name: str, result: Mapping[str, Any], records: Sequence[Mapping[str, Any]], recipe: str) -> str:
    """The page as text. Whatever is missing from `result` is left out, a missing comparison is said."""
    evaluation = result.get("evaluation") or {}
    drawn = any("loss" in record or "eval_loss" in record for record in records)
    return render_page(
        f"{name}: training report",
        PAGE,
        kind="Training report",
        heading=name,
        subtitle=_subtitle(result),
        closing=CLOSING,
        chart=Markup(inline_svg(loss_svg(records))) if drawn else None,
        chart_text=describe(records),
        verdict=verdict(evaluation),
        no_verdict="With evaluate and data.test in the recipe, this page says whether training beats a good prompt."
        if not evaluation
        else "No baseline was measured on these rows.",
        facts=_facts(result),
        recipe=recipe.strip(),
        costs=_costs(result),
        planned=bool(result.get("planned")),
        stages=_stages(result),
        versions=sorted((str(k), str(v)) for k, v in (result.get("versions") or {}).items() if v is not None),
        **_comparison(evaluation),
        **_examples(evaluation),
    )


def _subtitle(result: Mapping[str, Any]) -> str:
    parts = []
    if result.get("model"):
        device = f" on {result['device']}" if result.get("device") else ""
        parts.append(f"{result['model']} with {result.get('adapter', 'an adapter')}{device}")
    if result.get("trainable_parameters") and result.get("total_parameters"):
        trained, total = result["trainable_parameters"], result["total_parameters"]
        parts.append(f"{trained:,} trained parameters beside {total:,} of the base model")
    if result.get("trained_tokens"):
        parts.append(f"{result['trained_tokens']:,} trained tokens")
    return "; ".join(parts)


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few numbers at the top."""
    found = []
    if result.get("final_loss") is not None:
        found.append(("Final loss", f"{result['final_loss']:.3f}"))
    shown = {"training_seconds", "tokens_per_second", "peak_memory_bytes"}
    for key, label, write in _COSTS:
        if key in shown and result.get(key) is not None:
            found.append((label, write(result[key])))
    return found


def _stages(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per stage, where a run has several."""
    stages = result.get("stages") or []
    if len(stages) < 2:
        return []
    return [
        {
            "name": str(stage["name"]),
            "steps": _or_dash(stage.get("steps"), lambda value: f"{value:,}"),
            "loss": _or_dash(stage.get("final_loss"), lambda value: f"{value:.3f}"),
            "time": _or_dash(stage.get("training_seconds"), duration),
        }
        for stage in stages
    ]


def _costs(result: Mapping[str, Any]) -> list[dict[str, str]]:
    planned = result.get("planned") or {}
    rows = [
        {"name": label, "planned": _planned(planned.get(key), write), "measured": _or_dash(result.get(key), write)}
        for key, label, write in _COSTS
        if planned.get(key) is not None or result.get(key) is not None
    ]
    known = {key for key, _, _ in _COSTS}
    rows += [
        {"name": key.replace("_", " ").capitalize(), "planned": str(value), "measured": "\u2013"}
        for key, value in planned.items()
        if key not in known and isinstance(value, str | int | float)
    ]
    return rows


def _planned(value: Any, write: Any) -> str:
    """A planned number, which may be a range."""
    if not isinstance(value, dict):
        return _or_dash(value, write)
    return f"{write(value['likely'])} ({write(value['low'])} to {write(value['high'])})"


def _or_dash(value: float | None, write: Any) -> str:
    return "\u2013" if value is None else write(value)


def _comparison(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Rows and columns of the table; bars share one scale per metric."""
    named = dict(evaluation.get("baseline") or {})
    if evaluation.get("trained"):
        named["trained"] = evaluation["trained"]
    metrics = list(dict.fromkeys(name for system in named.values() for name in system["metrics"]))
    tops = {
        name: max(1.0 if m["unit"] == "share" else 100.0 if m["unit"] == "points" else m["ci95"][1] for m in found)
        for name in metrics
        if (found := [s["metrics"][name] for s in named.values() if name in s["metrics"]])
    }
    systems = [
        {
            "name": _system_name(label, system),
            "trained": label == "trained",
            "cells": [_cell(system["metrics"].get(name), tops[name]) for name in metrics],
            "seconds": duration(system["seconds"]),
        }
        for label, system in named.items()
    ]
    gap = evaluation.get("difference") or {"metrics": {}}
    return {
        "systems": systems,
        "columns": [{"name": metric_name(name), "about": _about(name)} for name in metrics],
        "n": f"{evaluation.get('n', 0):,}",
        "notes": evaluation.get("notes") or [],
        "gaps": [
            f"Trained against {gap['against']}, {metric_name(name)}: {change(g['value'], g['unit'])} "
            f"(95% interval {change_interval(g)}, paired on the same rows)."
            for name, g in gap["metrics"].items()
        ],
    }


def _about(metric: str) -> str:
    """What a metric means, shown where the pointer rests on its name; empty for one of the user's own."""
    entry = of_metric(metric)
    return "" if entry is None else f"{entry.title}. {entry.meaning}"


def _system_name(label: str, system: Mapping[str, Any]) -> str:
    if "shots" in system:
        return f"{label} ({system['shots']} examples)"
    return f"{label} ({system['label']})" if "label" in system else label


def _cell(measured: Mapping[str, Any] | None, top: float) -> dict[str, Any] | None:
    if measured is None:
        return None
    low, high = measured["ci95"]
    places = {"at": measured["value"], "low": low, "high": high}
    return {
        "value": number(measured["value"], measured["unit"]),
        "interval": interval(measured),
        **{key: round(100 * min(max(value / top, 0), 1), 2) if top else 0 for key, value in places.items()},
    }


def _examples(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    common = evaluation.get("examples_common") or ""
    rows = []
    for example in evaluation.get("examples") or []:
        sides = [{"name": "Reference", "text": _cut(example["reference"]), "mark": None}]
        for key, label in (("base", "Base"), ("trained", "Trained")):
            same = example[key].strip() == example["reference"].strip()
            sides.append({"name": label, "text": _cut(example[key]) or "(nothing)", "mark": "yes" if same else "no"})
        rows.append({"input": _cut(example["input"].removeprefix(common)), "sides": sides})
    return {
        "examples": rows,
        "examples_common": _cut(common),
        "examples_base": evaluation.get("examples_base"),
    }


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}\u2026"
