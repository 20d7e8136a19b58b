"""A language model whose next token depends on every token before it, without weights."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from shikomi.data.packing import Packed
from shikomi.model.logprobs import Scored


@dataclass
class FakeModel:
    """p(token | context) from a seed that is a hash of the whole context; counts the rows it computes."""

    vocabulary: int = 64
    seed: int = 0
    rows: int = 0
    batches: list[int] = field(default_factory=list)

    def logp(self, context: tuple[int, ...], target: int) -> float:
        """Log-probability of one token after a context."""
        digest = hashlib.sha256(repr((self.seed, context)).encode()).digest()
        logits = np.random.default_rng(list(digest)).normal(0, 2, self.vocabulary)
        return float(logits[target] - np.log(np.exp(logits).sum()))

    def sum_logp(self, prompt: list[int], completion: list[int]) -> float:
        """Summed log-probability of a completion, token by token: what packed scoring must equal."""
        text = [*prompt, *completion]
        return sum(self.logp(tuple(text[:i]), text[i]) for i in range(len(prompt), len(text)))

    def score(self, packed: Packed) -> Scored:
        """Log-probabilities of the scored tokens, each from its segment's chain of ancestors."""
        assert not torch.is_grad_enabled()
        self.rows += len(packed.ids)
        self.batches.append(len(packed.ids))
        offsets, ids = packed.offsets, packed.ids.tolist()
        before: list[tuple[int, ...]] = []  # all tokens up to and with each row's own
        for segment, (start, length) in enumerate(zip(offsets, packed.lengths, strict=True)):
            parent = packed.parents[segment]
            chain = before[offsets[parent] + packed.lengths[parent] - 1] if parent >= 0 else ()
            for row in range(start, start + length):
                assert packed.positions[row] == len(chain)
                chain = (*chain, ids[row])
                before.append(chain)
        pairs = zip(packed.scored.tolist(), packed.targets.tolist(), strict=True)
        logp = [self.logp(before[row], target) for row, target in pairs]
        return Scored(torch.tensor(logp, dtype=torch.float32), packed.segment)


def silent_ticks() -> tuple[list[tuple[int, int]], Any]:
    """A list that fills with (done, total), and the progress that fills it."""
    from shikomi.progress import Silent

    ticks: list[tuple[int, int]] = []

    class Ticks(Silent):
        def tick(self, done: int, total: int, what: str) -> None:
            ticks.append((done, total))

    return ticks, Ticks()
