"""YAML read as version 1.2 reads it, and JSON: `1e-4` is a number, `no` is text, a key stands once.

Nothing is constructed from tags. Every problem of the text is collected, each with its line.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from shikomi.errors import BadInput, Problem
from shikomi.recipe.tree import Block, Items, Where

MOST_NODES = 100_000  # aliases can make a short text arbitrarily large

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": r"^(?:~|null|Null|NULL|)$",
    "bool": r"^(?:true|True|TRUE|false|False|FALSE)$",
    "int": r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$",
    "float": (
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}
NUMBER = re.compile(f"{_SCALARS['int']}|{_SCALARS['float']}")
"""What is read as a number where it stands without quotes."""


class Loader12(yaml.SafeLoader):
    """Composes nodes with the scalar types of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[Any, Any] = {}


for _name, _pattern in _SCALARS.items():
    Loader12.add_implicit_resolver(_TAG + _name, re.compile(_pattern), None)


def read_yaml(text: str, file: str) -> Any:
    """The tree of a YAML text: Block, Items, or a scalar. Raises BadInput with every problem in it."""
    try:
        node = yaml.compose(text, Loader=Loader12)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BadInput([Problem("not text", file, line, f"the character U+{error.character:04X}")]) from error
    except yaml.MarkedYAMLError as error:
        raise BadInput([_syntax_problem(error, file)]) from error
    except RecursionError as error:
        raise BadInput([Problem("nested too deeply", file, allowed="a few levels")]) from error
    if node is None:
        return Block(Where(file, 1))
    reader = _Reader(file)
    tree = reader.read(node)
    if reader.problems:
        raise BadInput(reader.problems)
    return tree


def read_json(text: str, file: str) -> Any:
    """The tree of a JSON text. Raises BadInput with every problem in it."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput([Problem(f"not JSON, {error.msg}, column {error.colno}", file, error.lineno)]) from error
    except RecursionError as error:
        raise BadInput([Problem("nested too deeply", file, allowed="a few levels")]) from error
    # JSON is YAML, but for tabs between tokens; inside its strings they are escaped.
    return read_yaml(text.replace("\t", " "), file)


def read_value(text: str, place: str) -> Any:
    """The tree of one value of the command line: `1e-4`, `[a, b]`, `{name: lora, r: 8}`."""
    tree = read_yaml(text, place) if text.strip() else None
    return _without_lines(tree, Where(place))


def _without_lines(tree: Any, where: Where) -> Any:
    if isinstance(tree, Block):
        tree.where, tree.at = where, dict.fromkeys(tree, where)
    elif isinstance(tree, Items):
        tree.where, tree.at = where, [where] * len(tree)
    for child in tree.values() if isinstance(tree, Block) else tree if isinstance(tree, Items) else ():
        _without_lines(child, where)
    return tree


def _syntax_problem(error: yaml.MarkedYAMLError, file: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    problem = error.problem or "broken YAML"
    fix = None
    if "'\\t'" in problem:
        fix = "indent with spaces, not tabs"
    elif "mapping values are not allowed" in problem:
        fix = "put quotes around text that contains `: `"
    elif "found unexpected end of stream" in problem or "could not find expected" in problem:
        fix = "close the quote or the bracket that was opened above"
    context = f", {error.context}" if error.context else ""
    return Problem(f"not YAML, {problem}{context}", file, mark.line + 1 if mark else None, fix=fix)


class _Reader:
    """Turns nodes into a tree and collects what is wrong on the way."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.count = 0
        self.above: set[int] = set()  # ids of the nodes that contain the present one

    def read(self, node: Node) -> Any:
        where = Where(self.file, node.start_mark.line + 1)
        self.count += 1
        if self.count > MOST_NODES:
            raise BadInput([where.problem("too large", f"more than {MOST_NODES:,} values after expanding aliases")])
        if isinstance(node, ScalarNode):
            return self.scalar(node, where)
        if id(node) in self.above:
            self.problems.append(where.problem("an alias refers to the block that contains it"))
            return None
        self.above.add(id(node))
        tree = self.mapping(node, where) if isinstance(node, MappingNode) else self.sequence(node, where)
        self.above.remove(id(node))
        return tree

    def mapping(self, node: MappingNode, where: Where) -> Block:
        self.check_tag(node, where, "map")
        block = Block(where)
        for key_node, value_node in node.value:
            at = Where(self.file, key_node.start_mark.line + 1)
            if not isinstance(key_node, ScalarNode):
                self.problems.append(at.problem("a key that is not a word", allowed="a name before the colon"))
                continue
            key = self.string(key_node.value, at)
            value = self.read(value_node)
            if key is None:
                continue
            if key in block:
                self.problems.append(
                    at.problem(
                        f"`{key}` stands twice",
                        found=f"first on line {block.at[key].line}",
                        fix="delete one of the two",
                    )
                )
                continue
            block.put(key, value, at)
        return block

    def sequence(self, node: SequenceNode, where: Where) -> Items:
        self.check_tag(node, where, "seq")
        items = Items(where)
        for child in node.value:
            items.add(self.read(child), Where(self.file, child.start_mark.line + 1))
        return items

    def scalar(self, node: ScalarNode, where: Where) -> Any:
        text, tag = node.value, node.tag.removeprefix(_TAG)
        if tag == "null" and re.match(_SCALARS["null"], text):
            return None
        if tag == "bool" and re.match(_SCALARS["bool"], text):
            return text.lower() == "true"
        if tag == "int" and re.match(_SCALARS["int"], text):
            return self.integer(text, where)
        if tag == "float" and re.match(_SCALARS["float"], text):
            return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
        if tag != "str":
            self.problems.append(where.problem(f"the tag {node.tag}", allowed="plain values without tags"))
            return None
        return self.string(text, where)

    def integer(self, text: str, where: Where) -> int | None:
        if len(text) > 100:
            self.problems.append(where.problem("a number that is too long", f"{len(text)} digits"))
            return None
        return int(text, 0) if text.startswith(("0x", "0o")) else int(text)

    def string(self, text: str, where: Where) -> str | None:
        try:
            # JSON writes a character beyond U+FFFF as two escapes, which YAML reads as two halves.
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self.problems.append(where.problem("text that is not Unicode", "half of a surrogate pair"))
            return None

    def check_tag(self, node: Node, where: Where, expected: str) -> None:
        if node.tag != _TAG + expected:
            self.problems.append(where.problem(f"the tag {node.tag}", allowed="plain values without tags"))
