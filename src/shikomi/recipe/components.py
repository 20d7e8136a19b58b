"""Checking a component's name and options against its own class; the class is imported only when it is needed."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from shikomi import registry
from shikomi.errors import BadInput, Problem, nearest
from shikomi.recipe.describe import KINDS, option_fields, words
from shikomi.recipe.edit import DEFAULT_NAMES
from shikomi.recipe.explain import explain_value
from shikomi.recipe.schema import ComponentSpec
from shikomi.recipe.tree import Block, Items, tree_of

PLANNED = {
    "adapter": (),
    "quant": (),
    "objective": ("ppo", "grpo"),
    "optim": (),
}
"""Names that the design gives to components; one that has no file is said to be missing, not misspelt."""

_NEEDS_NO_CLASS = {*DEFAULT_NAMES.values(), "full"}


def build(kind: str, spec: ComponentSpec) -> Any:
    """The component of a spec, its options checked: build("adapters", recipe.adapter). Raises BadInput."""
    cls = registry.find(kind, spec.name)
    problems = check_options(cls, tree_of(spec.options), spec.name)
    if problems:
        raise BadInput(problems)
    return TypeAdapter(cls).validate_json(json.dumps(spec.options), strict=True)


def check_components(tree: Block) -> list[Problem]:
    """Problems of every component that a normalized tree names: adapter, quant, and each stage's."""
    problems = []
    stages = tree.get("stages")
    blocks = [tree, *(stage for stage in (stages if isinstance(stages, Items) else ()) if isinstance(stage, Block))]
    for block in blocks:
        for key in KINDS:
            spec = block.get(key)
            if isinstance(spec, Block) and isinstance(spec.get("name"), str):
                problems.extend(_check(key, spec))
    return problems


def _check(key: str, spec: Block) -> list[Problem]:
    name, options = spec["name"], spec["options"]
    known = registry.names(KINDS[key])
    where = spec.place("name")
    planned = name in PLANNED[key]
    if name not in known or planned:
        close = None if planned else nearest(name, known)
        return [
            where.problem(
                f"`{key}: {name}` {'is not built yet' if planned else 'does not exist'}",
                allowed=", ".join(n for n in known if n not in PLANNED[key]) or "none is built yet",
                fix=f"did you mean `{close}`?" if close else None,
            )
        ]
    if name in _NEEDS_NO_CLASS and not options:
        return []
    return check_options(registry.find(KINDS[key], name), options, key)


def check_options(cls: type, options: Block, key: str) -> list[Problem]:
    """Problems of a component's options: unknown names, wrong types, values out of range, missing ones."""
    fields = option_fields(cls)
    problems = []
    for name in options:
        if name not in fields:
            close = nearest(name, fields)
            problems.append(
                options.place(name).problem(
                    f"unknown key `{key}.{name}`",
                    allowed=", ".join(fields) or "no options",
                    fix=f"did you mean `{close}`?" if close else None,
                )
            )
    known = {name: value for name, value in options.items() if name in fields}
    try:
        TypeAdapter(cls).validate_json(json.dumps(known), strict=True)
    except ValidationError as error:
        problems.extend(_option_problems(error, options, key, dict(fields)))
    except BadInput as error:  # what the class itself refuses, in its own words
        problems.extend(options.where.problem(f"`{key}`: {problem}") for problem in error.problems)
    return problems


def _option_problems(error: ValidationError, options: Block, key: str, fields: dict[str, FieldInfo]) -> list[Problem]:
    problems: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        name = str(detail["loc"][0]) if detail["loc"] else ""
        if name not in fields:
            problems[name] = options.where.problem(f"`{key}`: {detail['msg'].removeprefix('Value error, ')}")
            continue
        allowed = words(fields[name].annotation, fields[name].metadata)
        if detail["type"] == "missing":
            problems[name] = options.where.problem(f"`{key}.{name}` is missing", allowed=allowed)
        elif name not in problems:
            problems[name] = explain_value(options.place(name), f"{key}.{name}", options[name], allowed)
    return list(problems.values())
