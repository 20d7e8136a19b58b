"""A recipe as it was read, before it is checked: mappings and lists that remember where each key stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel

from shikomi.errors import BadInput, Problem

Path = tuple[str | int, ...]
"""Keys and indices from the top of the recipe: ("stages", 0, "learning_rate")."""


@dataclass(frozen=True)
class Where:
    """A place in a file; both are None in a recipe that was built in Python."""

    file: str | None = None
    line: int | None = None

    def problem(
        self, what: str, found: str | None = None, allowed: str | None = None, fix: str | None = None
    ) -> Problem:
        return Problem(what=what, file=self.file, line=self.line, found=found, allowed=allowed, fix=fix)


NOWHERE = Where()


class Block(dict[str, Any]):
    """A mapping that knows where it starts (`where`) and where each of its keys stands (`at`)."""

    def __init__(self, where: Where = NOWHERE) -> None:
        super().__init__()
        self.where = where
        self.at: dict[str, Where] = {}

    def put(self, key: str, value: Any, where: Where) -> None:
        self[key] = value
        self.at[key] = where

    def take(self, key: str) -> Any:
        """Remove a key and return its value."""
        self.at.pop(key, None)
        return self.pop(key)

    def place(self, key: str) -> Where:
        """Where a key stands; the block itself for a key that is not there."""
        return self.at.get(key, self.where)


class Items(list[Any]):
    """A list that knows where it starts (`where`) and where each of its items stands (`at`)."""

    def __init__(self, where: Where = NOWHERE) -> None:
        super().__init__()
        self.where = where
        self.at: list[Where] = []

    def add(self, value: Any, where: Where) -> None:
        self.append(value)
        self.at.append(where)


def tree_of(value: Any, where: Where = NOWHERE) -> Any:
    """A tree from Python values, every part of it standing at `where`. Raises BadInput for what no file can hold."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, Mapping):
        block = Block(where)
        for key, child in value.items():
            block.put(str(key), tree_of(child, where), where)
        return block
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        items = Items(where)
        for child in value:
            items.add(tree_of(child, where), where)
        return items
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise BadInput([where.problem("a value that no recipe can hold", f"{value!r:.60}, a {type(value).__name__}")])


def where_of(tree: Block, path: Path) -> Where:
    """The place of the deepest part of `path` that exists."""
    where, node = tree.where, tree
    for part in path:
        if isinstance(node, Block) and isinstance(part, str) and part in node:
            where, node = node.place(part), node[part]
        elif isinstance(node, Items) and isinstance(part, int) and part < len(node):
            where, node = node.at[part], node[part]
        else:
            break
    return where


def dotted(path: Path) -> str:
    """("stages", 0, "learning_rate") -> "stages.0.learning_rate"."""
    return ".".join(str(part) for part in path)


def shown(value: Any) -> str:
    """A value as an error quotes it: in YAML's spelling, and short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "...'"
    if isinstance(value, dict):
        return f"a block with the keys {', '.join(map(str, list(value)[:5])) or '(none)'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return str(value)[:60]
