"""ROUGE: overlap of words and of word sequences with a reference (Lin 2004), for summaries."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from shikomi.metrics._metric import Metric, Needs, Unit, mean_of_columns

_VARIANTS = ("rouge1", "rouge2", "rougeL")
# Scripts written without spaces: Thai, Lao, Burmese, Khmer, kana and Han. (Korean has spaces.)
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}\U00020000-\U0003ffff]|[^\W_{_UNSPACED}\U00020000-\U0003ffff]+")


class _Words:
    """Tokenizer of rouge-score that also sees other letters than a-z; on ASCII text the two are equal."""

    def __init__(self, stem: bool):
        from rouge_score.tokenizers import DefaultTokenizer

        self._english = DefaultTokenizer(use_stemmer=stem)

    def tokenize(self, text: str) -> list[str]:
        """Words in lower case; characters where a script has no spaces."""
        if text.isascii():
            return self._english.tokenize(text)
        words = _WORD.findall(text.lower())
        return [stem for word in words for stem in (self._english.tokenize(word) if word.isascii() else [word])]


@dataclass(frozen=True)
class Rouge(Metric):
    """Mean over rows of the F-measure of ROUGE, as Google's rouge-score computes it, without its bootstrap.

    rouge-score drops every letter but a-z, so that a Japanese answer is always 0. Text with other letters is
    cut into Unicode words here, and into characters in scripts without spaces.
    """

    name: ClassVar[str] = "rouge"
    needs: ClassVar[Needs] = "text"
    unit: ClassVar[Unit] = "share"

    variant: Annotated[
        Literal["rouge1", "rouge2", "rougeL"],
        Field(description="the one that is the value: words, pairs of words, longest common subsequence"),
    ] = "rougeL"
    stem: Annotated[bool, Field(description="compare English words by their stems")] = False

    @cached_property
    def _scorer(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(list(_VARIANTS), tokenizer=_Words(self.stem))

    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        """(n, 4): F of rouge1, rouge2 and rougeL, and 1."""
        table = []
        for predicted, true in zip(predictions, references, strict=True):
            scores = self._scorer.score(true, predicted)
            table.append([*(scores[v].fmeasure for v in _VARIANTS), 1.0])
        return np.array(table, np.float64)

    def value(self, sums: np.ndarray) -> np.ndarray:
        return mean_of_columns(sums, _VARIANTS.index(self.variant))

    def details(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, Any]:
        means = self.statistics(predictions, references).mean(axis=0)
        return {variant: float(mean) for variant, mean in zip(_VARIANTS, means, strict=False)}
