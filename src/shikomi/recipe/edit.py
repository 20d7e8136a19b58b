"""Setting one key of a tree, wherever it is: `adapter.r`, `stages.0.learning_rate`, `data.train.1.weight`."""

from __future__ import annotations

from typing import Any

from shikomi.errors import BadInput, nearest
from shikomi.recipe.tree import Block, Items, Path, Where, dotted, shown

DEFAULT_NAMES = {"adapter": "lora", "quant": "none", "objective": "sft", "optim": "adamw"}
"""The component that each key means when it is absent."""


def component_block(value: Any, key: str, where: Where) -> Any:
    """`lora` -> {name: lora}; absent -> the default by its name; anything else as it is."""
    if isinstance(value, Block):
        if "name" not in value:
            value.put("name", DEFAULT_NAMES[key], value.where)
        return value
    if value is not None and not isinstance(value, str):
        return value
    block = Block(where)
    block.put("name", DEFAULT_NAMES[key] if value is None else value, where)
    return block


def data_block(value: Any, where: Where) -> Any:
    """`rows.jsonl` -> {train: rows.jsonl}; absent -> an empty block; anything else as it is."""
    if isinstance(value, Block) or (value is not None and not isinstance(value, str | Items)):
        return value
    block = Block(where)
    if value is not None:
        block.put("train", value, where)
    return block


def set_path(tree: Block, path: Path, value: Any, where: Where) -> None:
    """Set the value at `path`, making the blocks on the way. Raises BadInput when the way is not there."""
    node: Any = tree
    for i, part in enumerate(path[:-1]):
        node = _step(node, part, path[: i + 1], where)
    last = path[-1]
    if isinstance(node, Block):
        node.put(str(last), value, where)
    elif isinstance(node, Items):
        index = _index(node, last, path, where)
        node[index], node.at[index] = value, where
    else:
        raise _no_way(node, path[:-1], where)


def _step(node: Any, part: str | int, so_far: Path, where: Where) -> Any:
    if isinstance(node, Items):
        index = _index(node, part, so_far, where)
        if isinstance(node[index], str) and so_far[0] == "data":
            source = Block(node.at[index])
            source.put("path", node[index], node.at[index])
            node[index] = source
        return node[index]
    if not isinstance(node, Block):
        raise _no_way(node, so_far[:-1], where)
    key = str(part)
    value = node.get(key)
    if key in DEFAULT_NAMES:
        value = component_block(value, key, node.at.get(key, where))
    elif key == "data":
        value = data_block(value, node.at.get(key, where))
    elif value is None:
        value = Block(where)
    if key == "stages" and isinstance(value, Block):  # no stages in the file: the one that is implied
        value = Items(where)
        value.add(Block(where), where)
    if key in ("train", "validation", "test") and isinstance(value, str | Block):
        items = Items(where)
        items.add(value, where)
        value = items
    node.put(key, value, node.at.get(key, where))
    return value


def _index(items: Items, part: str | int, path: Path, where: Where) -> int:
    """The index that `part` means: a number, or the name of a stage."""
    if isinstance(part, int) or part.isdecimal():
        if int(part) < len(items):
            return int(part)
        raise BadInput(
            [where.problem(f"`{dotted(path)}` does not exist", f"a list of {len(items)}", "indices count from 0")]
        )
    names = [item.get("name") if isinstance(item, Block) else None for item in items]
    if names.count(part) == 1:
        return names.index(part)
    known = [name for name in names if isinstance(name, str)]
    close = nearest(part, known)
    raise BadInput(
        [
            where.problem(
                f"`{dotted(path)}` does not name one item",
                allowed=f"0 to {len(items) - 1}" + (f", or a name among {', '.join(known)}" if known else ""),
                fix=f"did you mean `{close}`?" if close and close != part else None,
            )
        ]
    )


def _no_way(node: Any, path: Path, where: Where) -> BadInput:
    return BadInput([where.problem(f"`{dotted(path)}` holds no keys", found=shown(node))])
