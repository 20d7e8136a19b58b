"""Constrained decoding over a label set: the answer is the label whose tokens are the most probable.

A label's score is the summed log-probability of all its tokens, its end of turn included. So "lib" is not favoured
over "libdevel": as an answer it must also stop where it stops. Base and trained model, zero-shot and few-shot, go
through the same code.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from shikomi.data.packing import MIN_SHARED_PREFIX, Packed, pack_tree
from shikomi.model.language_model import LanguageModel
from shikomi.progress import Progress, Silent

MICRO_BATCH_TOKENS = 4096
"""Twice the training default: without gradients nothing is kept, and a larger row repeats shared examples less."""


def score_labels(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
    progress: Progress | None = None,
    what: str = "scoring labels",
) -> np.ndarray:
    """Summed log-probability (n, L) float64, in nats, of every label after every prompt.

    Labels are tokens with their end of turn. A prompt is computed once for all labels, and a beginning that prompts
    have in common (instructions, few-shot examples) once for all prompts of a micro-batch.
    Raises ValueError where one label is the beginning of another or the same: then they are no alternatives.
    """
    _check_proper(labels)
    progress = progress or Silent()
    scores = np.empty((len(prompts), len(labels)))
    parts = list(_label_parts(labels, micro_batch_tokens // 2))
    done, total = 0, len(prompts) * len(parts)
    progress.tick(done, total, what)
    for numbers in parts:
        some = [labels[j] for j in numbers]
        for rows in prompt_groups(prompts, sum(map(len, some)), micro_batch_tokens):
            packed = without_last_tokens(pack_tree([prompts[i] for i in rows], [some] * len(rows)))
            with torch.no_grad():
                scored = model.score(packed)
            sums = np.bincount(
                scored.segment.cpu().numpy(),
                weights=scored.logp.double().cpu().numpy(),
                minlength=len(rows) * len(some),
            )
            scores[np.ix_(rows, numbers)] = sums.reshape(len(rows), len(some))
            done += len(rows)
            progress.tick(done, total, what)
    return scores


def _check_proper(labels: Sequence[Sequence[int]]) -> None:
    # In sorted order a sequence is next to the shortest of those that it begins.
    for first, second in pairwise(sorted(tuple(label) for label in labels)):
        if second[: len(first)] == first:
            raise ValueError(f"label tokens {first} begin {second}: labels must end with an end of turn")


def _label_parts(labels: Sequence[Sequence[int]], tokens: int) -> Iterator[list[int]]:
    """Numbers of labels in parts of at most `tokens` tokens: nearly always one part."""
    part: list[int] = []
    size = 0
    for number, label in enumerate(labels):
        if part and size + len(label) > tokens:
            yield part
            part, size = [], 0
        part.append(number)
        size += len(label)
    yield part


def prompt_groups(
    prompts: Sequence[Sequence[int]], completion_tokens: int, micro_batch_tokens: int
) -> Iterator[list[int]]:
    """Rows whose prompts, each with `completion_tokens` after it, fit a micro-batch; every row in one group.

    Sorted prompts bring those with the same beginning together, so that pack_tree can compute it once.
    """
    group: list[int] = []
    tokens = 0  # of the prompts and completions, as if nothing were shared
    for row in sorted(range(len(prompts)), key=lambda i: tuple(prompts[i])):
        size = len(prompts[row]) + completion_tokens
        if group:
            # The common beginning of a sorted group is that of its ends.
            shared = _common(prompts[group[0]], prompts[row])
            saved = len(group) * shared if shared >= MIN_SHARED_PREFIX else 0
            if tokens + size - saved > micro_batch_tokens:
                yield group
                group, tokens = [], 0
        group.append(row)
        tokens += size
    if group:
        yield group


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two prompts share at the start, leaving each at least one of its own."""
    most = min(len(a), len(b)) - 1
    return next((k for k in range(most) if a[k] != b[k]), most)


def without_last_tokens(packed: Packed) -> Packed:
    """The same micro-batch without the rows from which nothing is predicted: the last token of every completion."""
    parents = set(packed.parents)
    ends = [start + length - 1 for start, length in zip(packed.offsets, packed.lengths, strict=True)]
    used = set(packed.scored.tolist())
    dropped = {i for i, end in enumerate(ends) if i not in parents and end not in used}
    keep = torch.ones(len(packed.ids), dtype=torch.bool)
    keep[[ends[i] for i in sorted(dropped)]] = False
    lengths = [length - (i in dropped) for i, length in enumerate(packed.lengths)]
    kept = [i for i, length in enumerate(lengths) if length]
    number = {-1: -1} | {old: new for new, old in enumerate(kept)}
    return replace(
        packed,
        ids=packed.ids[keep],
        positions=packed.positions[keep],
        lengths=[lengths[i] for i in kept],
        parents=[number[packed.parents[i]] for i in kept],
        scored=(keep.cumsum(0) - 1)[packed.scored],
    )
