"""A validation set split off the training rows: by content, so that copies of a row stay on one side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from shikomi.errors import BadInput, Problem


class Splittable(Protocol):
    """A row: a conversation, or one or two answers to a prompt."""

    @property
    def identity(self) -> list[Any]:
        """JSON data that rows share which must stay on one side: all of a conversation, the prompt of a preference."""


@dataclass(frozen=True)
class Split:
    """One side of a split: rows whose key is at most `threshold` are for validation, the others for training."""

    side: str
    seed: int
    threshold: int

    def __contains__(self, row: Splittable) -> bool:
        return (row_key(row, self.seed) <= self.threshold) == (self.side == "validation")


def row_key(row: Splittable, seed: int) -> int:
    """A number below 2**64 from the row's identity and the seed."""
    content = [*row.identity, seed]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def split_rows(rows: Iterable[Splittable], fraction: float, seed: int) -> tuple[Split, Split]:
    """(training side, validation side) with the given share of the rows for validation, at least one on each side.

    Copies of a row (preferences: rows with the same prompt) may make the validation side a little larger. Raises
    BadInput for fewer than two different rows.
    """
    keys = sorted(row_key(row, seed) for row in rows)
    if not keys or keys[0] == keys[-1]:
        raise BadInput(
            [
                Problem(
                    what="a validation set cannot be split off",
                    found=f"{len(keys)} rows" + (", all the same" if len(keys) > 1 else ""),
                    allowed="at least 2 different rows (preferences: 2 different prompts)",
                    fix="remove data.validation, or name a file",
                )
            ]
        )
    count = max(1, round(fraction * len(keys)))
    threshold = keys[count - 1]
    if threshold == keys[-1]:
        threshold = max(key for key in keys if key < keys[-1])
    return Split("train", seed, threshold), Split("validation", seed, threshold)
