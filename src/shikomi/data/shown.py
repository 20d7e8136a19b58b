"""Tokens as a reader sees them: the text that each stands for, and whether it is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALF = "\ufffd"
"""What a decoder writes for bytes that are no whole character."""

LONGEST_CHARACTER = 8
"""Tokens that are waited for until they make a whole character."""


@dataclass(frozen=True)
class Span:
    """The fewest tokens that are whole characters: their text, their ids, and whether they are trained targets."""

    text: str
    ids: tuple[int, ...]
    trained: bool


def spans(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], mask: Sequence[bool], before: Sequence[int] = ()
) -> list[Span]:
    """The tokens with their texts, which join to the text of all of them; `before` are the tokens in front.

    Decoders look at the token before: some drop the space of a first one. So each text is what it adds to its
    neighbour's. Where the mask changes inside a character, its halves are shown as U+FFFD.
    """
    found: list[Span] = []
    waiting: list[int] = []
    context = list(before[-LONGEST_CHARACTER:])
    for at, (token, trained) in enumerate(zip(ids, mask, strict=True)):
        waiting.append(int(token))
        text = _added(tokenizer, context, waiting)
        ends = at + 1 == len(ids) or bool(mask[at + 1]) != bool(trained)
        if ends or not text.endswith(HALF) or len(waiting) == LONGEST_CHARACTER:
            found.append(Span(text, tuple(waiting), bool(trained)))
            context = [] if text.endswith(HALF) else waiting
            waiting = []
    return found


def _added(tokenizer: PreTrainedTokenizerBase, context: list[int], tokens: list[int]) -> str:
    """What `tokens` add to the text of `context`."""
    known, both = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (context, context + tokens))
    assert isinstance(known, str) and isinstance(both, str)
    return both[len(known) :] if both.startswith(known) else tokenizer.decode(tokens)  # type: ignore[return-value]


def brackets(shown: Iterable[Span]) -> str:
    """Tokens as text, what is trained between double brackets."""
    runs = ((trained, "".join(span.text for span in run)) for trained, run in groupby(shown, lambda s: s.trained))
    return "".join(f"[[{text}]]" if trained else text for trained, text in runs)
