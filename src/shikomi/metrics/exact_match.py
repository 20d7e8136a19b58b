"""Exact match: the share of answers that are the reference, character by character."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from shikomi.metrics._metric import Metric, Needs, Unit, mean_of_columns

_PUNCTUATION = re.compile(r"[^\w\s]")


@dataclass(frozen=True)
class ExactMatch(Metric):
    """Share of answers equal to the reference, both in Unicode's NFC and without space at the ends."""

    name: ClassVar[str] = "exact_match"
    needs: ClassVar[Needs] = "text"
    unit: ClassVar[Unit] = "share"
    proportion: ClassVar[bool] = True

    ignore_case: Annotated[bool, Field(description="compare without regard to upper and lower case")] = False
    ignore_punctuation: Annotated[bool, Field(description="compare letters, digits and words only")] = False

    def normal(self, text: str) -> str:
        """The form in which two texts are compared."""
        text = unicodedata.normalize("NFC", text)
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = " ".join(_PUNCTUATION.sub(" ", text).split())
        return text.strip()

    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        pairs = zip(predictions, references, strict=True)
        return np.array([[self.normal(p) == self.normal(r), 1.0] for p, r in pairs], np.float64)

    def value(self, sums: np.ndarray) -> np.ndarray:
        return mean_of_columns(sums)
