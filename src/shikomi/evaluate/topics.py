"""Everything that `shikomi explain` knows: numbers, exit codes, errors, findings, recipe keys, methods, options.

Read from the source and its tables; no component is imported, so that a question costs no import of torch.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from shikomi import registry
from shikomi.data.findings.codes import codes
from shikomi.errors import BadInput, Problem, nearest
from shikomi.evaluate.explanations import EVALUATED, METRIC_GROUPS, explanations, of_message
from shikomi.recipe import reference

ON_VALIDATION = "Measured on the validation rows."
OPTION = "option"
# The folder of components -> what one of them is, and the recipe key that names it.
KINDS = {"adapters": "adapter", "objectives": "objective", "optim": "optim", "quant": "quant", "metrics": "metric"}
KINDS |= {"rewards": "reward"}


@dataclass(frozen=True)
class Topic:
    """One answer: what kind of thing it is, its name, a title, paragraphs by their labels, and other names."""

    kind: str
    name: str
    title: str
    paragraphs: tuple[tuple[str, str], ...]
    also: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return self.name, *self.also


@cache
def topics() -> tuple[Topic, ...]:
    """All of them, kind by kind."""
    return (*_explained(), *_findings(), *_recipe_keys(), *_components())


def _explained() -> Iterator[Topic]:
    for entry in explanations().values():
        kind = "number" if entry.group in METRIC_GROUPS else entry.group.removesuffix("s")
        parts = (("", entry.meaning), ("healthy", entry.healthy), ("what to do", entry.do))
        yield Topic(kind, entry.name, entry.title, tuple(part for part in parts if part[1]), entry.also)


def _findings() -> Iterator[Topic]:
    for code in codes().values():
        parts = (("", code.meaning), ("healthy", code.healthy), ("what to do", code.fix))
        yield Topic("finding", code.code, f"{code.severity}: {code.title}", parts)


def _recipe_keys() -> Iterator[Topic]:
    for key, kind, default, about in reference():
        written = str(default).lower() if isinstance(default, bool) else str(default)
        typed = kind if default is None else f"{kind}; default {written}"
        also = (key.rpartition(".")[2],) if "." in key else ()
        yield Topic("recipe key", key, about, (("type", typed),), also)


def _components() -> Iterator[Topic]:
    """Adapters, objectives and the like, and their options, from the text of their files."""
    for kind in registry.KINDS:
        for name in registry.names(kind):
            tree = _source(kind, name)
            about = (ast.get_docstring(tree) or "").partition("\n")[0]
            more = (("options", f"`shikomi list {kind} {name}` shows all with their defaults"),)
            yield Topic(KINDS[kind], name, about, more)
            for option, text in _options(kind, name):
                also = (f"{KINDS[kind]}.{option}", f"{name}.{option}")
                yield Topic(OPTION, option, f"{name}: {text}", more, also)


def _source(kind: str, name: str) -> ast.Module:
    spec = importlib.util.find_spec(f"shikomi.{kind}.{name}")
    assert spec is not None and spec.origin is not None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _options(kind: str, name: str) -> Iterator[tuple[str, str]]:
    """(name, description) of the fields that are written `name: Annotated[..., Field(description=...)]`.

    Those of a component that a class here is made from come first.
    """
    tree = _source(kind, name)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    bases = {ast.unparse(base) for cls in classes for base in cls.bases}
    for node in (node for node in tree.body if isinstance(node, ast.ImportFrom)):
        package, _, other = (node.module or "").rpartition(".")
        if package == f"shikomi.{kind}" and other in registry.names(kind) and bases & {a.name for a in node.names}:
            yield from _options(kind, other)
    for cls in classes:
        for field in (node for node in cls.body if isinstance(node, ast.AnnAssign)):
            for call in (node for node in ast.walk(field.annotation) if isinstance(node, ast.Call)):
                for keyword in call.keywords:
                    if keyword.arg == "description" and isinstance(keyword.value, ast.Constant):
                        yield ast.unparse(field.target), str(keyword.value.value)


def find(asked: str) -> list[Topic]:
    """What a name or a pasted message means; raises BadInput with the nearest name where nothing is known."""
    name = _normal(asked)
    found = [topic for topic in topics() if name.lower() in map(str.lower, topic.names)]
    if not found and name.startswith(EVALUATED):
        found = [_on_validation(t) for t in topics() if t.kind == "number" and t.name == name.removeprefix(EVALUATED)]
    if not found:
        by_name = {topic.name: topic for topic in topics() if topic.kind == "error"}
        found = [by_name[entry.name] for entry in of_message(asked)]
    if found:
        return found
    close = nearest(name, [known for topic in topics() for known in topic.names])
    fix = f"did you mean `{close}`?" if close else "`shikomi explain` lists what it knows"
    raise BadInput([Problem("nothing is known under this name", found=asked, fix=fix)])


def _normal(asked: str) -> str:
    """`exit code 3`, `3` and `exit-3` are one name."""
    exit_code = re.fullmatch(r"(?:exit)?[ -]?(?:code)?[ -]?(\d{1,3})", asked.strip().lower())
    return f"exit-{exit_code[1]}" if exit_code else asked.strip()


def _on_validation(topic: Topic) -> Topic:
    (label, text), *others = topic.paragraphs
    return Topic(topic.kind, f"{EVALUATED}{topic.name}", topic.title, ((label, f"{ON_VALIDATION} {text}"), *others))
