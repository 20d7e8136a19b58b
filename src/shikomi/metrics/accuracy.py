"""Accuracy: the share of rows whose predicted label is the right one."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from shikomi.metrics._metric import Metric, Needs, Unit, mean_of_columns


@dataclass(frozen=True)
class Accuracy(Metric):
    """Share of rows with prediction == reference; labels are compared as they are."""

    name: ClassVar[str] = "accuracy"
    needs: ClassVar[Needs] = "labels"
    unit: ClassVar[Unit] = "share"
    proportion: ClassVar[bool] = True

    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        return np.array([[p == r, 1.0] for p, r in zip(predictions, references, strict=True)], np.float64)

    def value(self, sums: np.ndarray) -> np.ndarray:
        return mean_of_columns(sums)

    def details(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, Any]:
        return {"right": sum(p == r for p, r in zip(predictions, references, strict=True))}
