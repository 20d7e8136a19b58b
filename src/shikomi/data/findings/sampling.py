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
"""Rows of this many bytes for each token of max_length, and more, may be too long: they are all tokenised."""

_TEMPLATE_BYTES = 256
"""What a chat template may add to them."""


class Sample:
    """Gives each row its weight: how many rows it stands for, 0 where it is not tokenised.

    A template refuses a row for its roles, not for its words: until a row of the same roles was accepted, all are
    tokenised.
    """

    def __init__(self, max_length: int | None) -> None:
        self._limit = None if max_length is None else BYTES_PER_TOKEN * max_length - _TEMPLATE_BYTES
        self._accepted: set[object] = set()
        self._others = 0
        self.rows = self.measured = 0

    def weight(self, record: Any) -> int:
        """The weight of the next row."""
        self.rows += 1
        conversations = _conversations(record)
        weight = 1
        known = all(_roles(conversation) in self._accepted for conversation in conversations)
        if self.rows > FIRST_ROWS and known and not self._may_be_long(conversations):
            self._others += 1
            weight = EVERY if self._others % EVERY == EVERY // 2 else 0
        self.measured += weight > 0
        return weight

    def accept(self, record: Any) -> None:
        """A row that was tokenised."""
        self._accepted.update(map(_roles, _conversations(record)))

    def note(self) -> str | None:
        """What to say where not every row was tokenised."""
        if self.measured == self.rows:
            return None
        long = f", every row of {self._limit:,} bytes and more" if self._limit is not None else ""
        return (
            f"tokens were counted in {self.measured:,} of {self.rows:,} rows: the first {FIRST_ROWS:,}{long}, "
            f"and one in {EVERY} of the others, which stands for {EVERY}"
        )

    def _may_be_long(self, conversations: tuple[Conversation, ...]) -> bool:
        return self._limit is not None and max(map(_bytes, conversations)) >= self._limit


def _conversations(record: Any) -> tuple[Conversation, ...]:
    return record.answers if isinstance(record, Preference | Judgement) else (record,)


def _roles(conversation: Conversation) -> object:
    turns = tuple((m["role"], m.get("train"), *sorted(m.keys() - {"content"})) for m in conversation.messages)
    tools = str(conversation.tools) if conversation.tools else ""
    return turns, tools, conversation.text is None, conversation.completion_from


def _bytes(conversation: Conversation) -> int:
    texts = [str(message.get("content") or "") for message in conversation.messages]
    texts = texts or [conversation.text or "", *(conversation.plain or ())]
    return sum(len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in texts)
