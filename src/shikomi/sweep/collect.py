"""What came of the cells: one row per cell from its result.json, one per setting over its seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from shikomi import registry
from shikomi.checkpoint.rundir import RunDir
from shikomi.evaluate.outcomes import read_outcomes
from shikomi.metrics import Metric
from shikomi.metrics.loss import Loss
from shikomi.recipe import Recipe
from shikomi.sweep.cells import Cell, Setting, Sweep
from shikomi.sweep.paired import Answers, mean_interval, paired
from shikomi.sweep.runner import adapter_bytes

MEASURED = (
    *("trainable_parameters", "total_parameters", "adapter_bytes", "peak_memory_bytes", "peak_device_memory_bytes"),
    *("tokens_per_second", "training_seconds", "wall_seconds", "total_tokens", "final_loss", "validation_best"),
)
"""Numbers of a cell, named as in result.json; adapter_bytes is read from `final/`, validation_best from its stage."""


def cell_row(cell: Cell, failures: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """A cell's numbers, {name, setting, seed, folder, status, error, ...}; None for what it has not."""
    run = RunDir(cell.folder)
    result = run.result() if run.is_finished() else {}
    failure = failures.get(cell.name)
    status = "finished" if result else "failed" if failure else "stopped" if run.exists() else "waiting"
    row: dict[str, Any] = {
        "name": cell.name,
        "setting": cell.setting.name,
        "seed": cell.seed,
        "folder": str(cell.folder),
        "status": status,
        "error": dict(failure) if failure and not result else None,
        "learning_rate": cell.recipe.stages[-1].learning_rate,
    }
    row |= {key: result.get(key) for key in MEASURED}
    row["adapter_bytes"] = adapter_bytes(cell.folder) if result else None
    stages = result.get("stages") or [{}]
    row["validation_best"] = stages[-1].get("best")
    evaluation = result.get("evaluation") or {}
    measured = (evaluation.get("trained") or {}).get("metrics", {}).get(evaluation.get("main_metric"))
    row["metric"] = evaluation.get("main_metric")
    row["score"] = measured and {key: measured[key] for key in ("value", "ci95", "n", "unit", "higher_is_better")}
    row["label_nll"] = _label_nll(cell.folder) if result else None
    return row


def _label_nll(folder: Path) -> float | None:
    known = [value for value in (read_outcomes(folder) or {}).get("label_nll", []) if value is not None]
    return mean(known) if known else None


def collect(sweep: Sweep, failures: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """{cells, settings, baselines, metric, reference, notes}: what every output of a sweep shows."""
    cells = [cell_row(cell, failures) for cell in sweep.cells]
    by_setting = {s.name: [row for row in cells if row["setting"] == s.name] for s in sweep.settings}
    settings = [setting_row(setting, by_setting[setting.name]) for setting in sweep.settings]
    metric = next((row["metric"] for row in cells if row["metric"]), None)
    notes = list(sweep.notes)
    full = full_score(sweep, settings)
    for row in settings:
        row["percent_of_full"] = None
        if full and row["score"] and row["score"]["higher_is_better"]:
            row["percent_of_full"] = 100 * row["score"]["mean"] / full
        row["difference"], row["label_nll_difference"] = None, None
        if row["name"] != sweep.reference:
            pairs, why = _pairs(by_setting[sweep.reference], by_setting[row["name"]])
            if why:
                notes.append(f"{row['name']} is not compared with {sweep.reference}: {why}")
            if pairs and metric:
                row["difference"] = _difference(_metric(metric), metric, pairs)
            if pairs and all(_nll_answers(o) for pair in pairs for o in pair):
                row["label_nll_difference"] = _difference(Loss(), "label_nll", pairs)
    return {
        "metric": metric,
        "reference": sweep.reference,
        "settings": settings,
        "cells": cells,
        "baselines": _baselines(sweep.cells),
        "test_rows": next((row["score"]["n"] for row in cells if row["score"]), None),
        "notes": notes,
    }


def setting_row(setting: Setting, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A setting's numbers over its finished seeds: {mean, spread, n}, spread the standard deviation of two and more."""
    done = [row for row in cells if row["status"] == "finished"]
    row: dict[str, Any] = {
        "name": setting.name,
        "overrides": setting.overrides,
        "learning_rate": cells[0]["learning_rate"],
        "seeds": [cell["seed"] for cell in done],
        "failed": [cell["name"] for cell in cells if cell["status"] == "failed"],
    }
    for key in (*MEASURED, "label_nll"):
        row[key] = spread([cell[key] for cell in done])
    trained, total = row["trainable_parameters"], row["total_parameters"]
    row["trained_percent"] = 100 * trained["mean"] / total["mean"] if trained and total else None
    scored = [cell for cell in done if cell["score"]]
    row["score"] = spread([cell["score"]["value"] for cell in scored])
    if row["score"]:
        first = scored[0]["score"]
        row["score"] |= {"unit": first["unit"], "higher_is_better": first["higher_is_better"]}
        row["score"]["ci95"] = first["ci95"] if len(scored) == 1 else _interval(scored)
    return row


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean and sample standard deviation (None for one value) of the values that there are; None for none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": mean(known), "spread": stdev(known) if len(known) > 1 else None, "n": len(known)}


def _interval(cells: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """The interval of the mean over seeds, where the rows' outcomes are stored."""
    stored = [read_outcomes(Path(cell["folder"])) for cell in cells]
    found = [_answers(outcome, cells[0]["metric"]) for outcome in stored if outcome]
    answers = [a for a in found if a is not None]
    return mean_interval(_metric(cells[0]["metric"]), answers) if len(answers) == len(cells) else None


def full_score(sweep: Sweep, settings: Sequence[Mapping[str, Any]]) -> float | None:
    """The best mean score among the settings that are plain full fine-tuning; None where none is finished."""
    plain = {s.name for s in sweep.settings if is_full(sweep.of(s.name)[0].recipe)}
    found = [row["score"]["mean"] for row in settings if row["name"] in plain and row["score"]]
    return max(found, default=None) or None


def is_full(recipe: Recipe) -> bool:
    """All weights, by an optimizer that keeps whole moments: what the other methods are to come near to."""
    return recipe.adapter.name == "full" and all(stage.optim.name == "adamw" for stage in recipe.stages)


def _baselines(cells: Sequence[Cell]) -> dict[str, Any]:
    """The untouched model's scores from the first cell that measured them: {name: {n, seconds, metrics}}."""
    for cell in cells:
        run = RunDir(cell.folder)
        found = (run.result().get("evaluation") or {}).get("baseline") if run.is_finished() else None
        if found:
            return found
    return {}


def _metric(name: str) -> Metric:
    return registry.find("metrics", name)()


def _pairs(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> tuple[list[tuple[dict[str, Any], dict[str, Any]]], str | None]:
    """Outcomes of both settings for each seed that both have finished, or why there are none."""
    ours = {row["seed"]: row for row in before if row["status"] == "finished" and row["score"]}
    pairs = []
    for row in after:
        if row["status"] != "finished" or row["seed"] not in ours or not row["score"]:
            continue
        one, other = (read_outcomes(Path(r["folder"])) for r in (ours[row["seed"]], row))
        if one is None or other is None:
            return [], "the outcomes of its test rows were not stored"
        if one["ids"] != other["ids"]:
            return [], "its test rows are others"
        pairs.append((one, other))
    return pairs, None


def _answers(outcome: Mapping[str, Any], name: str) -> Answers | None:
    """What a metric compares in a run's outcomes; None where it was not asked for."""
    if name == "label_nll":
        return _nll_answers(outcome)
    logp = _metric(name).needs == "logp"
    predictions, references = (
        (outcome["logp"], outcome["tokens"]) if logp else (outcome["predictions"], outcome["references"])
    )
    return Answers(outcome["ids"], predictions, references) if predictions else None


def _nll_answers(outcome: Mapping[str, Any]) -> Answers | None:
    """Label log-likelihoods as the loss of answers of one token: their mean is the label NLL."""
    known = [(i, nll) for i, nll in zip(outcome["ids"], outcome["label_nll"], strict=False) if nll is not None]
    return Answers([i for i, _ in known], [-nll for _, nll in known], [1] * len(known)) if known else None


def _difference(
    metric: Metric, name: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> dict[str, Any] | None:
    before, after = [], []
    for one, other in pairs:
        b, a = _answers(one, name), _answers(other, name)
        if b is None or a is None or list(b.references) != list(a.references):
            return None
        before.append(b)
        after.append(a)
    return paired(metric, before, after)
