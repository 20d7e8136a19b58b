"""Macro-F1: the plain mean of the classes' F1, so that a rare class counts as much as a frequent one."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from shikomi.metrics._metric import Metric, Needs, Unit


@dataclass(frozen=True)
class MacroF1(Metric):
    """Mean over classes of F1 = 2 TP / (predicted + true).

    The classes are those among the references or the predictions of the rows at hand, and one without a right
    prediction counts 0: scikit-learn's `f1_score(average="macro", zero_division=0)`.
    """

    name: ClassVar[str] = "macro_f1"
    needs: ClassVar[Needs] = "labels"
    unit: ClassVar[Unit] = "share"

    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        """(n, 2 C): for each class 2 TP, then predicted + true."""
        number = {name: i for i, name in enumerate(_classes(predictions, references))}
        table = np.zeros((len(references), 2, len(number)))
        for row, predicted, true in zip(table, predictions, references, strict=True):
            if predicted == true:
                row[0, number[true]] = 2
            row[1, number[predicted]] += 1
            row[1, number[true]] += 1
        return table.reshape(len(references), -1)

    def value(self, sums: np.ndarray) -> np.ndarray:
        twice_right, either = np.split(sums, 2, axis=-1)  # (..., C) each
        present = either > 0
        f1 = np.divide(twice_right, either, out=np.zeros_like(either), where=present)
        return f1.sum(axis=-1) / present.sum(axis=-1)

    def details(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, Any]:
        """F1 of every class with the number of its rows."""
        sums = self.statistics(predictions, references).sum(axis=0)
        twice_right, either = np.split(sums, 2)
        true = list(references)
        return {
            "classes": {
                str(name): {"f1": float(twice_right[i] / either[i]), "rows": true.count(name)}
                for i, name in enumerate(_classes(predictions, references))
            }
        }


def _classes(predictions: Sequence[Any], references: Sequence[Any]) -> list[Any]:
    return sorted({*predictions, *references})
