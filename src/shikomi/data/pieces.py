"""Text to token ids with offsets: text cut into pieces, and special-token strings of users kept as ordinary
text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from shikomi.data.template import NAME_END, NAME_START, USER_MARK
from shikomi.errors import BadInput, Problem

_ANCHORS = ("\n", "a", "0", ".")

_WINDOW = 64
"""Characters on each side of a border that are looked at."""


@dataclass(frozen=True)
class Piece:
    """A run of text that is tokenised on its own.

    The first `trained` characters are trained. `starts_text` says whether it begins the row. `marked` says
    that it holds special-token strings of the user's, each behind a USER_MARK.
    """

    text: str
    trained: int = 0
    starts_text: bool = False
    marked: bool = False


class TextTokenizer:
    """Tokenises pieces with a fast tokenizer; what only looks like a special token stays text."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        # a limit saved in tokenizer.json would cut rows in silence
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self.special: dict[str, int] = {t.content: i for i, t in sorted(added.items()) if t.special and t.content}
        longest_first = sorted(self.special, key=len, reverse=True)
        alternatives = "|".join(map(re.escape, longest_first)) or "(?!)"  # (?!) never matches
        self._any_special = re.compile(alternatives)
        self._special_starts = re.compile(f"(?={alternatives})")
        self._template_special = re.compile(f"(?<!{USER_MARK})(?:{alternatives})")
        self._special_run = re.compile(f"(?<!{USER_MARK})(?:{alternatives})+")
        glued = self._ids("\nword") == self._ids("\n") + self._ids("word")
        self._needs_anchor = not glued

    def _ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def mark(self, value: Any) -> Any:
        """The value with a USER_MARK before every special-token string in it, at any depth (not in keys)."""
        if isinstance(value, str):
            return self._special_starts.sub(USER_MARK, value) if self._any_special.search(value) else value
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def first_special(self, text: str) -> str | None:
        """The first special token in rendered text that the template itself wrote."""
        found = self._template_special.search(text)
        return found.group() if found else None

    def special_run(self, text: str) -> str | None:
        """The first special token that the template wrote, with those that follow it directly."""
        found = self._special_run.search(text)
        return found.group() if found else None

    def last_special(self, text: str) -> int | None:
        """The id of the last special token in a text, or None."""
        found = self._any_special.findall(text)
        return self.special[found[-1]] if found else None

    def encode(self, pieces: Sequence[Piece]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids (S,) int32, trained (S,) bool) of each piece, tokenised in one batch."""
        plain = [k for k, piece in enumerate(pieces) if not piece.marked]
        marked = [k for k, piece in enumerate(pieces) if piece.marked]
        out: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.int32), np.zeros(0, bool))] * len(pieces)
        if plain:
            for k, ids in zip(plain, self._batch(self.backend, [pieces[k] for k in plain]), strict=True):
                out[k] = ids
        if marked:
            unmarked = [self._unmark(pieces[k]) for k in marked]
            for k, ids in zip(marked, self._batch(self._renamed, unmarked), strict=True):
                out[k] = ids
        return out

    def _batch(self, backend: Tokenizer, pieces: list[Piece]) -> list[tuple[np.ndarray, np.ndarray]]:
        if self._needs_anchor:
            return [self._anchored(backend, piece) for piece in pieces]
        trained = [piece.text for piece in pieces if piece.trained]
        others = [piece.text for piece in pieces if not piece.trained]
        placed = iter(backend.encode_batch(trained, add_special_tokens=False))
        bare = iter(backend.encode_batch_fast(others, add_special_tokens=False))  # without offsets
        return [_masked(next(placed), piece.trained) if piece.trained else _masked(next(bare)) for piece in pieces]

    def _anchored(self, backend: Tokenizer, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        """For tokenizers that put a space before a text: a piece from the middle is encoded after some
        other text, whose tokens are removed again.
        """
        if piece.starts_text or not piece.text:
            e = backend.encode(piece.text, add_special_tokens=False)
            return _masked(e, piece.trained)
        for anchor in _ANCHORS:
            lead = self._ids(anchor)
            e = backend.encode(anchor + piece.text, add_special_tokens=False)
            if e.ids[: len(lead)] == lead:
                ids = np.asarray(e.ids[len(lead) :], np.int32)
                return ids, _before(e.offsets[len(lead) :], piece.trained + len(anchor))
        raise BadInput(
            [Problem(what="the tokenizer does not encode this turn apart from the one before", found=piece.text[:40])]
        )

    def joins(self, before: Piece, after: Piece) -> bool:
        """Whether the two texts, tokenised as one, have a token that lies in both."""
        if before.marked or after.marked or not before.text or not after.text:
            return False
        left, right = before.text[-_WINDOW:], after.text[:_WINDOW]
        offsets = self.backend.encode(left + right, add_special_tokens=False).offsets
        return any(start < len(left) < end for start, end in offsets)

    def _unmark(self, piece: Piece) -> Piece:
        """Rename the template's special tokens to what `_renamed` calls them, and drop the marks."""

        def rename(text: str) -> str:
            named = self._template_special.sub(lambda m: _alias(self.special[m.group()]), text)
            return named.replace(USER_MARK, "")

        trained = rename(piece.text[: piece.trained])
        return Piece(trained + rename(piece.text[piece.trained :]), trained=len(trained), starts_text=piece.starts_text)

    @cached_property
    def _renamed(self) -> Tokenizer:
        """The same tokenizer, but with names for its special tokens that no text holds."""
        settings = json.loads(self.backend.to_str())
        names = {content: _alias(number) for content, number in self.special.items()}
        for token in settings["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = settings["model"]
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {names.get(token, token): number for token, number in vocab.items()}
        else:
            model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
        unknown = model.get("unk_id") if model.get("unk_token") is None else self.special.get(model["unk_token"])
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        settings["post_processor"] = None
        renamed = Tokenizer.from_str(json.dumps(settings))
        for content, number in self.special.items():
            as_text = renamed.encode(content, add_special_tokens=False).ids
            if renamed.token_to_id(names[content]) != number or (number in as_text and number != unknown):
                raise BadInput(f"this tokenizer cannot encode the text {content!r} without its special token")
        return renamed


def _alias(number: int) -> str:
    return f"{NAME_START}{number}{NAME_END}"


def _masked(encoding: Encoding, trained: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Its ids, and which of them start before character `trained`."""
    mask = _before(encoding.offsets, trained) if trained else np.zeros(len(encoding), bool)
    return np.asarray(encoding.ids, np.int32), mask


def _before(offsets: list[tuple[int, int]], end: int) -> np.ndarray:
    """Which tokens start before character `end`."""
    if not end:
        return np.zeros(len(offsets), bool)
    return np.fromiter((start for start, _ in offsets), np.int64, len(offsets)) < end
