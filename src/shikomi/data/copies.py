"""Texts that are nearly copies of each other: those of a test set that a model has as good as seen."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

SHINGLE = 3
"""Words in a row that are compared as one."""

SIMILAR = 0.7
"""Share of common shingles (Jaccard) from which two texts are nearly copies."""

_WORD = re.compile(r"\w+")


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Runs of SHINGLE words of a text without case and punctuation; a shorter text is one run."""
    words = _WORD.findall(text.casefold())
    return frozenset(tuple(words[k : k + SHINGLE]) for k in range(max(1, len(words) - SHINGLE + 1)) if words)


def near_copies(known: Sequence[str], texts: Sequence[str]) -> list[tuple[int, int]]:
    """(index in texts, index in known) for each text that is nearly a copy, with the most similar known one.

    Exact: two sets with a Jaccard similarity of at least SIMILAR have one of the rarest (1 - SIMILAR) of their
    elements in common (prefix filtering, Chaudhuri et al. 2006), so that few pairs are compared.
    """
    sets = [shingles(text) for text in known]
    count = Counter(shingle for one in sets for shingle in one)

    def rarest(one: frozenset[tuple[str, ...]]) -> list[tuple[str, ...]]:
        needed = int(SIMILAR * len(one) - 1e-9) + 1  # elements that a similar set has to share
        return sorted(one, key=lambda shingle: (count[shingle], shingle))[: len(one) - needed + 1]

    holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, one in enumerate(sets):
        for shingle in rarest(one):
            holders[shingle].append(index)
    found = []
    for at, text in enumerate(texts):
        own = shingles(text)
        candidates = sorted({index for shingle in rarest(own) for index in holders.get(shingle, ())})
        scored = [(len(own & sets[k]) / len(own | sets[k]), -k) for k in candidates]
        best = max(scored, default=(0.0, 0))
        if best[0] >= SIMILAR:
            found.append((at, -best[1]))
    return found
