"""What numbers, exit codes and errors mean, read from explanations.yaml; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

EVALUATED = "eval_"
"""Stands before a number that is measured on validation rows."""
METRIC_GROUPS = ("training", "preferences", "evaluation", "run", "data")


@dataclass(frozen=True)
class Explanation:
    """One entry: a paragraph, what is healthy, what to do.

    `says` are parts of the messages that mean an error, `also` other names.
    """

    name: str
    group: str
    title: str
    meaning: str
    healthy: str
    do: str
    says: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


@cache
def explanations() -> dict[str, Explanation]:
    """Every entry by its name, in the order of the file."""
    groups = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {name: _entry(name, group, entry) for group, entries in groups.items() for name, entry in entries.items()}


def _entry(name: str, group: str, fields: dict[str, Any]) -> Explanation:
    says, also = (tuple(fields.pop(key, ())) for key in ("says", "also"))
    return Explanation(name, group, **fields, says=says, also=also)


def of_metric(name: str) -> Explanation | None:
    """The entry of a number in metrics.jsonl or result.json; `eval_` before it may be left out. None for none."""
    known = explanations()
    found = known.get(name) or known.get(name.removeprefix(EVALUATED))
    return found if found is not None and found.group in METRIC_GROUPS else None


def of_message(text: str) -> list[Explanation]:
    """The errors whose message a text holds."""
    folded = text.casefold()
    return [entry for entry in explanations().values() if any(part.casefold() in folded for part in entry.says)]
