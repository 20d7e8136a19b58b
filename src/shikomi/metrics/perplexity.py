"""Perplexity: exp of the loss; among how many equally likely tokens the model hesitates."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from shikomi.metrics._metric import Metric, Needs, Unit
from shikomi.metrics.loss import nll_statistics


@dataclass(frozen=True)
class Perplexity(Metric):
    """exp(mean negative log-probability per token). Comparable only between models with the same tokenizer.

    Predictions are the rows' summed log-probabilities, references their numbers of tokens.
    """

    name: ClassVar[str] = "perplexity"
    needs: ClassVar[Needs] = "logp"
    unit: ClassVar[Unit] = "ratio"
    higher_is_better: ClassVar[bool] = False

    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        return nll_statistics(predictions, references)

    def value(self, sums: np.ndarray) -> np.ndarray:
        return np.exp(sums[..., 0] / sums[..., 1])

    def details(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, Any]:
        return {"tokens": int(sum(references))}
