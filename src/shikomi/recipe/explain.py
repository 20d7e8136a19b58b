"""One wrong value, explained: what was found, what is allowed, and what to write instead."""

from __future__ import annotations

import re
from typing import Any

from shikomi.errors import Problem, nearest
from shikomi.recipe.tree import Where, shown
from shikomi.recipe.yaml12 import NUMBER


def explain_value(where: Where, key: str, value: Any, allowed: str) -> Problem:
    """The problem of a value that is not among what is `allowed` (as `describe.words` says it)."""
    found, fix = shown(value), None
    wants_number, wants_text = "number" in allowed, re.search(r"\btext\b", allowed) is not None
    if isinstance(value, str) and wants_number:
        plain = re.sub(r"(?<=\d)[_,](?=\d)", "", value)
        if NUMBER.match(value):
            found, fix = f"{found}, a number in quotes", f"write it without quotes: {value}"
        elif NUMBER.match(plain):
            found, fix = f"{found}, which is text", f"write {plain}"
    elif isinstance(value, float) and wants_number and value.is_integer() and "whole" in allowed:
        fix = f"write {int(value)}"
    elif isinstance(value, str) and "true or false" in allowed and value.lower() in ("yes", "on", "no", "off"):
        fix = f"write {'true' if value.lower() in ('yes', 'on') else 'false'}"
    elif isinstance(value, bool | int | float) and wants_text and "list of" not in allowed:
        fix = f"put it in quotes: '{shown(value)}'"
    elif isinstance(value, list) and wants_text and any(not isinstance(item, str) for item in value):
        wrong = next(item for item in value if not isinstance(item, str))
        found = f"{shown(wrong)} in the list"
        if isinstance(wrong, bool | int | float):
            fix = f"put it in quotes: '{shown(wrong)}'"
    elif isinstance(value, str) and allowed.startswith("a list of"):
        fix = f"write it as a list: [{value}]"
    elif isinstance(value, str):
        close = nearest(value, [choice for part in allowed.split(" or ") for choice in part.split(", ")])
        fix = f"did you mean `{close}`?" if close and close != value else None
    return where.problem(f"`{key}`", found, allowed, fix)
