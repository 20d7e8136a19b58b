"""Every problem of a normalized recipe at once, each with its line, what was found, what is allowed, how to fix it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from shikomi import registry
from shikomi.errors import Problem, nearest
from shikomi.recipe.components import check_components
from shikomi.recipe.describe import block_of, field_of, item_of, words
from shikomi.recipe.explain import explain_value
from shikomi.recipe.pasted import TOP_KEYS
from shikomi.recipe.schema import DataSpec, EvaluateSpec, Recipe
from shikomi.recipe.tree import Block, Items, Path, dotted, shown, where_of

FromTop = set[tuple[int, str]]


def check(tree: Block, from_top: FromTop, one_stage: bool) -> tuple[Recipe | None, list[Problem]]:
    """The recipe of a normalized tree, or its problems, sorted by line.

    `from_top` and `one_stage` say which keys of `stages` stand at the top of the file, and are named so.
    """
    recipe: Recipe | None = None
    problems: list[Problem] = []
    try:
        recipe = Recipe.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        problems.extend(_Schema(tree, from_top, one_stage).problems(error))
    problems.extend(check_components(tree))
    problems.extend(_cross_checks(tree))
    unique = dict.fromkeys(problems)
    return (None if unique else recipe), sorted(unique, key=lambda problem: (problem.line is None, problem.line or 0))


class _Schema:
    """Pydantic's errors in our words."""

    def __init__(self, tree: Block, from_top: FromTop, one_stage: bool) -> None:
        self.tree, self.from_top, self.one_stage = tree, from_top, one_stage
        self.listed: set[str] = set()  # blocks whose keys were listed already

    def problems(self, error: ValidationError) -> Iterator[Problem]:
        by_path: dict[Path, ErrorDetails] = {}
        for detail in error.errors(include_url=False, include_context=False):
            by_path.setdefault(self.path(detail), detail)
        for path, detail in by_path.items():
            # A value that could have several types is reported once for each; the deepest report is about its own.
            if not any(other[: len(path)] == path and len(other) > len(path) for other in by_path):
                yield self.problem(path, detail)

    def path(self, detail: ErrorDetails) -> Path:
        """Where in the tree the error is; pydantic's names of union members are not part of it."""
        path: list[str | int] = []
        node: Any = self.tree
        last = len(detail["loc"]) - 1
        for i, part in enumerate(detail["loc"]):
            inside = (isinstance(node, Block) and part in node) or (
                isinstance(node, Items) and isinstance(part, int) and part < len(node)
            )
            if inside:
                node = node[part]
                path.append(part)
            elif i == last and detail["type"] == "missing":
                path.append(part)
        return tuple(path)

    def problem(self, path: Path, detail: ErrorDetails) -> Problem:
        where, key = where_of(self.tree, path), dotted(self.named(path))
        field = field_of(Recipe, path)
        if detail["type"] == "extra_forbidden":
            return self.unknown_key(path)
        if detail["type"] == "missing":
            about = field.description if field else None
            return where.problem(f"`{key}` is missing", fix=f"add it: {about}" if about else "add it")
        value = self.value(path)
        if field is None:
            return where.problem(f"`{key}`" if key else "the recipe", shown(value), detail["msg"])
        return explain_value(where, key, value, self.allowed(path, field.annotation, field.metadata))

    def allowed(self, path: Path, annotation: Any, metadata: list[Any]) -> str:
        return words(item_of(annotation)) if isinstance(path[-1], int) else words(annotation, metadata)

    def value(self, path: Path) -> Any:
        node: Any = self.tree
        for part in path:
            node = node[part]
        return node

    def named(self, path: Path) -> Path:
        """A path as the file says it: a stage's key may stand at the top, options stand beside the name."""
        named = tuple(part for part in path if part != "options")
        if len(named) > 2 and named[0] == "stages" and (self.one_stage or named[1:3] in self.from_top):
            return named[2:]
        return named

    def unknown_key(self, path: Path) -> Problem:
        key, outer = str(path[-1]), path[:-1]
        at_top = not outer or (self.one_stage and outer[:1] == ("stages",))
        known = list(TOP_KEYS) if at_top else self.keys(outer)
        close = nearest(key, known)
        fix = f"did you mean `{close}`?" if close else None
        if outer[:1] == ("stages",) and key in TOP_KEYS:
            fix = f"`{key}` is for the whole recipe: move it out of the stage"
        elif key in DataSpec.model_fields and at_top:
            fix = f"move it under `data`: `data.{key}`"
        elif key in EvaluateSpec.model_fields and at_top:
            fix = f"move it under `evaluate`: `evaluate.{key}`"
        block = dotted(outer)
        allowed = None if block in self.listed else ", ".join(known)
        self.listed.add(block)
        where = where_of(self.tree, path)
        return where.problem(f"unknown key `{dotted(self.named(path))}`", allowed=allowed, fix=fix)

    def keys(self, outer: Path) -> list[str]:
        """The keys that a block may have, in the order in which they are declared."""
        field = field_of(Recipe, outer)
        model = block_of(field) if field else None
        return list(model.model_fields) if model else []


def _cross_checks(tree: Block) -> Iterator[Problem]:
    """What single keys cannot say: keys that need another one."""
    data, stages = tree.get("data"), tree.get("stages")
    if isinstance(data, Block):
        yield from _check_data(data)
    if isinstance(tree.get("evaluate"), Block):
        yield from _check_evaluate(tree, tree["evaluate"])
    if tree.get("output_dir") == "":
        yield tree.place("output_dir").problem("`output_dir`", "''", "a path", "delete the key for runs/<recipe name>")
    template = tree.get("chat_template")
    if isinstance(template, str) and "{" not in template and not template.startswith(("/", "\\")):
        if len(template) < 2 or template[1] != ":":  # a drive letter
            yield tree.place("chat_template").problem(
                "`chat_template`", shown(template), "a Jinja template, or the path of one (NAME.jinja)"
            )
    for stage in stages if isinstance(stages, Items) else ():
        if isinstance(stage, Block):
            yield from _check_stage(stage, stage.get("data", data))


def _check_data(data: Block) -> Iterator[Problem]:
    labels = data.get("labels")
    if isinstance(labels, Items):
        for i, label in enumerate(labels):
            if label in labels[:i]:
                yield labels.at[i].problem(f"`data.labels` names {shown(label)} twice", fix="delete one of the two")
    if data.get("format") == "columns" and data.get("prompt") is None and data.get("completion") is None:
        yield data.place("format").problem(
            "`format: columns` without templates", fix="add `prompt` and `completion`, such as '{text}' and '{label}'"
        )


def _check_evaluate(tree: Block, evaluate: Block) -> Iterator[Problem]:
    metrics = evaluate.get("metrics")
    known = registry.names("metrics")
    for metric, where in zip(metrics, metrics.at, strict=True) if isinstance(metrics, Items) else ():
        if isinstance(metric, str) and metric not in known:
            close = nearest(metric, known)
            fix = f"did you mean `{close}`?" if close else None
            yield where.problem(f"`evaluate.metrics`: `{metric}` does not exist", None, ", ".join(known), fix)
    data = tree.get("data")
    if isinstance(data, Block) and data.get("test") is None and data.get("validation") is None:
        yield tree.place("evaluate").problem(
            "`evaluate` without rows to evaluate on", fix="add `data.test: FILE`, rows that are not trained"
        )


def _check_stage(stage: Block, data: Any) -> Iterator[Problem]:
    warmup = stage.get("warmup_steps")
    if isinstance(warmup, float) and 1 < warmup < float("inf") and not warmup.is_integer():
        yield stage.place("warmup_steps").problem(
            "`warmup_steps`", shown(warmup), "a share of all steps below 1, or a whole number of steps"
        )
    metric = stage.get("metric_for_best_model")
    known = [f"eval_{name}" for name in registry.names("metrics")]
    if isinstance(metric, str) and metric not in [*known, "eval_loss"]:
        close = nearest(metric, known)
        fix = f"did you mean `{close}`?" if close else None
        yield stage.place("metric_for_best_model").problem("`metric_for_best_model`", metric, ", ".join(known), fix)
    if not isinstance(data, Block) or data.get("validation") is not None:
        return
    for key in ("eval_steps", "early_stopping_patience", "load_best_model_at_end"):
        sampled = key == "eval_steps" and stage.get("sample_prompts")
        if stage.get(key) not in (None, False) and not sampled:
            yield stage.place(key).problem(
                f"`{key}: {shown(stage[key])}` without validation rows",
                fix="add `data.validation: FILE`, or `data.validation: 0.05` to split rows off",
            )
