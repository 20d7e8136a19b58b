"""Scores of text, labels and log-probabilities; one file per metric, each with its options as fields."""

from shikomi.metrics._intervals import Difference, Measurement, bootstrap, difference, mcnemar, measure, wilson
from shikomi.metrics._metric import Metric, Score

__all__ = [
    "Difference",
    "Measurement",
    "Metric",
    "Score",
    "bootstrap",
    "difference",
    "mcnemar",
    "measure",
    "wilson",
]
