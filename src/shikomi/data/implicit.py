"""Where the prompt ends in pairs that do not say it: TRL's rule (`extract_prompt`), the common beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shikomi.errors import Problem

Messages = list[dict[str, Any]]


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Items that both begin with; at least one item of each is left over, as in TRL."""
    shortest = min(len(one), len(other))
    differs = next((k for k in range(shortest) if one[k] != other[k]), None)
    return max(0, shortest - 1) if differs is None else differs


def text_prompt(chosen: str, rejected: str) -> int:
    """Characters of the common beginning; a space before the answers belongs to them."""
    length = common_length(chosen, rejected)
    differs = length < min(len(chosen), len(rejected)) and chosen[length] != rejected[length]
    return length - 1 if differs and length and chosen[length - 1] == " " else length


def message_prompt(chosen: Messages, rejected: Messages, said: str | None) -> tuple[Messages, list[Messages], list]:
    """(prompt, [rest of chosen, rest of rejected], problems) of two whole conversations.

    `said` is a prompt that the row also holds as a string: it has to be one of the user's turns.
    """
    length = common_length(chosen, rejected)
    prompt, rests = chosen[:length], [chosen[length:], rejected[length:]]
    heads = [rest[0] if rest else None for rest in rests]
    problem = None
    if None in heads:
        problem = Problem(
            what="chosen or rejected has no turns", allowed="a list of messages that ends with the answer"
        )
    elif any(head["role"] != "assistant" for head in heads if head):
        problem = Problem(
            what=f"chosen and rejected answer different prompts: they part in turn {length + 1}",
            found=" and ".join(shown(head) for head in heads if head),
            allowed="the same turns before the answers",
            fix="make them two answers to one prompt, or remove the row",
        )
    elif not prompt:
        problem = Problem(
            what="there is no prompt: chosen and rejected begin with the answer",
            allowed="`prompt`, or the user's turns at the beginning of both",
            fix="add the prompt",
        )
    elif said is not None and said.strip() not in {m["content"].strip() for m in prompt if m["role"] != "assistant"}:
        problem = Problem(
            what="`prompt` is not in the turns that chosen and rejected begin with",
            found=repr(said[:40]),
            allowed=shown(prompt[-1]),
            fix="correct the prompt, or remove the column",
        )
    return prompt, rests, [problem] if problem else []


def without_prompt(prompt: Messages, side: Messages, key: str) -> tuple[Messages, Problem | None]:
    """The turns of an answer that may be given with its prompt; they begin with the assistant's."""
    if side and side[0]["role"] == "assistant":
        return side, None
    if side[: len(prompt)] != prompt:
        at = next(k for k, turn in enumerate(side) if k >= len(prompt) or turn != prompt[k]) if side else 0
        return side, Problem(
            what=f"the prompt is not the beginning of `{key}`" if side else f"`{key}` has no turns",
            found=f"turn {at + 1}: {shown(side[at])}" if side else None,
            allowed="the answer alone (assistant first), or the whole conversation that begins with the prompt",
            fix="correct the row, or remove `prompt`: the common beginning is then the prompt",
        )
    rest = side[len(prompt) :]
    if not rest or rest[0]["role"] != "assistant":
        return rest, Problem(
            what=f"`{key}` has no answer after the prompt",
            found=shown(rest[0]) if rest else "the prompt alone",
            allowed="an assistant turn",
        )
    return rest, None


def shown(message: dict[str, Any]) -> str:
    """A turn in a few words."""
    text = str(message.get("content") or "")
    return f"{message['role']} {text[:37] + '...' if len(text) > 40 else text!r}"
