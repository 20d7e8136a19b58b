"""A validation set split off the training rows: by content, so that copies of a row stay on one side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from shikomi.data.conversation import Conversation
from shikomi.errors import BadInput, Problem


@dataclass(frozen=True)
class Split:
    """One side of a split: rows whose key is at most `threshold` are for validation, the others for training."""

    side: str
    seed: int
    threshold: int

    def __contains__(self, conversation: Conversation) -> bool:
        return (row_key(conversation, self.seed) <= self.threshold) == (self.side == "validation")


def row_key(conversation: Conversation, seed: int) -> int:
    """A number below 2**64 from the row's content and the seed."""
    content = [conversation.messages, conversation.tools, conversation.text, seed]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def split_rows(conversations: Iterable[Conversation], fraction: float, seed: int) -> tuple[Split, Split]:
    """(training side, validation side) with the given share of the rows for validation, at least one on each side.

    Copies of a row may make the validation side a little larger. Raises BadInput for fewer than two different rows.
    """
    keys = sorted(row_key(conversation, seed) for conversation in conversations)
    if not keys or keys[0] == keys[-1]:
        raise BadInput(
            [
                Problem(
                    what="a validation set cannot be split off",
                    found=f"{len(keys)} rows" + (", all the same" if len(keys) > 1 else ""),
                    allowed="at least 2 different rows",
                    fix="remove data.validation, or name a file",
                )
            ]
        )
    count = max(1, round(fraction * len(keys)))
    threshold = keys[count - 1]
    if threshold == keys[-1]:
        threshold = max(key for key in keys if key < keys[-1])
    return Split("train", seed, threshold), Split("validation", seed, threshold)
