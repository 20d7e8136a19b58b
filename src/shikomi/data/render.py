"""A row before and after tokenisation: pieces of text, then token ids with the mask of what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shikomi.data.pieces import Piece
from shikomi.data.turns import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Encoded:
    """ids (S,) int32; mask (S,) bool: True where the token is a trained target; cut: tokens lost to
    max_length.

    `targets_cut` counts the trained targets among those lost. `special_text`: the row holds special-token
    strings, which were encoded as ordinary text.
    """

    ids: np.ndarray
    mask: np.ndarray
    cut: int = 0
    targets_cut: int = 0
    special_text: bool = False


@dataclass(frozen=True)
class Rendered:
    """A row before tokenisation: pieces between token ids that stand for no text; the suffix is trained."""

    pieces: tuple[Piece, ...]
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()


def cut_pieces(layout: Layout, marked: bool) -> tuple[Piece, ...]:
    """The text in pieces, one beginning at each cut."""
    trained = {answer.start: answer.end - answer.start for answer in layout.answers}
    bounds = sorted({0, *layout.cuts, len(layout.text)})
    return tuple(
        Piece(layout.text[a:b], trained.get(a, 0), starts_text=a == 0, marked=marked)
        for a, b in zip(bounds, bounds[1:], strict=False)
    )


def join_pieces(
    rendered: Rendered,
    encoded: Sequence[tuple[np.ndarray, np.ndarray]],
    everything: bool,
    max_length: int | None,
) -> Encoded:
    """Put the pieces of a row together, without a target at token 0, and cut it to `max_length`."""
    prefix, suffix = np.asarray(rendered.prefix, np.int32), np.asarray(rendered.suffix, np.int32)
    ids = np.concatenate([prefix, *(e[0] for e in encoded), suffix])
    mask = np.concatenate([np.zeros(len(prefix), bool), *(e[1] for e in encoded), np.ones(len(suffix), bool)])
    if everything:
        mask[:] = True
    mask[:1] = False
    kept = len(ids) if max_length is None else min(len(ids), max_length)
    return Encoded(
        ids[:kept],
        mask[:kept],
        cut=len(ids) - kept,
        targets_cut=int(np.count_nonzero(mask[kept:])),
        special_text=any(piece.marked for piece in rendered.pieces),
    )


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before a text (a beginning-of-text token, or nothing)."""
    bare, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()
