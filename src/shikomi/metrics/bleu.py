"""BLEU: precision of word n-grams with a brevity penalty (Papineni et al. 2002), by sacrebleu."""

from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from shikomi.metrics._metric import Metric, Needs, Unit

_ORDERS = 4
# Chinese and Japanese: Han characters and kana, which have no spaces for a word tokenizer to see.
_UNSPACED = ((0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


@dataclass(frozen=True)
class Bleu(Metric):
    """Corpus BLEU-4, 0 to 100, with sacrebleu's default smoothing (`exp`)."""

    name: ClassVar[str] = "bleu"
    needs: ClassVar[Needs] = "text"
    unit: ClassVar[Unit] = "points"

    tokenize: Annotated[
        Literal["auto", "13a", "char", "intl", "zh", "none"],
        Field(description="sacrebleu's tokenizer; auto: char for Chinese and Japanese references, else 13a"),
    ] = "auto"

    def tokenizer(self, references: Sequence[str]) -> str:
        """Name of the tokenizer that these references are scored with."""
        if self.tokenize != "auto":
            return self.tokenize
        letters = [ord(c) for text in references for c in text if c.isalpha()]
        unspaced = sum(any(low <= c <= high for low, high in _UNSPACED) for c in letters)
        return "char" if 2 * unspaced > len(letters) else "13a"

    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        """(n, 10): lengths of prediction and reference, right n-grams of each order, all n-grams of each."""
        bleu = _sacrebleu(self.tokenizer(references))
        table = np.zeros((len(references), 2 + 2 * _ORDERS))
        for row, predicted, true in zip(table, predictions, references, strict=True):
            score = bleu.corpus_score([predicted], [[true]])
            row[:] = [score.sys_len, score.ref_len, *score.counts, *score.totals]
        return table

    def value(self, sums: np.ndarray) -> np.ndarray:
        return np.apply_along_axis(_bleu, -1, sums, effective_order=False)

    def row_values(self, statistics: np.ndarray) -> np.ndarray:
        """Sentence BLEU: orders longer than the sentence do not count."""
        return np.apply_along_axis(_bleu, -1, statistics, effective_order=True)

    def details(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, Any]:
        return {"tokenize": self.tokenizer(references), "smooth": "exp"}


@cache
def _sacrebleu(tokenize: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    # force: this many rows of tokenized-looking text are no mistake, and the warning would come once per row.
    return BLEU(tokenize=tokenize, force=True)


def _bleu(sums: np.ndarray, effective_order: bool) -> float:
    from sacrebleu.metrics.bleu import BLEU

    ours, theirs, *counts = (round(x) for x in sums)
    right, total = counts[:_ORDERS], counts[_ORDERS:]
    return BLEU.compute_bleu(right, total, ours, theirs, smooth_method="exp", effective_order=effective_order).score
