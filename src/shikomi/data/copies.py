"""Texts that are nearly copies of each other, among very many: MinHash finds candidates, which are then compared."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

SHINGLE = 3
"""Words in a row that are compared as one."""

SIMILAR = 0.7
"""Share of common shingles (Jaccard) from which two texts are nearly copies."""

FEWEST = 6
"""Shingles of its own from which on a text is compared."""

SHARED = 0.05
"""Share of the texts from which on a shingle is the form they have in common, and not what they say."""

SHARED_TEXTS = 5
"""Texts below which no shingle counts as shared."""

BANDS, ROWS = 24, 5
"""Two texts of similarity s become candidates with probability 1 - (1 - s**ROWS)**BANDS: 99% at 0.7, 20% at 0.4."""

MOST_SHINGLES = 50_000_000
"""Of all texts together, in four bytes each; texts after that are not compared."""

_BLOCK = 4096
_WORDS_KEPT = 1_000_000


class Shingles:
    """The shingles of each text as hashes of 32 bits, and the pairs of texts that share most of theirs.

    Shingles that SHARED of the texts have do not count: with a long instruction in common all rows would be alike.
    MinHash and its bands: Broder 1997; Indyk and Motwani 1998. A candidate is compared exactly, by its hashes.
    """

    def __init__(self) -> None:
        self.left_out = 0
        self._words: dict[str, int] = {}
        self._waiting: list[int] = []
        self._lengths = array("i")  # words of the texts that wait
        self._hashes: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._total = 0

    def add(self, words: Sequence[str]) -> None:
        """The next text, as its words."""
        if self._total > MOST_SHINGLES:
            self.left_out += 1
            words = ()
        self._waiting.extend(self._numbers(words))
        self._lengths.append(len(words))
        if len(self._lengths) >= _BLOCK:
            self._flush()

    def near(self, without: np.ndarray | None = None, every: bool = False) -> list[tuple[int, int]]:
        """(text, the earlier text that it is nearly a copy of), one for each text, in order.

        without (n,) bool: texts that are not compared; every: all such earlier texts among the candidates.
        """
        self._flush()
        counts = np.concatenate([np.zeros(0, np.int64), *self._counts])
        hashes = np.concatenate([np.zeros(0, np.uint32), *self._hashes])
        self._hashes, self._counts = [], []
        owner = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        if without is not None:
            hashes, owner = hashes[~without[owner]], owner[~without[owner]]
        hashes, owner = _distinct(hashes, owner, len(counts))
        kept = np.bincount(owner, minlength=len(counts)) >= FEWEST
        own = kept[owner]
        hashes, owner = hashes[own], owner[own]
        rows, starts = np.unique(owner, return_index=True)
        if len(rows) < 2:
            return []
        bounds = [*starts.tolist(), len(hashes)]
        return _compare(_candidates(_bands(hashes, starts)), hashes, bounds, rows.tolist(), every)

    def _numbers(self, words: Sequence[str]) -> list[int]:
        """CRC-32 of words: the same in every process, unlike Python's own hash."""
        known = self._words
        try:
            return [known[word] for word in words]
        except KeyError:
            if len(known) > _WORDS_KEPT:
                known.clear()
            for word in words:
                if word not in known:
                    known[word] = zlib.crc32(word.encode("utf-8", "surrogatepass"))
            return [known[word] for word in words]

    def _flush(self) -> None:
        lengths = np.asarray(self._lengths, np.int64)
        words = np.asarray(self._waiting, np.uint64)
        counts = np.maximum(lengths - SHINGLE + 1, 0)
        ends = np.cumsum(lengths)
        first = (
            np.repeat(ends - lengths, counts) + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        )
        mixed = np.zeros(len(first), np.uint64)
        for k in range(SHINGLE):
            mixed = (mixed ^ words[first + k]) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        self._hashes.append((mixed >> np.uint64(32)).astype(np.uint32))
        self._counts.append(counts)
        self._total += len(first)
        self._waiting, self._lengths = [], array("i")


def _distinct(hashes: np.ndarray, owner: np.ndarray, texts: int) -> tuple[np.ndarray, np.ndarray]:
    """Each shingle of a text once, those that many texts share left out; ordered by text."""
    keys = owner.astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= hashes
    keys.sort()  # faster than np.unique
    keys = keys[np.append(True, keys[1:] != keys[:-1])[: len(keys)]]
    hashes, owner = keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.int32)
    most = int(max(SHARED_TEXTS, SHARED * texts))
    ordered = np.sort(hashes)
    again = ordered[most:] == ordered[: max(0, len(ordered) - most)]  # more than `most` in a row
    shared = np.unique(ordered[most:][again])
    rare = ~np.isin(hashes, shared)
    return hashes[rare], owner[rare]


def _bands(hashes: np.ndarray, starts: np.ndarray) -> Iterator[np.ndarray]:
    """A key (n,) uint64 of each text, band by band: equal where ROWS minima are."""
    random = np.random.default_rng(0)
    scales = random.integers(0, 1 << 31, (BANDS, ROWS), dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    shifts = random.integers(0, 1 << 32, (BANDS, ROWS), dtype=np.uint32)
    keys = np.zeros((BANDS, len(starts)), np.uint64)
    ends = np.append(starts[1:], len(hashes))
    for block in range(0, len(starts), _BLOCK):  # a block stays in the cache
        part = starts[block : block + _BLOCK]
        own = hashes[part[0] : ends[min(block + _BLOCK, len(starts)) - 1]]
        for band in range(BANDS):
            for k in range(ROWS):
                minima = np.minimum.reduceat(own * scales[band, k] + shifts[band, k], part - part[0])
                key = keys[band, block : block + _BLOCK]
                key[:] = (key ^ minima) * np.uint64(0x9E3779B97F4A7C15)
    return iter(keys)


def _candidates(bands: Iterator[np.ndarray]) -> np.ndarray:
    """Pairs of texts (P, 2), the later first, that have a band in common: each with the first and the one before."""
    found: list[np.ndarray] = []
    count = 1
    for keys in bands:
        count = len(keys)
        order = np.argsort(keys, kind="stable")
        again = np.append(False, keys[order][1:] == keys[order][:-1])
        group = np.maximum.accumulate(np.where(again, 0, np.arange(count)))
        at = np.flatnonzero(again)
        for other in (order[group[at]], order[at - 1]):
            found.append(order[at] * count + other)
    pairs = np.unique(np.concatenate(found))
    return np.stack([pairs // count, pairs % count], axis=1)


def _compare(
    pairs: np.ndarray, hashes: np.ndarray, bounds: list[int], rows: list[int], every: bool
) -> list[tuple[int, int]]:
    """The pairs that are similar, one for each later text unless `every`, in the numbers of `rows`."""
    sets: dict[int, frozenset[int]] = {}

    def of(text: int) -> frozenset[int]:
        if text not in sets:
            sets[text] = frozenset(hashes[bounds[text] : bounds[text + 1]].tolist())
        return sets[text]

    found, last = [], -1
    for text, other in pairs.tolist():
        if every or text != last:
            size, small = bounds[text + 1] - bounds[text], bounds[other + 1] - bounds[other]
            if min(size, small) >= SIMILAR * max(size, small):
                common = len(of(text) & of(other))
                if common >= SIMILAR * (size + small - common):
                    found.append((rows[text], rows[other]))
                    last = text
    return found
