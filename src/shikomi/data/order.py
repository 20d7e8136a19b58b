"""Which rows are in which step: a function of (seed, epoch, index) alone, so that a resumed run sees the
same rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


def _generator(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def _groups(weights: np.ndarray) -> Iterator[tuple[int, np.ndarray, int, int]]:
    """(group number, its rows, whole repetitions, rows of the fractional part per epoch) for each distinct
    weight.
    """
    for number, weight in enumerate(np.unique(weights)):
        members = np.flatnonzero(weights == weight)
        whole = math.floor(weight)
        yield number, members, whole, round((weight - whole) * len(members))


def epoch_size(n: int, weights: np.ndarray | None = None) -> int:
    """Examples in one epoch of `n` rows; `weights` (n,): how often each row is seen per epoch, on average."""
    if weights is None:
        return n
    return sum(whole * len(members) + part for _, members, whole, part in _groups(weights))


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool = True, weights: np.ndarray | None = None) -> np.ndarray:
    """Row numbers (epoch_size,) int64 of one epoch, in order.

    A row of weight w is seen floor(w) times; of the rows of that weight, the fraction w - floor(w) once
    more. That part moves on from epoch to epoch through a fixed random order, so that all rows get their
    turn.
    """
    rows = np.arange(n, dtype=np.int64)
    if weights is not None:
        parts = []
        for number, members, whole, part in _groups(weights):
            parts += [members] * whole
            if part:
                turn = _generator(seed, 0, number, 1).permutation(members)
                parts.append(turn[(np.arange(part) + epoch * part) % len(turn)])
        rows = np.sort(np.concatenate(parts).astype(np.int64))
    return _generator(seed, epoch).permutation(rows) if shuffle else rows


@dataclass(frozen=True, eq=False)
class Steps:
    """Optimizer steps over `n` rows: `batch_size` of them each, the last step of an epoch may have fewer."""

    n: int
    batch_size: int
    seed: int
    shuffle: bool = True
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        if epoch_size(self.n, self.weights) < 1 or self.batch_size < 1:
            raise ValueError(f"no steps of {self.batch_size} examples over {self.n} rows of these weights")
        # one epoch's order at a time is kept; the cache belongs to this plan
        object.__setattr__(self, "_order", lru_cache(maxsize=1)(self._epoch_order))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        return epoch_order(self.n, self.seed, epoch, self.shuffle, self.weights)

    @property
    def per_epoch(self) -> int:
        """Steps in an epoch."""
        return math.ceil(epoch_size(self.n, self.weights) / self.batch_size)

    def total(self, num_train_epochs: float, max_steps: int | None = None) -> int:
        """Steps in the run: `max_steps` where given, else as many as the epochs need, rounded up."""
        # the tolerance keeps 0.1 * 30 steps at 3
        return max_steps if max_steps is not None else max(1, math.ceil(num_train_epochs * self.per_epoch - 1e-9))

    def epoch(self, step: int) -> float:
        """Epochs finished after `step` steps."""
        return step / self.per_epoch

    def indices(self, step: int) -> np.ndarray:
        """Row numbers of step `step`, counted from 0 over the whole run."""
        epoch, k = divmod(step, self.per_epoch)
        return self._order(epoch)[k * self.batch_size : (k + 1) * self.batch_size]  # type: ignore[attr-defined]
