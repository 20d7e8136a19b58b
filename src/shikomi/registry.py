"""A component is a file: `find("objectives", "dpo")` is the class in objectives/dpo.py whose `name` is "dpo".

`names` reads the files without importing them, so that listing the components never costs an import of torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from functools import cache
from pathlib import Path

from shikomi.errors import BadInput, Problem, nearest

KINDS = ("adapters", "objectives", "optim", "quant", "metrics", "rewards")


def names(kind: str) -> list[str]:
    """The components of a kind, sorted: files that hold a class whose `name` equals the file's stem."""
    return list(_names(kind, _folder(kind)))


def find(kind: str, name: str) -> type:
    """The class of a component; raises BadInput with the nearest name when there is no such file."""
    known = names(kind)
    if name not in known:
        raise BadInput([unknown(kind, name, known)])
    module = importlib.import_module(f"shikomi.{kind}.{name}")
    found = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls) and cls.__module__ == module.__name__ and vars(cls).get("name") == name
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__file__} must hold exactly one class with name = {name!r}; it holds {len(found)}")
    return found[0]


def unknown(kind: str, name: str, known: list[str]) -> Problem:
    """The problem that says that `name` is not among `known`, with the nearest that is."""
    close = nearest(name, known)
    return Problem(
        what=f"unknown {kind.removesuffix('s')} `{name}`",
        allowed=", ".join(known) or "none is built yet",
        fix=f"did you mean `{close}`?" if close else None,
    )


def _folder(kind: str) -> Path | None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of component {kind!r}; the kinds are {', '.join(KINDS)}")
    spec = importlib.util.find_spec(f"shikomi.{kind}")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def _names(kind: str, folder: Path | None) -> tuple[str, ...]:
    if folder is None:
        return ()
    return tuple(sorted(path.stem for path in folder.glob("[!_]*.py") if _declares_itself(path)))


def _declares_itself(path: Path) -> bool:
    """Whether the file has an indented `name = "<stem>"`, with or without an annotation."""
    pattern = rf"""^[ \t]+name[ \t]*(:[^=\n]+)?=[ \t]*(["']){re.escape(path.stem)}\2"""
    return re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE) is not None
