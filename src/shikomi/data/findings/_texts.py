"""A good row as the texts that checks look at, whatever its format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from shikomi.data.columns import cell_text, column_templates, pair_templates
from shikomi.data.conversation import Conversation
from shikomi.data.preferences import Judgement, Preference, answer_of
from shikomi.data.scan import Item

if TYPE_CHECKING:
    from shikomi.recipe import DataSpec

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Texts:
    """The texts of a row.

    number: of the row among all rows of the check; role: train, validation or test; prompt: what comes before the
    answers, system message left out; answers: each assistant turn that is trained, of a pair chosen and rejected;
    own: all text that is the row's own (of column templates the cells alone); kind: what is learned from it.
    """

    number: int
    file: str
    line: int
    role: str
    kind: str
    prompt: str
    answers: tuple[str, ...]
    own: str

    @property
    def answer(self) -> str | None:
        """The only answer, or the chosen one of a pair; None for plain texts and conversations of several turns."""
        if self.kind == "pairs" or len(self.answers) == 1:
            return self.answers[0]
        return None

    @cached_property
    def normal_prompt(self) -> str:
        """The prompt without differences of white space."""
        return normal(self.prompt)

    @cached_property
    def words(self) -> list[str]:
        """The words of the row's own text, without case and punctuation."""
        return _WORD.findall(self.own.casefold())


class Reader:
    """Makes Texts of the good rows of one pass; `numbered` counts on over all passes of a check."""

    def __init__(self, spec: DataSpec, role: str, kind: str, number: int = 0) -> None:
        templates = pair_templates(spec) | column_templates(spec)
        names = [name for template in templates.values() if template.key != "margin" for name in template.columns]
        self._columns = tuple(dict.fromkeys(names))
        self._role, self._kind, self.number = role, kind, number

    def read(self, item: Item[Any]) -> Texts:
        """The texts of a row."""
        record = item.conversation
        answers: tuple[str, ...]
        if isinstance(record, Preference | Judgement):
            prompt = _prompt(record.answers[0])
            answers = tuple(_answer(answer) for answer in record.answers)
        else:
            prompt, answers = _prompt(record), _turns(record)
        if self._columns:
            own = "\n".join(cell_text(item.row.data.get(name)) for name in self._columns)
        elif isinstance(record, Conversation) and record.text is not None:
            own = record.text
        else:
            own = "\n".join((prompt, *answers))
        self.number += 1
        return Texts(self.number - 1, item.row.file, item.row.line, self._role, self._kind, prompt, answers, own)


def normal(text: str) -> str:
    """A text without differences of white space."""
    return " ".join(text.split())


def _contents(messages: Sequence[dict[str, Any]]) -> list[str]:
    return [str(message.get("content") or "") for message in messages]


def _prompt(conversation: Conversation) -> str:
    """Everything that is neither the system's nor trained: in a conversation without a completion, the user's turns."""
    messages = conversation.messages
    if conversation.completion_from:
        return "\n".join(_contents([m for m in messages[: conversation.completion_from] if m["role"] != "system"]))
    if messages:
        return "\n".join(_contents([m for m in messages if m["role"] not in ("system", "assistant")]))
    return conversation.plain[0] if conversation.plain is not None else ""


def _turns(conversation: Conversation) -> tuple[str, ...]:
    after = conversation.messages[conversation.completion_from :]
    if after:
        return tuple(_contents([m for m in after if m["role"] == "assistant" and m.get("train") is not False]))
    return (conversation.plain[1],) if conversation.plain is not None else ()


def _answer(conversation: Conversation) -> str:
    parts = answer_of(conversation)
    return "\n".join(str(part.get("content") or "") if isinstance(part, dict) else str(part) for part in parts)
