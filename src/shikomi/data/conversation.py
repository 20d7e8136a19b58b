"""What a row of any format becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shikomi.errors import Problem


@dataclass(frozen=True)
class Conversation:
    """A row, ready for the encoder.

    messages: dicts with role, content and where given tool_calls, name, train (False: not trained); tools:
    their descriptions; text: a plain text row, which has no messages; plain: (prompt, completion) strings
    of rows that can also be read without a chat template; label: the answer as one string; completion_from:
    index of the first message whose assistant turns may be trained.
    """

    messages: tuple[dict[str, Any], ...] = ()
    tools: list[Any] | None = None
    text: str | None = None
    plain: tuple[str, str] | None = None
    label: str | None = None
    completion_from: int = 0

    @property
    def identity(self) -> list[Any]:
        """What makes two rows copies of each other, as JSON data: they stay on one side of a split."""
        return [self.messages, self.tools, self.text]

    @property
    def question(self) -> list[Any]:
        """What the answer answers, as JSON data."""
        implicit = self.plain[0] if self.plain is not None and not self.messages else self.text
        return [self.messages[: self.completion_from], self.tools, implicit]


Parsed = tuple[Conversation | None, list[Problem]]
"""A row as a conversation, or None and what is wrong with it."""


def prompt_answer(system: Any, prompt: str, completion: str | None, plain_prompt: str) -> Parsed:
    """A prompt and its answer, readable as a conversation and as plain text."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    if isinstance(system, str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
        plain_prompt = f"{system}\n\n{plain_prompt}"
    start = len(messages)
    if completion is not None:
        messages.append({"role": "assistant", "content": completion})
    return Conversation(
        tuple(messages), plain=(plain_prompt, completion or ""), label=completion, completion_from=start
    ), []
