"""Readers of the formats that are recognised by their keys: one function each, row -> Conversation or
problems.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shikomi.data.conversation import Conversation, Parsed, prompt_answer
from shikomi.data.messages import conversation_problems, parse_message, parse_tools, text_problem
from shikomi.errors import Problem

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""Stanford Alpaca's prompts, used where there is no chat template."""


def _text(row: Mapping[str, Any], answer: bool) -> Parsed:
    problem = string_problem(row, "text")
    return (None, [problem]) if problem else (Conversation(text=row["text"]), [])


def _messages(row: Mapping[str, Any], answer: bool) -> Parsed:
    return _turns(row, "messages", "role", "content", answer)


def _sharegpt(row: Mapping[str, Any], answer: bool) -> Parsed:
    turns = row.get("conversations")
    openai = isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]
    return _turns(row, "conversations", *(("role", "content") if openai else ("from", "value")), answer)


def _turns(row: Mapping[str, Any], key: str, role_key: str, content_key: str, answer: bool) -> Parsed:
    if not isinstance(row.get(key), list):
        return None, [
            Problem(what=f"`{key}` is not a list", found=type_name(row.get(key)), allowed="a list of messages")
        ]
    messages, problems = parse_all(row[key], role_key, content_key)
    if isinstance(row.get("system"), str) and row["system"].strip() and not problems:
        if not messages or messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": row["system"]})
    tools, problem = parse_tools(row.get("tools"))
    problems += [problem] if problem else []
    if not problems:
        problems = conversation_problems(messages, answer)
    if not problems and answer and all(m.get("train") is False for m in messages if m["role"] == "assistant"):
        problems = [
            Problem(
                what="the row has no trained token",
                found='"train": false on every assistant turn',
                fix="remove the row, or train one of its turns",
            )
        ]
    return (None if problems else Conversation(messages=tuple(messages), tools=tools)), problems


def parse_all(turns: list[Any], role_key: str = "role", content_key: str = "content") -> tuple[list[Any], list]:
    """(good messages, problems) of a list of turns."""
    messages, problems = [], []
    for number, raw in enumerate(turns, start=1):
        message, found = parse_message(raw, number, role_key, content_key)
        problems += found
        if message is not None:
            messages.append(message)
    return messages, problems


def _prompt_completion(row: Mapping[str, Any], answer: bool) -> Parsed:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        return _messages_answer(row, answer)
    problems = [p for p in (string_problem(row, "prompt"), answer and string_problem(row, "completion")) if p]
    if problems:
        return None, problems
    return prompt_answer(row.get("system"), row["prompt"], completion if answer else None, row["prompt"])


def _messages_answer(row: Mapping[str, Any], answer: bool) -> Parsed:
    """{"prompt": [messages], "completion": [messages]}: only the completion is trained."""
    completion = row.get("completion") if answer or isinstance(row.get("completion"), list) else []
    if not isinstance(row["prompt"], list) or not isinstance(completion, list):
        return None, [
            Problem(
                what="prompt and completion are of different kinds",
                found=f"prompt {type_name(row['prompt'])}, completion {type_name(row.get('completion'))}",
                allowed="two strings, or two lists of messages",
            )
        ]
    messages, problems = parse_all([*row["prompt"], *completion])
    tools, problem = parse_tools(row.get("tools"))
    problems += [problem] if problem else []
    problems = problems or conversation_problems(messages, answer=False)
    start = len(row["prompt"])
    if not problems and answer:
        problems = conversation_problems([{"role": "user"}, *messages[start:]], True, "the completion")
    if problems:
        return None, problems
    last = messages[-1] if len(messages) == start + 1 else None
    return Conversation(tuple(messages), tools, label=last["content"] if last else None, completion_from=start), []


def _alpaca(row: Mapping[str, Any], answer: bool) -> Parsed:
    problems = [p for p in (string_problem(row, "instruction"), answer and string_problem(row, "output")) if p]
    given = row.get("input") or ""
    if not isinstance(given, str):
        problems.append(Problem(what="`input` is not text", found=type_name(given), allowed="a string, or nothing"))
    if problems:
        return None, problems
    instruction = row["instruction"]
    prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
    whole = ALPACA_PROMPT_WITH_INPUT if given.strip() else ALPACA_PROMPT
    plain = whole.format(instruction=instruction, input=given)
    return prompt_answer(row.get("system"), prompt, row["output"] if answer else None, plain)


def string_problem(row: Mapping[str, Any], key: str) -> Problem | None:
    """What is wrong with a cell that has to hold text."""
    value = row.get(key)
    if not isinstance(value, str):
        return Problem(what=f"`{key}` is not text", found=type_name(value), allowed="a string")
    if not value.strip():
        return Problem(what=f"`{key}` is empty", found=repr(value[:20]), allowed="text", fix="remove the row")
    return text_problem(value, f"`{key}`")


def type_name(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")


READERS = {
    "text": _text,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}

KEYS = {
    "text": ("text",),
    "messages": ("messages", "tools", "system"),
    "sharegpt": ("conversations", "tools", "system"),
    "alpaca": ("instruction", "input", "output", "system"),
    "prompt_completion": ("prompt", "completion", "tools", "system"),
    "preference": ("prompt", "chosen", "rejected", "margin", "tools", "system"),
    "unpaired_preference": ("prompt", "completion", "label", "tools", "system"),
}
"""Columns that each format reads."""
