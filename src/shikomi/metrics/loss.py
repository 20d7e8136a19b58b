"""Loss: mean negative log-probability per token of the reference answers, in nats."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from shikomi.metrics._metric import Metric, Needs, Unit


def nll_statistics(logp: Sequence[Any], tokens: Sequence[Any]) -> np.ndarray:
    """(n, 2): minus the summed log-probability of each row's scored tokens (nats), and their number."""
    return np.stack([-np.asarray(logp, np.float64), np.asarray(tokens, np.float64)], axis=1)


@dataclass(frozen=True)
class Loss(Metric):
    """Cross-entropy over all scored tokens: a long answer weighs as much as its tokens, as in training.

    Predictions are the rows' summed log-probabilities, references their numbers of tokens.
    """

    name: ClassVar[str] = "loss"
    needs: ClassVar[Needs] = "logp"
    unit: ClassVar[Unit] = "nats"
    higher_is_better: ClassVar[bool] = False

    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        return nll_statistics(predictions, references)

    def value(self, sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / sums[..., 1]

    def details(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, Any]:
        return {"tokens": int(sum(references))}
