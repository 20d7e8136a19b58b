"""Which rows are tokenised where there are very many: enough for the figures, and each that could be cut or refused."""

from __future__ import annotations

from typing import Any

from shikomi.data.conversation import Conversation
from shikomi.data.preferences import Judgement, Preference

FIRST_ROWS = 20_000
"""Rows from the beginning that are all tokenised."""

EVERY = 5
"""Of the others each so-manieth stands for so many."""

BYTES_PER_TOKEN = 2
"""Rows of this many bytes for each token of max_length, and more, may be too long: the tokens of their text are
counted, and those that come near max_length are tokenised as they are trained on."""

_TEMPLATE_BYTES = 256
"""What a chat template may add to them, and so as many tokens at most; tools are not counted so."""

MAYBE = -1
"""The weight of a row that may be too long."""


class OneInMany:
    """Weights of rows of which one in EVERY stands for all."""

    def __init__(self) -> None:
        self._count = 0

    def next(self) -> int:
        """The weight of the next row: EVERY or 0."""
        self._count += 1
        return EVERY if self._count % EVERY == EVERY // 2 else 0


class Settled:
    """Gives the weight of rows that were MAYBE, from the tokens of their text without a template."""

    def __init__(self, max_length: int | None) -> None:
        self._max_length, self._others = max_length, OneInMany()

    def weight(self, tokens: int) -> int:
        """1 for a row that comes near max_length."""
        if self._max_length is not None and tokens + _TEMPLATE_BYTES > self._max_length:
            return 1
        return self._others.next()


class Sample:
    """Gives each row its weight: how many rows it stands for, 0 where it is not tokenised.

    A template refuses a row for its roles, not for its words: until a row of the same roles was accepted, all are
    tokenised.
    """

    def __init__(self, max_length: int | None) -> None:
        self._max_length = max_length
        self._accepted: set[object] = set()
        self._others = OneInMany()
        self.rows = self.measured = 0

    def weight(self, record: Any) -> int:
        """The weight of the next row; MAYBE where `Settled` gives it."""
        self.rows += 1
        conversations = _conversations(record)
        if self.rows <= FIRST_ROWS or not all(_roles(conversation) in self._accepted for conversation in conversations):
            return 1
        if not self._may_be_long(conversations):
            return self._others.next()
        return 1 if any(conversation.tools for conversation in conversations) else MAYBE

    def accept(self, record: Any) -> None:
        """A row that was tokenised."""
        self._accepted.update(map(_roles, _conversations(record)))

    def note(self) -> str | None:
        """What to say where not every row was tokenised."""
        if self.measured >= self.rows:
            return None
        long = ", every row that is about as long as max_length or longer" if self._max_length is not None else ""
        return (
            f"tokens were counted in {self.measured:,} of {self.rows:,} rows: the first {FIRST_ROWS:,}{long}, "
            f"and one in {EVERY} of the others, which stands for {EVERY}"
        )

    def _may_be_long(self, conversations: tuple[Conversation, ...]) -> bool:
        if self._max_length is None:
            return False
        return max(map(_bytes, conversations)) >= BYTES_PER_TOKEN * self._max_length - _TEMPLATE_BYTES


def longest_text(record: Any) -> str:
    """All that is said in a row; of a preference with its longest answer."""
    return max(("\n".join(_texts(conversation)) for conversation in _conversations(record)), key=len)


def _conversations(record: Any) -> tuple[Conversation, ...]:
    return record.answers if isinstance(record, Preference | Judgement) else (record,)


def _roles(conversation: Conversation) -> object:
    turns = tuple((m["role"], m.get("train"), *sorted(m.keys() - {"content"})) for m in conversation.messages)
    tools = str(conversation.tools) if conversation.tools else ""
    return turns, tools, conversation.text is None, conversation.completion_from


def _texts(conversation: Conversation) -> list[str]:
    texts = [str(message.get("content") or "") for message in conversation.messages]
    return texts or [conversation.text or "", *(conversation.plain or ())]


def _bytes(conversation: Conversation) -> int:
    texts = _texts(conversation)
    return sum(len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in texts)
