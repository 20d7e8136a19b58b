"""What every metric is: a table of statistics per row, and a value that is a function of their sum."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypedDict

import numpy as np

Needs = Literal["labels", "text", "logp"]
Unit = Literal["share", "points", "nats", "ratio"]


class Score(TypedDict):
    """What a metric says about a set of rows, before any interval."""

    value: float
    n: int  # rows
    rows: list[float]  # the metric of each row alone
    details: dict[str, Any]


class Metric(ABC):
    """A score whose value depends on its rows only through the sum of a few statistics per row.

    Because of that one property the same two lines of arithmetic give a bootstrap interval, and a paired
    difference between two systems, for means (accuracy), corpus scores (BLEU, chrF) and macro averages alike.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]
    """What predictions and references are. labels: names of labels; text: strings; logp: summed
    log-probabilities of the reference answers (nats), with their numbers of tokens as references."""
    unit: ClassVar[Unit]
    """share: 0 to 1, shown in percent; points: 0 to 100; nats: per token; ratio: any positive number."""
    higher_is_better: ClassVar[bool] = True
    proportion: ClassVar[bool] = False
    """Every row is right or wrong and the value is the share of right ones: Wilson interval, McNemar test."""

    @abstractmethod
    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        """Statistics of every row, (n, k) float64; k may depend on the rows (macro-F1: on the classes)."""

    @abstractmethod
    def value(self, sums: np.ndarray) -> np.ndarray:
        """Value for each sum of statistics: (..., k) -> (...)."""

    def row_values(self, statistics: np.ndarray) -> np.ndarray:
        """The metric of each row alone: (n, k) -> (n,)."""
        return self.value(statistics)

    def details(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, Any]:
        """What else a reader wants to know, as plain JSON."""
        return {}

    def __call__(self, predictions: Sequence[Any], references: Sequence[Any]) -> Score:
        """Score all rows. Raises ValueError for no rows, or a prediction without a reference."""
        check_paired(predictions, references)
        statistics = self.statistics(predictions, references)
        return Score(
            value=float(self.value(statistics.sum(axis=0))),
            n=len(statistics),
            rows=self.row_values(statistics).tolist(),
            details=self.details(predictions, references),
        )


def check_paired(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """Raise ValueError unless there is one reference to every prediction, and at least one of both."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    if not len(references):
        raise ValueError("a metric needs at least one row")


def mean_of_columns(sums: np.ndarray, column: int = 0) -> np.ndarray:
    """Mean of a statistic over rows, where the last statistic of each row is 1: (..., k) -> (...)."""
    return sums[..., column] / sums[..., -1]
