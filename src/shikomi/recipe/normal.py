"""One form for everything a recipe may write in several: components, sources, stages, paths."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

from shikomi.recipe.edit import DEFAULT_NAMES, component_block, data_block
from shikomi.recipe.pasted import STAGE_KEYS
from shikomi.recipe.schema import (
    LEARNING_RATE_ADAPTER,
    LEARNING_RATE_FULL,
    LEARNING_RATE_PREFERENCES,
    LEARNING_RATE_PREFERENCES_FULL,
    OWN_KEYS,
    PREFERENCES,
)
from shikomi.recipe.tree import Block, Items

INHERITED = tuple(key for key in STAGE_KEYS if key not in (*OWN_KEYS, "data"))
"""Keys of a stage that may stand at the top, as every stage's default."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_ENDINGS = frozenset("jsonl ndjson json csv tsv parquet txt gz zst gguf jinja arrow".split())


def normalize(tree: Block, run_name: str) -> set[tuple[int, str]]:
    """Bring a tree into the schema's form, in place; what has a wrong type stays, for the check to name.

    Returns (stage, key) of every stage's key that stands at the top of the file.
    """
    _components(tree, ("adapter", "quant"))
    if "data" in tree:
        tree["data"] = data_block(tree["data"], tree.place("data"))
        _sources(tree["data"])
    _report_to(tree)
    from_top = _stages(tree)
    _paths(tree, run_name)
    return from_top


def _components(block: Block, keys: tuple[str, ...]) -> None:
    """`lora` and {name: lora, r: 8} -> {name: lora, options: {r: 8}}."""
    for key in keys:
        if key == "quant" and key in block and block[key] is None:
            block[key] = "none"
        if not isinstance(block.get(key), str | Block):
            continue
        flat = component_block(block[key], key, block.place(key))
        spec, options = Block(flat.where), Block(flat.where)
        for name in flat:
            (spec if name == "name" else options).put(name, flat[name], flat.place(name))
        spec.put("options", options, flat.where)
        block[key] = spec


def _sources(data: Any) -> None:
    """A path or a block in the place of a list of sources -> a list of blocks."""
    if not isinstance(data, Block):
        return
    for key in ("train", "validation", "test"):
        value = data.get(key)
        if isinstance(value, str | Block):
            items = Items(data.place(key))
            items.add(value, data.place(key))
            data[key] = value = items
        if not isinstance(value, Items):
            continue
        for i, item in enumerate(value):
            if isinstance(item, str):
                source = Block(value.at[i])
                source.put("path", item, value.at[i])
                value[i] = item = source
            if isinstance(item, Block) and isinstance(item.get("path"), str):
                item["path"] = absolute(item["path"])


def _report_to(tree: Block) -> None:
    """`none` and null -> no writer; one name -> a list of one."""
    value = tree.get("report_to")
    if isinstance(value, str):
        value = Items(tree.place("report_to"))
        value.add(tree["report_to"], tree.place("report_to"))
    if isinstance(value, Items) and value == ["none"]:
        value = Items(value.where)
    if "report_to" in tree:
        tree["report_to"] = Items(tree.place("report_to")) if value is None else value


def _stages(tree: Block) -> set[tuple[int, str]]:
    """Give every stage the keys at the top that it has not, its default learning rate and its name."""
    if tree.get("stages") is None:
        tree.put("stages", Items(tree.where), tree.where)
        tree["stages"].add(Block(tree.where), tree.where)
    defaults = {key: (tree.place(key), tree.take(key)) for key in list(tree) if key in INHERITED}
    stages = tree["stages"]
    from_top: set[tuple[int, str]] = set()
    if not isinstance(stages, Items):
        return from_top
    taken: set[str] = set()
    for i, stage in enumerate(stages):
        if not isinstance(stage, Block):
            continue
        for key, (where, value) in defaults.items():
            if key not in stage:
                stage.put(key, copy.deepcopy(value), where)
                from_top.add((i, key))
        _components(stage, ("adapter", "objective", "optim"))
        if stage.get("data") is None:
            stage.pop("data", None)
        else:
            stage["data"] = data_block(stage["data"], stage.place("data"))
            _sources(stage["data"])
        if stage.get("learning_rate") is None:
            stage.put(
                "learning_rate",
                _learning_rate(stage if isinstance(stage.get("adapter"), Block) else tree, stage),
                stage.place("learning_rate"),
            )
        if stage.get("name") is None:
            stage.put("name", _stage_name(stage, taken), stage.where)
        metric = stage.get("metric_for_best_model")
        if isinstance(metric, str) and not metric.startswith("eval_"):
            stage["metric_for_best_model"] = f"eval_{metric}"
        if isinstance(stage["name"], str):
            taken.add(stage["name"])
    if "data" not in tree and stages and isinstance(stages[0], Block) and "data" in stages[0]:
        if all(isinstance(stage, Block) and "data" in stage for stage in stages):
            tree.put("data", stages[0]["data"], stages[0].place("data"))
    return from_top


def _learning_rate(tree: Block, stage: Block) -> float:
    adapter, objective = tree.get("adapter"), stage.get("objective")
    full = isinstance(adapter, Block) and adapter.get("name") == "full"
    if isinstance(objective, Block) and objective.get("name") in PREFERENCES:
        return LEARNING_RATE_PREFERENCES_FULL if full else LEARNING_RATE_PREFERENCES
    return LEARNING_RATE_FULL if full else LEARNING_RATE_ADAPTER


def _stage_name(stage: Block, taken: set[str]) -> str:
    objective = stage.get("objective")
    name = objective.get("name") if isinstance(objective, Block) else None
    if not isinstance(name, str):
        name = DEFAULT_NAMES["objective"]
    count = 2
    unique = name
    while unique in taken:
        unique = f"{name}-{count}"
        count += 1
    return unique


def _paths(tree: Block, run_name: str) -> None:
    if isinstance(tree.get("model"), str):
        tree["model"] = _model(tree["model"])
    template = tree.get("chat_template")
    if isinstance(template, str) and "{" not in template and (os.sep in template or Path(template).suffix):
        tree["chat_template"] = os.path.abspath(os.path.expanduser(template))
    if tree.get("output_dir") is None:
        tree.put("output_dir", os.path.abspath(os.path.join("runs", run_name)), tree.place("output_dir"))
    elif isinstance(tree["output_dir"], str) and tree["output_dir"]:
        tree["output_dir"] = os.path.abspath(os.path.expanduser(tree["output_dir"]))


def absolute(path: str) -> str:
    """A local path made absolute against the working directory; a hub id or a URL as it is."""
    return os.path.abspath(os.path.expanduser(path)) if _is_path(path) else path


def _is_path(text: str) -> bool:
    if not text or "://" in text or text.startswith(("hf:", "hub:")):
        return False
    if text.startswith((".", "~", os.sep)) or os.path.exists(text):
        return True
    return Path(text).suffix.lstrip(".").lower() in _FILE_ENDINGS or not _HUB_ID.fullmatch(text)


def _model(text: str) -> str:
    """A folder or a .gguf file made absolute. A bare word is an alias, unless it is the folder of a model or a run."""
    if os.sep not in text and not text.startswith("~") and not text.lower().endswith(".gguf"):
        marks = ("config.json", "adapter_config.json", "recipe.yaml")
        return os.path.abspath(text) if any(os.path.isfile(os.path.join(text, mark)) for mark in marks) else text
    return absolute(text)
