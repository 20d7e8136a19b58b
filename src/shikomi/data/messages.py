"""Messages of a conversation: one form for all dialects, and everything that can be wrong with them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from shikomi.data.template import RESERVED
from shikomi.errors import Problem, nearest

ROLES = ("system", "user", "assistant", "tool")

ROLE_ALIASES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Names of roles in ShareGPT files and older APIs."""

_OPTIONAL_TEXT = ("name", "tool_call_id", "reasoning_content", "thinking", "reasoning")

_UNUSABLE = re.compile(f"[\x00\ud800-\udfff{RESERVED}]")


def text_problem(text: str, name: str) -> Problem | None:
    """The problem of a text that cannot be encoded: NUL, half a surrogate pair, or a mark of our own."""
    found = _UNUSABLE.search(text)
    if found is None:
        return None
    what = {"\x00": "a NUL character", **dict.fromkeys(RESERVED, "a Unicode noncharacter")}.get(
        found.group(), "half of a surrogate pair"
    )
    return Problem(
        what=f"{name} holds {what}",
        found=f"U+{ord(found.group()):04X} at character {found.start() + 1}",
        allowed="Unicode text",
        fix="remove the character",
    )


def content_text(content: Any) -> str | None:
    """Content as one string; a list of text parts is joined. None if it is anything else."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [
            part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None for part in content
        ]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    return None


def parse_tool_calls(value: Any) -> tuple[list[dict[str, Any]] | None, Problem | None]:
    """OpenAI tool calls, arguments given as JSON text turned into an object."""
    calls = []
    for call in value if isinstance(value, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if call is None or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return None, Problem(
                what="tool_calls is not a list of calls",
                found=_short(value),
                allowed='[{"type": "function", "function": {"name": ..., "arguments": {...}}}]',
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                return None, Problem(
                    what=f"the arguments of tool call `{function['name']}` are not JSON: {error}",
                    found=_short(arguments),
                    allowed="an object, or an object as JSON text",
                )
        rest = {key: item for key, item in call.items() if key in ("id", "index") and item is not None}
        calls.append({"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}})
    return calls, None


def parse_tools(value: Any) -> tuple[list[Any] | None, Problem | None]:
    """The row's list of tools; JSON text of one is accepted, an empty list means none."""
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value) if value.strip() else None
        except ValueError:
            tools = value
    if tools is None or tools == []:
        return None, None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return None, Problem(
            what="`tools` is not a list of tool descriptions",
            found=_short(value),
            allowed='[{"type": "function", "function": {"name": ..., "parameters": {...}}}]',
        )
    return tools, None


def parse_message(
    raw: Any, turn: int, role_key: str = "role", content_key: str = "content"
) -> tuple[dict[str, Any] | None, list[Problem]]:
    """One message as {role, content, ...}, or what is wrong with it. `turn` counts from 1."""
    if not isinstance(raw, dict):
        return None, [
            Problem(
                what=f"turn {turn} is not a message",
                found=_short(raw),
                allowed=f'{{"{role_key}": ..., "{content_key}": ...}}',
            )
        ]
    problems: list[Problem] = []
    role, problem = _role(raw.get(role_key), turn, role_key)
    problems += [problem] if problem else []
    message: dict[str, Any] = {"role": role}
    if raw.get("tool_calls"):
        message["tool_calls"], problem = parse_tool_calls(raw["tool_calls"])
        problems += [problem] if problem else []
    content = content_text(raw.get(content_key))
    if content is None and not (raw.get(content_key) is None and "tool_calls" in message):
        problems.append(
            Problem(
                what=f"turn {turn} has no text under `{content_key}`",
                found=_short(raw.get(content_key)) if content_key in raw else f"keys {', '.join(map(str, raw))}",
                allowed="a string, or a list of text parts",
            )
        )
    message["content"] = content or ""
    if content is not None:
        problem = text_problem(content, f"turn {turn}")
        problems += [problem] if problem else []
        if not content.strip() and role != "tool" and "tool_calls" not in message:
            problems.append(
                Problem(
                    what=f"turn {turn} ({role}) is empty",
                    found=repr(content[:20]),
                    allowed="text",
                    fix="remove the turn or the row",
                )
            )
    for key in _OPTIONAL_TEXT:
        if isinstance(raw.get(key), str):
            message[key] = raw[key]
    train, problem = _train(raw, role, turn)
    problems += [problem] if problem else []
    if train is not None:
        message["train"] = train
    return (None if problems else message), problems


def conversation_problems(messages: Sequence[dict[str, Any]], answer: bool, what: str = "the row") -> list[Problem]:
    """What is wrong with a sequence of good messages. `answer`: an assistant turn is needed."""
    roles = [message["role"] for message in messages]
    if "assistant" in roles and "user" not in roles[: roles.index("assistant")]:
        return [
            Problem(
                what=f"{what} has an assistant turn before any user turn",
                found=f"turns {' '.join(roles)}",
                allowed="system (optional), then user, then assistant",
                fix="add the user's turn or remove the first answer",
            )
        ]
    if answer and "assistant" not in roles:
        return [
            Problem(
                what=f"{what} has no assistant turn",
                found=f"turns {' '.join(roles)}" if roles else "no turns",
                allowed="at least one assistant turn, which is what is trained",
                fix="add the answer or remove the row",
            )
        ]
    if not roles:
        return [Problem(what=f"{what} has no turns", found="an empty list", allowed="at least one message")]
    return []


def _role(value: Any, turn: int, role_key: str) -> tuple[str | None, Problem | None]:
    known = [*ROLES, *ROLE_ALIASES]
    if isinstance(value, str):
        name = value.strip().lower()
        if name in ROLES:
            return name, None
        if name in ROLE_ALIASES:
            return ROLE_ALIASES[name], None
    close = nearest(value, known) if isinstance(value, str) else None
    return None, Problem(
        what=f"turn {turn} has an unknown role" if value is not None else f"turn {turn} has no `{role_key}`",
        found=_short(value) if value is not None else None,
        allowed=", ".join(ROLES) + " (ShareGPT: human, gpt)",
        fix=f"did you mean `{close}`?" if close else None,
    )


def _train(raw: dict[str, Any], role: str | None, turn: int) -> tuple[bool | None, Problem | None]:
    value = raw.get("train")
    if value is None and raw.get("weight") in (0, 1):  # OpenAI's name for it
        value = bool(raw["weight"]) if role == "assistant" else None
    if value is None or (isinstance(value, bool) and (role in ("assistant", None) or not value)):
        return (value if role == "assistant" else None), None
    return None, Problem(
        what=f"turn {turn} has a wrong `train`",
        found=f"{_short(value)} on a {role} turn",
        allowed="true or false, and true only on assistant turns",
    )


def _short(value: Any, size: int = 60) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= size else text[: size - 3] + "..."
