"""chrF: F-score of character n-grams (Popovic 2015), for translations and short texts in any language."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from shikomi.metrics._metric import Metric, Needs, Unit


@dataclass(frozen=True)
class ChrF(Metric):
    """Corpus chrF, 0 to 100: F_beta of the mean precision and recall over n-gram orders, as sacrebleu's.

    White space is left out of the n-grams; orders that neither side has rows for are left out of the means.
    """

    name: ClassVar[str] = "chrf"
    needs: ClassVar[Needs] = "text"
    unit: ClassVar[Unit] = "points"

    char_order: Annotated[int, Field(ge=1, le=10, description="longest n-gram of characters")] = 6
    beta: Annotated[float, Field(gt=0, le=10, description="recall counts beta times as much as precision")] = 2.0

    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        """(n, 3 * char_order): for each order the n-grams of the prediction, of the reference, and common."""
        from sacrebleu.metrics.helpers import extract_all_char_ngrams

        table = np.zeros((len(references), self.char_order, 3))
        for row, predicted, true in zip(table, predictions, references, strict=True):
            # sacrebleu strips a line's end before it counts; white space is dropped in any case.
            sides = [extract_all_char_ngrams(text, self.char_order) for text in (predicted, true)]
            for order, (ours, theirs) in zip(row, zip(*sides, strict=True), strict=True):
                # Without a reference n-gram of this order, the prediction's are not held against it.
                order[0] = ours.total() if theirs else 0
                order[1] = theirs.total()
                order[2] = (ours & theirs).total()
        return table.reshape(len(references), -1)

    def value(self, sums: np.ndarray) -> np.ndarray:
        table = sums.reshape(*sums.shape[:-1], self.char_order, 3)
        ours, theirs, common = table[..., 0], table[..., 1], table[..., 2]  # (..., char_order) each
        counted = (ours > 0) & (theirs > 0)
        orders = np.maximum(counted.sum(axis=-1), 1)
        zero = np.zeros_like(ours)
        precision = np.divide(common, ours, out=zero.copy(), where=counted).sum(axis=-1) / orders
        recall = np.divide(common, theirs, out=zero.copy(), where=counted).sum(axis=-1) / orders
        weight = self.beta**2
        below = weight * precision + recall
        return 100 * np.divide((1 + weight) * precision * recall, below, out=np.zeros_like(below), where=below > 0)
