"""Before the first cell: model and data of every setting, and that what the sweep's folder holds is of this sweep."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shikomi.checkpoint.diff import differences
from shikomi.checkpoint.rundir import MARKER, RunDir
from shikomi.data.sources import fingerprint
from shikomi.errors import BadInput, Problem
from shikomi.model.load import count_parameters
from shikomi.progress import Progress, Silent
from shikomi.recipe import Recipe, dump_recipe
from shikomi.steps.prepare import prepare
from shikomi.sweep.cells import Cell, Sweep

RECORD = "sweep.json"
OURS = ("sweep.csv", "table.md", "sweep.html")


@dataclass(frozen=True)
class Planned:
    """What a setting will train, known before it does."""

    trainable_parameters: int
    total_parameters: int
    steps: int
    tokens: int  # of one pass over the training rows of all stages
    memory_bound_bytes: int


@dataclass(frozen=True)
class Checked:
    """Every setting by its name, and the SHA-256 of everything that is read."""

    planned: dict[str, Planned]
    data: dict[str, str]


def check_sweep(sweep: Sweep, progress: Progress) -> Checked:
    """Reads the data and the model's files as each setting would. Raises BadInput with the problems of all cells."""
    planned: dict[str, Planned] = {}
    data: dict[str, str] = {}
    found: dict[Problem, list[str]] = {}
    settings = sweep.settings
    for number, setting in enumerate(settings):
        progress.tick(number, len(settings), "checking the cells")
        recipe = sweep.of(setting.name)[0].recipe
        try:
            planned[setting.name], prints = _prepared(recipe)
            data.update(prints)
        except BadInput as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(setting.name)
    progress.tick(len(settings), len(settings), "checking the cells")
    problems = [_named(problem, names, len(settings)) for problem, names in found.items()]
    problems += check_folder(sweep, data)
    if problems:
        raise BadInput(problems)
    return Checked(planned, data)


def _prepared(recipe: Recipe) -> tuple[Planned, dict[str, str]]:
    prepared = prepare(recipe, Silent())
    trained, total = count_parameters(str(prepared.files.folder), prepared.adapter, prepared.task)
    prints = {f"{recipe.model if key == 'model' else key}": value for key, value in prepared.fingerprints.items()}
    prints |= {f"test.{source.path}": fingerprint(source, "test") for source in recipe.data.test or ()}
    steps = sum(stage.total_steps for stage in prepared.stages)
    tokens = sum(stage.store.report.tokens for stage in prepared.stages)
    return Planned(trained, total, steps, tokens, prepared.planned.memory_bound), prints


def _named(problem: Problem, names: Sequence[str], settings: int) -> Problem:
    what = problem.what if len(names) == settings > 1 else f"cell {', '.join(names)}: {problem.what}"
    return Problem(what, problem.file, problem.line, problem.found, problem.allowed, problem.fix)


def check_folder(sweep: Sweep, data: dict[str, str]) -> list[Problem]:
    """What in the sweep's folder is of another sweep: files, data that changed, cells of another recipe."""
    folder = sweep.folder
    if (folder / MARKER).is_file():
        return [Problem("is the folder of a run", str(folder), fix="choose another --output-dir")]
    record = read_record(folder)
    there = [name for name in OURS if (folder / name).exists()]
    if there and not record:
        fix = "choose another --output-dir, or move these away"
        return [
            Problem("is no sweep, and has files a sweep would overwrite", str(folder), found=", ".join(there), fix=fix)
        ]
    before = record.get("data", {})
    known = {key: value for key, value in data.items() if key in before}
    changed = differences({key: before[key] for key in known}, known)
    problems = []
    if changed:
        fix = "put the old files back, or choose another --output-dir"
        what = "the data is not what this sweep was started with"
        problems.append(Problem(what, str(folder), found="; ".join(changed), fix=fix))
    for cell in sweep.cells:
        found = _other_recipe(cell)
        if found:
            fix = "choose another --output-dir, or put the recipe back"
            what = f"cell {cell.name} was run with another recipe"
            problems.append(Problem(what, str(cell.folder), found="; ".join(found), fix=fix))
    return problems


def _other_recipe(cell: Cell) -> list[str]:
    """How the recipe of the run in a cell's folder differs; nothing where training can go on, or is done."""
    run = RunDir(cell.folder)
    finished = run.is_finished()
    if not run.exists() or not (finished or run.has_checkpoint()):
        return []
    if not finished and run.about()["digest"] == cell.recipe.digest():
        return []
    before = yaml.safe_load(run.recipe_path.read_text(encoding="utf-8"))
    now = yaml.safe_load(dump_recipe(cell.recipe))
    return differences(_compared(before), _compared(now))


def _compared(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what does not change a result; baselines are measured by one cell for all."""
    kept = {key: value for key, value in recipe.items() if key not in ("output_dir", "report_to", "model_token_env")}
    if kept.get("evaluate"):
        kept["evaluate"] = {k: v for k, v in kept["evaluate"].items() if k not in ("baselines", "shots")}
    return kept


def read_record(folder: Path) -> dict[str, Any]:
    """sweep.json, or an empty dict. Raises BadInput where it is not JSON."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise BadInput([Problem("is not JSON", str(path), found=str(error), fix="delete it")]) from error
