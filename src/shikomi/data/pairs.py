"""Preferences as tokens, and their packing: [prompt][chosen][rejected], the prompt computed once for both answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from shikomi.data.packing import Packed, pack_scored_tree


@dataclass(frozen=True, eq=False)
class Completion:
    """An answer's own tokens: ids (C,) int32; mask (C,) bool, True where the token is scored."""

    ids: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_targets(self) -> int:
        """Scored tokens."""
        return int(np.count_nonzero(self.mask))


@dataclass(frozen=True, eq=False)
class Pair:
    """Two answers to one prompt: prompt (P,) int32, `margin` how much better chosen is, `row` of the data."""

    prompt: np.ndarray
    chosen: Completion
    rejected: Completion
    margin: float = 0.0
    row: int = 0

    def __len__(self) -> int:
        """Tokens, the prompt once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def completions(self) -> tuple[Completion, ...]:
        """Both answers, in the order of their segment numbers."""
        return (self.chosen, self.rejected)


@dataclass(frozen=True, eq=False)
class Thumb:
    """One judged answer to a prompt: prompt (P,) int32; `row` of the data."""

    prompt: np.ndarray
    completion: Completion
    desirable: bool
    row: int = 0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)

    @property
    def completions(self) -> tuple[Completion, ...]:
        """The one answer."""
        return (self.completion,)


@dataclass(frozen=True, eq=False)
class PackedPreferences:
    """A micro-batch of preferences.

    packed: its row of tokens, whose segment numbers are those of S completions, then, where they are scored, those of
    the prompts; `packed.rows` has the data row of each completion. chosen, rejected: numbers of the completions on
    each side (of judged answers: desirable, and not), in the order of the data; margin: of each pair; lengths: scored
    tokens of each completion; ends: row of `packed` that holds each completion's last token (there a reward model
    reads its value); prompt_tokens: scored tokens of prompts, which come last in `packed.scored`.
    """

    packed: Packed
    chosen: list[int]
    rejected: list[int]
    margin: list[float]
    lengths: list[int]
    ends: list[int]
    prompt_tokens: int = 0

    def to(self, device: torch.device | str) -> PackedPreferences:
        """The same micro-batch with its tokens on `device`."""
        return replace(self, packed=self.packed.to(device))


def unshared_length(example: Pair | Thumb) -> int:
    """Tokens that are computed without a shared prefix: the prompt once for every answer."""
    return len(example) + len(example.prompt) * (len(example.completions) - 1)


def pack_pairs(pairs: Sequence[Pair], share_prefix: bool = True, score_prompts: bool = False) -> PackedPreferences:
    """Pack pairs; of pair i, completion 2 i is the chosen one and 2 i + 1 the rejected one.

    With `share_prefix` both answers are children of one prompt segment, and prompts that begin alike share that
    beginning. `score_prompts`: each pair's prompt is scored too (once), but for its first token. Raises ValueError for
    an empty list, prompt or answer.
    """
    packed, lengths, ends = _pack(pairs, share_prefix, score_prompts)
    count = len(pairs)
    return PackedPreferences(
        packed,
        chosen=list(range(0, 2 * count, 2)),
        rejected=list(range(1, 2 * count, 2)),
        margin=[pair.margin for pair in pairs],
        lengths=lengths,
        ends=ends,
        prompt_tokens=sum(len(pair.prompt) - 1 for pair in pairs) if score_prompts else 0,
    )


def pack_thumbs(thumbs: Sequence[Thumb], share_prefix: bool = True) -> PackedPreferences:
    """Pack judged answers; completion i is that of `thumbs[i]`. Answers to one prompt share it with `share_prefix`.

    Raises ValueError for an empty list, prompt or answer.
    """
    packed, lengths, ends = _pack(thumbs, share_prefix, False)
    return PackedPreferences(
        packed,
        chosen=[i for i, thumb in enumerate(thumbs) if thumb.desirable],
        rejected=[i for i, thumb in enumerate(thumbs) if not thumb.desirable],
        margin=[],
        lengths=lengths,
        ends=ends,
    )


def mismatched(thumbs: Sequence[Thumb], max_length: int | None = None) -> list[Thumb]:
    """Each prompt with the answer of the example before it, the first with the last one's: (x_i, y_(i-1)).

    These stand for samples of the policy in KTO's baseline (arXiv:2402.01306, section 4.1; TRL's rotation), over the
    whole optimizer step. An answer is cut to what `max_length` leaves after its new prompt; nothing for fewer than two.
    """
    if len(thumbs) < 2:
        return []
    out = []
    for at, thumb in enumerate(thumbs):
        other = thumbs[at - 1].completion
        room = len(other) if max_length is None else max(1, max_length - len(thumb.prompt))
        out.append(replace(thumb, completion=Completion(other.ids[:room], other.mask[:room])))
    return out


def _pack(
    examples: Sequence[Pair] | Sequence[Thumb], share_prefix: bool, score_prompts: bool
) -> tuple[Packed, list[int], list[int]]:
    """(packed, scored tokens of each completion, row of each completion's last token)."""
    owned = [example.completions for example in examples]
    prompts = [example.prompt for example in examples]
    scored_prompts = list(range(len(prompts))) if score_prompts else []
    if not share_prefix:  # each answer gets a prompt of its own
        prompts = [example.prompt for example in examples for _ in example.completions]
        firsts = np.cumsum([0, *map(len, owned[:-1])])
        scored_prompts = [int(firsts[i]) for i in scored_prompts]
        owned = [(completion,) for several in owned for completion in several]
    packed, segments = pack_scored_tree(
        prompts,
        [[completion.ids for completion in several] for several in owned],
        [[np.flatnonzero(completion.mask) for completion in several] for several in owned],
        share_prefix,
        scored_prompts,
    )
    offsets = packed.offsets
    ends = [offsets[segment] + packed.lengths[segment] - 1 for segment in segments]
    rows = [example.row for example in examples for _ in example.completions]
    lengths = [completion.n_targets for several in owned for completion in several]
    return replace(packed, rows=rows), lengths, ends
