"""What a sweep varies: named methods, axes of values and seeds, from the command line and a sweep file."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shikomi import registry
from shikomi.errors import BadInput, Problem, nearest
from shikomi.recipe.load import COMMAND_LINE, read_recipe_file
from shikomi.recipe.tree import NOWHERE, Block, Items, Where, shown
from shikomi.recipe.yaml12 import read_value

SHORTHANDS: dict[str, dict[str, Any]] = {
    "galore": {"adapter": "full", "optim": "galore"},
    "loraplus": {"adapter": "lora", "loraplus_lr_ratio": 16.0},
    "qlora": {"adapter": "lora", "quant": "nf4"},
}
"""Names that `adapter=` understands in a grid although no adapter is called so: methods that are several keys."""

_NOT_VARIED = {
    "output_dir": "each cell has a folder of its own: --output-dir names the sweep's",
    "seed": "give the seeds with --seeds, or `seeds:` in the sweep file",
}
_KEYS = ("methods", "grid", "seeds", "reference")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Axis:
    """One key and the values it takes, plain JSON values."""

    key: str
    values: tuple[Any, ...]
    where: Where = NOWHERE


@dataclass(frozen=True)
class Method:
    """A named bundle of overrides: {dotted key: plain JSON value}."""

    name: str
    overrides: dict[str, Any]
    where: Where = NOWHERE


@dataclass(frozen=True)
class Grid:
    """Every method with every combination of the axes' values, with every seed; empty is a factor of one."""

    methods: tuple[Method, ...] = ()
    axes: tuple[Axis, ...] = ()
    seeds: tuple[int, ...] = ()
    reference: str | None = None


def read_grid(axes: Sequence[str], seeds: str | None, file: Path | None, reference: str | None = None) -> Grid:
    """The grid of a command line: `axes` are `key=value,value`, `seeds` is `0,1,2`, `file` is a sweep file.

    An axis of the command line replaces the file's of the same key; `seeds` and `reference` replace the file's.
    Raises BadInput with every problem.
    """
    problems: list[Problem] = []
    grid = Grid() if file is None else _read_file(file, problems)
    own: dict[str, Axis] = {}
    for text in axes:
        axis = parse_axis(text, problems)
        if axis is None:
            continue
        if axis.key in own:
            problems.append(Problem(f"--grid {axis.key} is given twice", COMMAND_LINE, fix="give its values in one"))
        own[axis.key] = axis
    merged = {axis.key: axis for axis in grid.axes} | own
    if seeds is not None:
        value = read_value(f"[{seeds}]", COMMAND_LINE)
        grid = replace(grid, seeds=_seeds(value, Where(COMMAND_LINE), problems))
    if not merged and not grid.methods and len(grid.seeds) < 2 and not problems:
        fix = "add --grid key=value,value, --methods FILE, or two and more --seeds"
        problems.append(Problem("a sweep of one run", COMMAND_LINE, fix=fix))
    if problems:
        raise BadInput(problems)
    return replace(grid, axes=tuple(merged.values()), reference=reference or grid.reference)


def parse_axis(text: str, problems: list[Problem]) -> Axis | None:
    """`adapter.target_modules=[q_proj,v_proj],all-linear` as an axis; None where it is not one, then with a problem."""
    key, equals, values = text.partition("=")
    key, where = key.strip(), Where(COMMAND_LINE)
    if not equals or not all(part.strip() for part in key.split(".")):
        allowed = "key=value,value, such as learning_rate=1e-4,3e-4"
        problems.append(where.problem(f"--grid {text}", allowed=allowed))
        return None
    try:
        items = read_value(f"[{values}]", COMMAND_LINE)
    except BadInput as error:
        fix = "values are YAML with commas between them; quotes around text that contains , [ ] { } or : "
        problems += [where.problem(f"--grid {text}: {p.what}", fix=fix.strip()) for p in error.problems]
        return None
    return _axis(key, items, where, problems)


def _axis(key: str, items: Any, where: Where, problems: list[Problem]) -> Axis | None:
    if key in _NOT_VARIED:
        problems.append(where.problem(f"`{key}` is no axis of a grid", fix=_NOT_VARIED[key]))
        return None
    if not isinstance(items, Items):
        problems.append(where.problem(f"`grid.{key}`", shown(items), "a list of values", f"write [{shown(items)}]"))
        return None
    if not items:
        problems.append(where.problem(f"`{key}` has no values", allowed="one and more, with commas between them"))
    values = plain(items)
    twice = [value for i, value in enumerate(values) if as_text(value) in map(as_text, values[:i])]
    problems += [where.problem(f"`{key}` has the value {as_text(value)} twice", fix="delete one") for value in twice]
    return Axis(key, tuple(values), where)


def _read_file(file: Path, problems: list[Problem]) -> Grid:
    if not file.is_file():
        fix = "it holds `methods:`, `grid:` and `seeds:`; see recipes/sweeps/methods.yaml"
        raise BadInput([Problem("there is no such sweep file", str(file), fix=fix)])
    tree = read_recipe_file(file)
    for key in tree:
        if key not in _KEYS:
            close = nearest(key, _KEYS)
            fix = f"did you mean `{close}`?" if close else "keys of a recipe belong into a method or the recipe"
            problems.append(tree.place(key).problem(f"unknown key `{key}`", allowed=", ".join(_KEYS), fix=fix))
    axes = []
    for key, items in _block(tree, "grid", problems).items():
        axis = _axis(key, items, tree["grid"].place(key), problems)
        axes += [axis] if axis else []
    methods = _methods(_block(tree, "methods", problems), problems)
    seeds = _seeds(tree["seeds"], tree.place("seeds"), problems) if tree.get("seeds") is not None else ()
    reference = tree.get("reference")
    if reference is not None and not isinstance(reference, str):
        problems.append(tree.place("reference").problem("`reference`", shown(reference), "the name of a method"))
        reference = None
    return Grid(methods, tuple(axes), seeds, reference)


def _block(tree: Block, key: str, problems: list[Problem]) -> Block:
    value = tree.get(key)
    if value is None or isinstance(value, Block):
        return value or Block()
    problems.append(tree.place(key).problem(f"`{key}`", shown(value), "a block of `name: ...` lines"))
    return Block()


def _methods(block: Block, problems: list[Problem]) -> tuple[Method, ...]:
    found = []
    for name, bundle in block.items():
        where = block.place(name)
        if not _NAME.fullmatch(name):
            fix = "use letters, digits, dot, dash, plus and underscore: it becomes the name of a folder"
            problems.append(where.problem("the name of a method", repr(name), fix=fix))
        if not isinstance(bundle, Block):
            allowed = "a block of recipe keys, such as {adapter: full, learning_rate: 2e-5}; {} for the recipe as it is"
            problems.append(where.problem(f"`methods.{name}`", shown(bundle), allowed))
            continue
        for key in bundle:
            if key in _NOT_VARIED:
                problems.append(bundle.place(key).problem(f"`methods.{name}.{key}`", fix=_NOT_VARIED[key]))
        found.append(Method(name, plain(bundle), where))
    return tuple(found)


def _seeds(value: Any, where: Where, problems: list[Problem]) -> tuple[int, ...]:
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < 2**32:
            problems.append(where.problem("seeds", shown(item), "whole numbers from 0 on, such as 0,1,2"))
            return ()
    if len(set(items)) < len(items) or not items:
        problems.append(where.problem("seeds", ", ".join(map(str, items)) or "none", "one and more, each once"))
    return tuple(items)


def spelled_out(key: str, value: Any) -> dict[str, Any]:
    """The overrides that one value of an axis means: itself, or a shorthand's."""
    known = value in registry.names("adapters") if isinstance(value, str) else True
    if key == "adapter" and not known and value in SHORTHANDS:
        return SHORTHANDS[value]
    return {key: value}


def plain(tree: Any) -> Any:
    """A tree as plain dicts, lists and scalars."""
    if isinstance(tree, dict):
        return {key: plain(child) for key, child in tree.items()}
    return [plain(child) for child in tree] if isinstance(tree, list) else tree


def as_text(value: Any) -> str:
    """A value as an override writes it: JSON, which YAML reads as it is."""
    return json.dumps(value)
