"""explain: what a number, an exit code, an error, a finding or a recipe key means, and what to do."""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from shikomi.commands.output import Json, emit

if TYPE_CHECKING:
    from shikomi.evaluate.topics import Topic

EXPLAIN = """What a number, an exit code, an error, a finding, a recipe key or a method means, and what to do.

Also takes an error message as it was printed, in quotes. Without a topic: the list of all of them.

\b
Examples:
  shikomi explain
  shikomi explain grad_norm
  shikomi explain exit-3
  shikomi explain learning_rate
  shikomi explain "out of memory with micro_batch_tokens=2048"
"""
WIDEST = 100
TITLED = ("number", "exit code", "error", "finding")


def explain(
    topic: Annotated[str | None, typer.Argument(help="A name, or a message in quotes.")] = None,
    as_json: Json = False,
) -> None:
    """Nothing is imported but tables."""
    from shikomi.evaluate import topics

    if topic is None:
        _list(as_json)
        return
    found = topics.find(topic)
    if as_json:
        shown = [
            {"kind": t.kind, "name": t.name, "title": t.title, "paragraphs": [list(p) for p in t.paragraphs]}
            for t in found
        ]
        emit({"topic": topic, "explanations": shown})
        return
    print("\n\n".join(_text(t) for t in found))


def _list(as_json: bool) -> None:
    """The names of all topics by kind, with titles where the name alone says little; options are with their methods."""
    from shikomi.evaluate import topics

    kinds: dict[str, list[Topic]] = {}
    for t in topics.topics():
        kinds.setdefault(t.kind, []).append(t)
    if as_json:
        emit({"topics": {kind: list(dict.fromkeys(t.name for t in members)) for kind, members in kinds.items()}})
        return
    for kind, members in kinds.items():
        if kind == topics.OPTION:
            continue
        print(f"{kind}:")
        if kind in TITLED:
            print("\n".join(f"  {t.name:<26}{t.title}" for t in members))
        else:
            print(_wrapped(", ".join(t.name for t in members)))


def _text(topic: Topic) -> str:
    lines = [f"{topic.name} ({topic.kind}): {topic.title}"]
    lines += [_wrapped(f"{label}: {text}" if label else text) for label, text in topic.paragraphs]
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    width = min(WIDEST, shutil.get_terminal_size().columns)
    return textwrap.fill(text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
