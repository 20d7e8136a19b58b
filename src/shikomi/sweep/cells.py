"""The cells of a grid: one resolved recipe for every combination, checked all together."""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shikomi.errors import BadInput, Problem, nearest
from shikomi.recipe import Recipe, load_recipe
from shikomi.recipe.load import COMMAND_LINE
from shikomi.recipe.tree import NOWHERE, Where
from shikomi.recipe.yaml12 import read_value
from shikomi.sweep.grid import Axis, Grid, Method, as_text, spelled_out

_SAFE = re.compile(r"[A-Za-z0-9-][A-Za-z0-9._-]*")
_LONGEST = 40
"""Characters of a value that are part of a folder's name; a longer one is cut, and told apart by a digest."""

BUDGET = ("data", "max_length", "batch_size", "num_train_epochs", "max_steps", "shuffle")
"""Keys that decide which rows are trained, how often and in which order; the comparison is of equal budgets."""


@dataclass(frozen=True)
class Setting:
    """A combination without its seed: `name` is unique in the sweep; `overrides` are {dotted key: value}."""

    name: str
    overrides: dict[str, Any]
    where: Where = NOWHERE

    def as_overrides(self) -> list[str]:
        """The overrides as `shikomi train` takes them."""
        return [f"{key}={as_text(value)}" for key, value in self.overrides.items()]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: a setting with a seed, as a resolved recipe whose output_dir is the cell's folder."""

    name: str
    setting: Setting
    recipe: Recipe

    @property
    def seed(self) -> int:
        return self.recipe.seed

    @property
    def folder(self) -> Path:
        return self.recipe.output_dir


@dataclass(frozen=True)
class Sweep:
    """The cells in the order in which they run, and the setting that the others are compared with."""

    folder: Path
    cells: tuple[Cell, ...]
    reference: str
    notes: tuple[str, ...] = ()

    @property
    def settings(self) -> list[Setting]:
        return list({cell.setting.name: cell.setting for cell in self.cells}.values())

    def of(self, setting: str) -> list[Cell]:
        """The cells of a setting, one for each seed."""
        return [cell for cell in self.cells if cell.setting.name == setting]


def make_sweep(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str], grid: Grid, folder: Path) -> Sweep:
    """The cells of a grid over a recipe; seeds change last, so that a first table has all methods.

    Raises BadInput with the problems of all cells; one that all cells share is said once, any other names its cells.
    """
    base = load_recipe(recipe, overrides)  # what is wrong without a grid is said alone
    settings = list(_settings(grid))
    seeds = grid.seeds or (base.seed,)
    cells: list[Cell] = []
    found = _Problems(len(settings))
    for setting in settings:
        try:
            # The seed is no part of what can be wrong, so the first stands for all.
            for seed in seeds:
                name = setting.name if len(seeds) == 1 and not grid.seeds else f"{setting.name}_seed-{seed}"
                own = [*setting.as_overrides(), f"seed={seed}", f"output_dir={as_text(str(folder / name))}"]
                cells.append(Cell(name, setting, load_recipe(recipe, [*overrides, *own])))
        except BadInput as error:
            found.add(setting, error)
    problems = [*found.all(), *_same(cells, seeds[0])]
    names = [setting.name for setting in settings]
    reference = grid.reference if grid.reference is not None else names[0]
    if reference not in names:
        close = nearest(reference, names)
        fix = f"did you mean `{close}`?" if close else None
        problems.append(Problem(f"--reference {reference} is no cell of this sweep", allowed=", ".join(names), fix=fix))
    if problems:
        raise BadInput(problems)
    by_seed = sorted(cells, key=lambda cell: seeds.index(cell.seed))
    return Sweep(folder, tuple(by_seed), reference, tuple(_notes(cells)))


def _settings(grid: Grid) -> list[Setting]:
    methods: Sequence[Method | None] = grid.methods or (None,)
    shorts = Counter(axis.key.rpartition(".")[2] for axis in grid.axes)
    settings = []
    for method in methods:
        for values in itertools.product(*(axis.values for axis in grid.axes)):
            overrides: dict[str, Any] = dict(method.overrides) if method else {}
            parts = [method.name] if method else []
            for axis, value in zip(grid.axes, values, strict=True):
                overrides.update(spelled_out(axis.key, value))
                parts.append(_part(axis, value, shorts))
            # `adapter` before `adapter.r`: a block that is set later would wipe out what was set in it.
            overrides = dict(sorted(overrides.items(), key=lambda item: item[0].count(".")))
            place = method.where if method else grid.axes[0].where if grid.axes else NOWHERE
            settings.append(Setting("_".join(parts) or "recipe", overrides, place))
    return settings


def _part(axis: Axis, value: Any, shorts: Counter[str]) -> str:
    """`lora` for adapter=lora; `learning_rate-0.0001` for other keys, with the whole key where its end is shared."""
    short = axis.key.rpartition(".")[2]
    if axis.key == "adapter":
        return slug(value)
    return f"{short if shorts[short] == 1 else axis.key}-{slug(value)}"


def slug(value: Any) -> str:
    """A value as a part of a folder's name; what cannot stand there as it is gets a digest of the value."""
    if isinstance(value, list):
        parts = [slug(item) for item in value]
        if parts and all(isinstance(v, str) and s == v for v, s in zip(value, parts, strict=True)):
            text = "+".join(parts)
            if len(text) <= _LONGEST:
                return text
    text = value if isinstance(value, str) else as_text(value)
    plain = _SAFE.fullmatch(text) is not None and len(text) <= _LONGEST
    if plain and not isinstance(value, list | dict) and read_value(text, COMMAND_LINE) == value:
        return text
    digest = hashlib.sha256(as_text(value).encode()).hexdigest()[:6]
    kept = re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:_LONGEST].strip("-.")
    return f"{kept}-{digest}" if kept else digest


@dataclass
class _Problems:
    """Problems with the settings that have them."""

    settings: int
    found: dict[Problem, list[str]] = field(default_factory=dict)

    def add(self, setting: Setting, error: BadInput) -> None:
        for problem in error.problems:
            file, line = problem.file, problem.line
            if file == COMMAND_LINE and setting.where.file not in (None, COMMAND_LINE):
                file, line = setting.where.file, None
            placed = Problem(problem.what, file, line, problem.found, problem.allowed, problem.fix)
            self.found.setdefault(placed, []).append(setting.name)

    def all(self) -> list[Problem]:
        problems = []
        for problem, names in self.found.items():
            what = problem.what if len(names) == self.settings > 1 else f"cell {', '.join(names)}: {problem.what}"
            problems.append(Problem(what, problem.file, problem.line, problem.found, problem.allowed, problem.fix))
        return problems


def _same(cells: Sequence[Cell], seed: int) -> list[Problem]:
    """Settings whose recipes are the same: an override without an effect would cost a run and look like a result."""
    by_content: dict[str, list[str]] = {}
    for cell in cells:
        if cell.seed == seed:
            by_content.setdefault(content(cell.recipe), []).append(cell.setting.name)
    return [
        Problem(f"cells {' and '.join(names)} are the same run", fix="delete one, or change what it sets")
        for names in by_content.values()
        if len(names) > 1
    ]


def content(recipe: Recipe) -> str:
    """Everything of a recipe that says what is run and measured, as text; not where to."""
    return as_text(recipe.model_dump(mode="json", exclude={"output_dir", "report_to", "model_token_env"}))


def _notes(cells: Sequence[Cell]) -> list[str]:
    """What makes the cells unequal where a reader would take them for equal."""
    notes = []
    values: dict[str, set[str]] = {key: set() for key in BUDGET}
    for cell in cells:
        recipe = cell.recipe.model_dump(mode="json")
        for key in BUDGET:
            of_stages = [stage.get(key) for stage in recipe["stages"]]
            values[key].add(as_text([recipe.get(key), of_stages]))
    varied = [key for key in BUDGET if len(values[key]) > 1]
    if varied:
        notes.append(f"the cells differ in data, order or budget: {', '.join(varied)}")
    silent = list(dict.fromkeys(cell.setting.name for cell in cells if cell.recipe.evaluate is None))
    if silent:
        notes.append(f"no `evaluate`, and so no task score: {', '.join(silent)}; add it with `data.test` to the recipe")
    return notes
