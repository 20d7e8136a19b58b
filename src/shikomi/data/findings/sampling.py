"""Which rows are tokenised where there are very many: enough for the figures, and each that could be cut or refused."""

from __future__ import annotations

from typing import Any

from shikomi.data.conversation import Conversation
from shikomi.data.preferences import Judgement, Preference

FIRST_ROWS = 5_000
"""Rows from the beginning that are all tokenised."""

EVERY = 10
"""Of the others each so-manieth stands for so many."""

BYTES_PER_TOKEN = 2.0
"""Rows of this many bytes for each token of max_length, and more, may be too long: they are all tokenised. It is three
quarters of the fewest that were seen, once `FEWEST_LONG` rows of as many bytes as max_length has tokens were."""

FEWEST_LONG = 200
_MARGIN = 0.75

_TEMPLATE_BYTES = 256
"""What a chat template may add to them."""


class Sample:
    """Gives each row its weight: how many rows it stands for, 0 where it is not tokenised.

    A template refuses a row for its roles, not for its words: until a row of the same roles was accepted, all are
    tokenised.
    """

    def __init__(self, max_length: int | None) -> None:
        self._max_length = max_length
        self._fewest, self._long = float("inf"), 0  # bytes a token of long rows, and how many those are
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

    def accept(self, record: Any, tokens: int) -> None:
        """A row that was tokenised, and came to so many."""
        conversations = _conversations(record)
        self._accepted.update(map(_roles, conversations))
        size = max(map(_bytes, conversations))
        if self._max_length is not None and size >= self._max_length:
            self._long += 1
            self._fewest = min(self._fewest, size / tokens)

    def note(self) -> str | None:
        """What to say where not every row was tokenised."""
        if self.measured == self.rows:
            return None
        long = ", every row that may be longer than max_length" if self._max_length is not None else ""
        return (
            f"tokens were counted in {self.measured:,} of {self.rows:,} rows: the first {FIRST_ROWS:,}{long}, "
            f"and one in {EVERY} of the others, which stands for {EVERY}"
        )

    def _may_be_long(self, conversations: tuple[Conversation, ...]) -> bool:
        if self._max_length is None:
            return False
        each = _MARGIN * self._fewest if self._long >= FEWEST_LONG else BYTES_PER_TOKEN
        return max(map(_bytes, conversations)) >= each * self._max_length - _TEMPLATE_BYTES


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
