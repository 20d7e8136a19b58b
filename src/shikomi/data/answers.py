"""Answers to one prompt as tokens: where the prompt ends in the rendered text, and which answer tokens are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shikomi.data.pieces import Piece, TextTokenizer
from shikomi.data.render import Encoded, Rendered, cut_pieces, join_pieces
from shikomi.data.turns import Layout
from shikomi.errors import BadInput, Problem

ANSWERS_VERSION = 1
"""Part of the cache key of preferences: raise it when the same answers would be encoded differently."""


@dataclass(frozen=True, eq=False)
class Answers:
    """prompt (P,) int32, and each answer's own tokens with their mask; prompt + answer is the template's rendering.

    An answer's `cut` and `targets_cut` say what `max_length` took from its end. `merges`: answers whose first
    characters the tokenizer would have joined with the end of the prompt.
    """

    prompt: np.ndarray
    answers: tuple[Encoded, ...]
    merges: int = 0

    def __len__(self) -> int:
        """Tokens, the prompt once."""
        return len(self.prompt) + sum(len(answer.ids) for answer in self.answers)


@dataclass(frozen=True)
class RenderedAnswer:
    """A conversation in two parts, before tokenisation: the pieces of its prompt and those of the answer.

    everything: every token of the answer is trained; prefix and suffix: ids that stand for no text, the suffix is
    trained with the answer's last turn.
    """

    prompt: tuple[Piece, ...]
    answer: tuple[Piece, ...]
    everything: bool = False
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    @property
    def prompt_text(self) -> str:
        return "".join(piece.text for piece in self.prompt)


def split_answer(
    layout: Layout, first: int, wanted: set[int], marked: bool, everything: bool, suffix: tuple[int, ...]
) -> RenderedAnswer:
    """Cut a rendered conversation where message `first`, the answer's first turn, begins; train the turns `wanted`."""
    # A template that is not prefix-stable has no start there; its marked generation part begins the answer.
    border = layout.starts.get(first, layout.answers[0].start if layout.answers else len(layout.text))
    kept = tuple(answer for answer in layout.answers if answer.index in wanted or answer.index < 0)
    shown = Layout(layout.text, kept, tuple(sorted({*layout.cuts, border})))
    pieces, at, count = cut_pieces(shown, marked), 0, 0
    while at < border:
        at += len(pieces[count].text)
        count += 1
    return RenderedAnswer(pieces[:count], pieces[count:], everything, suffix=suffix)


def check_one_prompt(rendered: Sequence[RenderedAnswer], template: str) -> None:
    """Raises BadInput when the answers of a row do not come after the same text."""
    texts = [answer.prompt_text for answer in rendered]
    for text in texts[1:]:
        if text != texts[0]:
            at = next((k for k, (a, b) in enumerate(zip(text, texts[0], strict=False)) if a != b), len(text))
            raise BadInput(
                [
                    Problem(
                        what=f"{template} writes the prompt differently before the chosen and the rejected answer",
                        found=f"{texts[0][at : at + 30]!r} and {text[at : at + 30]!r}",
                        allowed="a template in which the prompt does not depend on the answer",
                        fix="give another chat_template",
                    )
                ]
            )


def answer_pieces(row: Sequence[RenderedAnswer]) -> list[Piece]:
    """The pieces of a row, in the order in which `join_answers` takes them: the prompt once, then the answers."""
    return [*row[0].prompt, *(piece for answer in row for piece in answer.answer)]


def join_answers(
    row: Sequence[RenderedAnswer],
    encoded: Iterator[tuple[np.ndarray, np.ndarray]],
    tokens: TextTokenizer,
    max_length: int | None,
) -> Answers:
    """Put the tokenised pieces of a row together; each answer is cut to what the prompt leaves of `max_length`."""
    before = Rendered(row[0].prompt, row[0].prefix)
    prompt = join_pieces(before, [next(encoded) for _ in before.pieces], False, None).ids
    room = None if max_length is None else max(0, max_length - len(prompt))
    answers, merges = [], 0
    for answer in row:
        parts = [next(encoded) for _ in answer.answer]
        merges += bool(answer.answer) and tokens.joins(row[0].prompt[-1], answer.answer[0])
        answers.append(_answer(answer, parts, room))
    return Answers(prompt, tuple(answers), merges)


def _answer(answer: RenderedAnswer, parts: Sequence[tuple[np.ndarray, np.ndarray]], room: int | None) -> Encoded:
    """The tokens of one answer: unlike those of a whole row, its first one can be a target."""
    suffix = np.asarray(answer.suffix, np.int32)
    last_is_trained = answer.everything or any(piece.trained for piece in answer.answer[-1:])
    ids = np.concatenate([*(ids for ids, _ in parts), suffix]).astype(np.int32)
    mask = np.concatenate([*(mask for _, mask in parts), np.full(len(suffix), last_is_trained)]).astype(bool)
    if answer.everything:
        mask[:] = True
    kept = len(ids) if room is None else min(len(ids), room)
    return Encoded(
        ids[:kept],
        mask[:kept],
        cut=len(ids) - kept,
        targets_cut=int(np.count_nonzero(mask[kept:])),
        special_text=any(piece.marked for piece in (*answer.prompt, *answer.answer)),
    )
