"""From a recipe file and overrides to a Recipe: read, override, translate, normalize, check."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shikomi.errors import BadInput, Problem
from shikomi.recipe.check import check
from shikomi.recipe.edit import DEFAULT_NAMES, set_path
from shikomi.recipe.normal import INHERITED, normalize
from shikomi.recipe.pasted import TOP_KEYS, Pasted
from shikomi.recipe.schema import Recipe
from shikomi.recipe.tree import Block, Items, Where, shown, tree_of
from shikomi.recipe.yaml12 import read_json, read_value, read_yaml

COMMAND_LINE = "command line"
LARGEST_FILE = 10_000_000  # bytes; a recipe is a page, so a larger file is data given by mistake

Override = tuple[tuple[str, ...], Any, str]
"""Path, value, and the text it was written as."""


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe (YAML, JSON, or a mapping) and resolve it; `overrides` are `dotted.key=value`, values in YAML.

    An override of a stage's key without `stages.N` holds for every stage. Paths become absolute against the
    working directory. Raises BadInput with every problem of the file and of the overrides.
    """
    if isinstance(source, Mapping):
        return _resolve(tree_of(source), _name_of(source), overrides)
    path = Path(source)
    return _resolve(read_recipe_file(path), path.stem, overrides)


def parse_recipe(text: str, name: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Resolve the text of a recipe in YAML; `name` stands for the file's name."""
    return _resolve(_mapping(read_yaml(text, f"{name}.yaml"), f"{name}.yaml"), name, overrides)


def read_recipe_file(path: Path) -> Block:
    """The tree of a recipe file, unchecked. Raises BadInput when it cannot be read."""
    file = str(path)
    if not path.exists():
        raise BadInput([Problem("there is no such recipe", file, fix="`shikomi init DATA` writes one")])
    if not path.is_file():
        raise BadInput([Problem("a recipe is a file", file, found="a folder")])
    if path.stat().st_size > LARGEST_FILE:
        raise BadInput([Problem("too large for a recipe", file, found=f"{path.stat().st_size:,} bytes")])
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        found = f"the byte 0x{raw[error.start]:02x}"
        raise BadInput([Problem("not UTF-8", file, line, found, fix="save the file as UTF-8")]) from error
    read = read_json if path.suffix.lower() == ".json" else read_yaml
    return _mapping(read(text, file), file)


def _mapping(tree: Any, file: str) -> Block:
    if isinstance(tree, Block):
        return tree
    raise BadInput([Problem("a recipe is a block of `key: value` lines", file, 1, found=shown(tree))])


def _name_of(source: Mapping[str, Any]) -> str:
    """A run's name for a recipe that has no file: that of its output folder, or of its model."""
    return os.path.basename(str(source.get("model", "")).rstrip("/")) or "recipe"


def _resolve(tree: Block, run_name: str, overrides: Sequence[str]) -> Recipe:
    wanted, problems = parse_overrides(overrides)
    later: list[Override] = []
    for override in wanted:
        path, value, text = override
        if len(path) == 1 and path[0] in tree and path[0] not in TOP_KEYS:
            tree.put(path[0], value, Where(COMMAND_LINE))  # another tool's key, replaced before it is translated
        else:
            later.append(override)
    pasted = Pasted()
    pasted.rewrite(tree)
    for path, value, _text in later:
        try:
            _override(tree, path, value, pasted)
        except BadInput as error:
            problems.extend(error.problems)
    one_stage = tree.get("stages") is None
    from_top = normalize(tree, run_name)
    recipe, found = check(tree, from_top, one_stage)
    problems = [*pasted.problems, *problems, *found]
    if problems or recipe is None:
        raise BadInput(sorted(problems, key=lambda problem: (problem.line is None, problem.line or 0)))
    return recipe.with_notes(pasted.notes)


def parse_overrides(overrides: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """`stages.0.learning_rate=1e-4` -> (path, value, text); problems for what is not of this form."""
    parsed: list[Override] = []
    problems: list[Problem] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            problems.append(
                Problem(f"`{text}`", COMMAND_LINE, allowed="key=value, such as learning_rate=1e-4 or adapter.r=8")
            )
            continue
        try:
            parsed.append((path, read_value(value, COMMAND_LINE), text))
        except BadInput as error:
            problems.extend(Problem(f"`{text}`: {problem.what}", COMMAND_LINE) for problem in error.problems)
    return parsed, problems


def _override(tree: Block, path: tuple[str, ...], value: Any, pasted: Pasted) -> None:
    """Set one key from the command line; it wins over the file, in every stage where it is a stage's key."""
    where = Where(COMMAND_LINE)
    if path[0] not in TOP_KEYS:  # another tool's key: translate it alone, then set what it became
        alone = Block(where)
        set_path(alone, path, value, where)
        pasted.rewrite(alone)
        for key, translated in _leaves(alone):
            set_path(tree, key, translated, where)
            _override_stages(tree, key, translated, pasted)
        return
    set_path(tree, path, value, where)
    _override_stages(tree, path, value, pasted)


def _override_stages(tree: Block, path: tuple[str, ...], value: Any, pasted: Pasted) -> None:
    where, stages = Where(COMMAND_LINE), tree.get("stages")
    own = [stage for stage in (stages if isinstance(stages, Items) else ()) if isinstance(stage, Block)]
    if path[0] == "data" and own and all(stage.get("data") is not None for stage in own):
        key = ".".join(path)
        raise BadInput([where.problem(f"`{key}`: every stage has its own data", fix=f"write `stages.0.{key}=...`")])
    if path[0] not in INHERITED:
        return
    for stage in own:
        if path[0] not in stage:
            continue
        before = stage[path[0]]
        set_path(stage, path, value, where)
        if len(own) > 1 and before != stage[path[0]]:
            pasted.note(where, f"`{'.'.join(path)}` replaces `{path[0]}: {shown(before)}` of a stage")


def _leaves(tree: Block, above: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """(path, value) of everything in nested blocks that is not a block; a component's default name is left out."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for key, value in tree.items():
        if key == "name" and len(tree) > 1 and value == DEFAULT_NAMES.get(above[-1]):
            continue
        if isinstance(value, Block) and value:
            found.extend(_leaves(value, (*above, key)))
        else:
            found.append(((*above, key), value))
    return found
