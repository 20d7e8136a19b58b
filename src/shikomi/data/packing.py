"""Packing: examples become one row of tokens without padding, with shared prefixes computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

MIN_SHARED_PREFIX = 16
"""Tokens. A shorter common prefix costs more in bookkeeping than it saves."""


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised row: ids (S,) int32, mask (S,) bool (True: this token is a trained target), its data
    row number.
    """

    ids: np.ndarray
    mask: np.ndarray
    row: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_targets(self) -> int:
        """Trained target tokens of this example."""
        return int(np.count_nonzero(self.mask))


@dataclass(frozen=True, eq=False)
class Packed:
    """A micro-batch as one row of T tokens made of segments, each of which sees itself and its ancestors.

    ids (T,) int64; positions (T,) int64, a child's continue its parent's; lengths: tokens owned by each
    segment, in row order; parents: -1 or the index of an earlier segment whose tokens, after those of its
    own ancestors, come before this segment's; scored (N,) int64: rows of the hidden states that predict;
    targets (N,) int64: the token each of them predicts; segment (N,) int64, ascending: number of the
    example (for `pack_tree`: of the completion) the target belongs to; rows: the data row of each example;
    n_tokens: sum of the examples' lengths, a shared prefix counted once per example. Several targets may
    share one scored row: the first token of each child is predicted by the last row of the parent.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]
    parents: list[int]
    scored: torch.Tensor
    targets: torch.Tensor
    segment: torch.Tensor
    rows: list[int]
    n_tokens: int

    @property
    def offsets(self) -> list[int]:
        """First row of each segment."""
        starts, at = [], 0
        for length in self.lengths:
            starts.append(at)
            at += length
        return starts

    def to(self, device: torch.device | str) -> Packed:
        """The same micro-batch with its tensors on `device` (without waiting for the copy on CUDA)."""
        target = torch.device(device)
        pin = target.type == "cuda"

        def move(tensor: torch.Tensor) -> torch.Tensor:
            source = tensor.pin_memory() if pin and tensor.device.type == "cpu" else tensor
            return source.to(target, non_blocking=pin)

        return replace(
            self,
            ids=move(self.ids),
            positions=move(self.positions),
            scored=move(self.scored),
            targets=move(self.targets),
            segment=move(self.segment),
        )


def with_root(packed: Packed, n: int) -> Packed:
    """The same micro-batch with one segment of n tokens (ids 0) in front, the parent of all that had none."""
    device = packed.positions.device
    return replace(
        packed,
        ids=torch.cat([packed.ids.new_zeros(n), packed.ids]),
        positions=torch.cat([torch.arange(n, device=device), packed.positions + n]),
        lengths=[n, *packed.lengths],
        parents=[-1, *(parent + 1 for parent in packed.parents)],
        scored=packed.scored + n,
    )


class _Row:
    """The growing row of a micro-batch: segments in row order, scored pairs per example."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.parents: list[int] = []
        self.offsets: list[int] = []
        self.ends: list[int] = []  # position after the last token of each segment, ancestors included
        self.size = 0
        self.pairs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, ids: np.ndarray, parent: int = -1) -> int:
        """Append a segment; its number is returned."""
        start = self.ends[parent] if parent >= 0 else 0
        self.ids.append(ids)
        self.positions.append(np.arange(start, start + len(ids)))
        self.lengths.append(len(ids))
        self.parents.append(parent)
        self.offsets.append(self.size)
        self.ends.append(start + len(ids))
        self.size += len(ids)
        return len(self.lengths) - 1

    def score(self, number: int, segment: int, own_targets: np.ndarray) -> None:
        """Score the tokens at `own_targets` (indices into the segment's own tokens) for example `number`."""
        rows = own_targets + (self.offsets[segment] - 1)
        parent = self.parents[segment]
        if len(own_targets) and own_targets[0] == 0:
            if parent < 0:
                raise ValueError("the first token of an example cannot be a trained target: nothing predicts it")
            rows[0] = self.offsets[parent] + self.lengths[parent] - 1
        self.pairs[number] = (rows, self.ids[segment][own_targets])

    def score_path(self, number: int, segment: int) -> None:
        """Score all tokens of a segment and of its ancestors but the very first, for example `number`."""
        path: list[int] = []
        while segment >= 0:
            path.insert(0, segment)
            segment = self.parents[segment]
        rows = np.concatenate([np.arange(self.lengths[k]) + self.offsets[k] for k in path])
        self.pairs[number] = (rows[:-1], np.concatenate([self.ids[k] for k in path])[1:])

    def finish(self, rows: list[int], n_tokens: int) -> Packed:
        numbers = sorted(self.pairs)
        empty = np.zeros(0, np.int64)
        scored = [self.pairs[n][0] for n in numbers] or [empty]
        targets = [self.pairs[n][1] for n in numbers] or [empty]
        counts = [len(self.pairs[n][0]) for n in numbers]

        def tensor(parts: Sequence[np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate(parts).astype(np.int64))

        return Packed(
            ids=tensor(self.ids),
            positions=tensor(self.positions),
            lengths=self.lengths,
            parents=self.parents,
            scored=tensor(scored),
            targets=tensor(targets),
            segment=torch.from_numpy(np.repeat(np.asarray(numbers, np.int64), counts)),
            rows=rows,
            n_tokens=n_tokens,
        )


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def _prefix_groups(ids: Sequence[np.ndarray], limits: Sequence[int]) -> list[tuple[list[int], int]]:
    """Group sequences by common prefix so that the most tokens are saved: [(members, prefix length, 0 if
    alone)].

    `limits[i]` is the most tokens sequence i may share. In sorted order the sequences with a common prefix
    are neighbours, so the best partition into neighbouring groups is found by dynamic programming.
    """
    order = sorted(range(len(ids)), key=lambda i: ids[i].tobytes())
    limit = np.asarray(limits)[order]
    # pair[k]: tokens that k and k + 1 of the order may share, as far as k's own limit goes
    pair = np.asarray([_common_prefix(ids[a], ids[b]) for a, b in zip(order, order[1:], strict=False)], np.int64)
    pair = np.minimum(pair, limit[:-1])
    best = np.zeros(len(order) + 1, np.int64)  # tokens saved among the first k of the order
    choice: list[tuple[int, int]] = []  # (start of the last group, its prefix length)
    for end in range(1, len(order) + 1):
        best[end] = best[end - 1]
        start, prefix = end - 1, 0
        # common[j]: prefix length of the group that begins at end - 2 - j
        common = np.minimum(np.minimum.accumulate(pair[: end - 1][::-1]), limit[end - 1])
        common = common[common >= MIN_SHARED_PREFIX]
        if len(common):
            totals = best[: end - 1][::-1][: len(common)] + np.arange(1, len(common) + 1) * common
            j = int(totals.argmax())
            if totals[j] > best[end]:
                best[end], start, prefix = totals[j], end - 2 - j, int(common[j])
        choice.append((start, prefix))
    groups, end = [], len(order)
    while end:
        start, prefix = choice[end - 1]
        groups.append((order[start:end], prefix))
        end = start
    return groups[::-1]


def pack(examples: Sequence[Example], share_prefix: bool = True) -> Packed:
    """Pack the examples of a micro-batch into one row.

    With `share_prefix`, examples that begin with the same MIN_SHARED_PREFIX or more tokens, none of them
    trained, get one parent segment; every example keeps at least one token of its own.

    Raises ValueError for an empty list, an empty example or a trained first token.
    """
    if not examples or any(len(e) == 0 for e in examples):
        raise ValueError("pack needs at least one example, and no example without tokens")
    first_target = [int(e.mask.argmax()) if e.mask.any() else len(e) - 1 for e in examples]
    if share_prefix:
        groups = _prefix_groups([np.ascontiguousarray(e.ids, np.int32) for e in examples], first_target)
    else:
        groups = [([i], 0) for i in range(len(examples))]
    row = _Row()
    for members, prefix in groups:
        parent = row.add(examples[members[0]].ids[:prefix]) if prefix else -1
        for number in members:
            example = examples[number]
            segment = row.add(example.ids[prefix:], parent)
            row.score(number, segment, np.flatnonzero(example.mask[prefix:]))
    return row.finish([e.row for e in examples], sum(len(e) for e in examples))


def pack_tree(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    share_prefix: bool = True,
) -> Packed:
    """Pack prompts, each a parent segment, with their completions as children; every completion token is
    scored.

    `completions[i]` are those of `prompts[i]`; segment numbers and `rows` run over all completions in
    order. With `share_prefix`, a common beginning of several prompts (few-shot examples) becomes a parent
    of the prompts.

    Raises ValueError for an empty prompt or completion.
    """
    scored = [[np.arange(len(completion)) for completion in several] for several in completions]
    return pack_scored_tree(prompts, completions, scored, share_prefix)[0]


def pack_scored_tree(
    prompts: Sequence[Sequence[int] | np.ndarray],
    completions: Sequence[Sequence[Sequence[int] | np.ndarray]],
    scored: Sequence[Sequence[np.ndarray]],
    share_prefix: bool = True,
    prompts_scored: Sequence[int] = (),
) -> tuple[Packed, list[int]]:
    """`pack_tree` in which only the completion tokens at the indices `scored` are scored.

    The prompts at the indices `prompts_scored` are scored too, but for their first token; their segment numbers follow
    those of the completions. The second value: which segment of the row is each completion. Raises ValueError for an
    empty prompt or completion.
    """
    if not prompts or len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts with {len(completions)} lists of completions: equal, at least 1")
    if any(not len(p) for p in prompts) or any(not len(c) for several in completions for c in several):
        raise ValueError("pack_tree needs at least one token in every prompt and completion")
    prompt_ids = [np.asarray(p, np.int32) for p in prompts]
    groups = [([i], 0) for i in range(len(prompts))]
    if share_prefix:
        groups = _prefix_groups(prompt_ids, [len(p) - 1 for p in prompt_ids])
    first_number = np.cumsum([0] + [len(several) for several in completions])
    prompt_number = {i: int(first_number[-1]) + k for k, i in enumerate(prompts_scored)}
    row, n_tokens = _Row(), 0
    segments = [0] * int(first_number[-1])
    for members, prefix in groups:
        ancestor = row.add(prompt_ids[members[0]][:prefix]) if prefix else -1
        for i in members:
            parent = row.add(prompt_ids[i][prefix:], ancestor)
            if i in prompt_number:
                row.score_path(prompt_number[i], parent)
            for j, completion in enumerate(completions[i]):
                number = int(first_number[i]) + j
                segments[number] = row.add(np.asarray(completion, np.int32), parent)
                row.score(number, segments[number], scored[i][j])
                n_tokens += len(prompt_ids[i]) + len(completion)
    return row.finish(list(range(int(first_number[-1]))), n_tokens), segments


BatchedT = TypeVar("BatchedT", bound=Sized)


def micro_batches(
    examples: Sequence[BatchedT], micro_batch_tokens: int, tokens: Callable[[BatchedT], int] = len
) -> list[list[BatchedT]]:
    """Distribute examples over micro-batches of at most `micro_batch_tokens` tokens, first-fit decreasing.

    A longer example gets a micro-batch of its own. The fullest micro-batch comes first: if that one fits in
    memory, all do. `tokens` is how many an example counts for.
    """
    batches: list[list[BatchedT]] = []
    room: list[int] = []
    for example in sorted(examples, key=tokens, reverse=True):
        at = next((k for k, free in enumerate(room) if free >= tokens(example)), None)
        if at is None:
            batches.append([])
            room.append(micro_batch_tokens)
            at = len(batches) - 1
        batches[at].append(example)
        room[at] -= tokens(example)
    by_size = sorted(range(len(batches)), key=lambda k: room[k])
    return [batches[k] for k in by_size]
