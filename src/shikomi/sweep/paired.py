"""Scores and differences over seeds with 95% intervals: the rows are resampled, each with the answers of all seeds.

What makes a row hard is the same for all cells and seeds, so it cancels in a difference. numpy only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shikomi.metrics import Metric, mcnemar
from shikomi.metrics._intervals import RESAMPLES, Z95

Z80 = 0.8416212335729143  # 80% point of the normal distribution
COIN = 6
"""Rows that must all change the same way before McNemar's exact test gives p < 0.05: 2 / 2^6 = 0.03."""
_COUNTS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Answers:
    """What one cell answered: row ids, predictions and references, in one order."""

    ids: Sequence[str]
    predictions: Sequence[Any]
    references: Sequence[Any]


def _tables(metric: Metric, cells: Sequence[Answers]) -> list[np.ndarray]:
    """Statistics (rows, k) of each cell over the rows of all; zeros for a row that a cell has not.

    Computed together, because k may depend on the classes that are met.
    """
    predictions = [p for cell in cells for p in cell.predictions]
    references = [r for cell in cells for r in cell.references]
    statistics = metric.statistics(predictions, references)
    number: dict[str, int] = {}
    for cell in cells:
        for row in cell.ids:
            number.setdefault(row, len(number))
    tables, start = [], 0
    for cell in cells:
        table = np.zeros((len(number), statistics.shape[1]))
        table[[number[row] for row in cell.ids]] = statistics[start : start + len(cell.ids)]
        tables.append(table)
        start += len(cell.ids)
    return tables


def _resampled(metric: Metric, tables: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Values (cells, resamples) of every cell on the same resamples of the rows."""
    n = len(tables[0])
    rng = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    done = 0
    while done < RESAMPLES:
        several = min(max(1, _COUNTS_AT_ONCE // n), RESAMPLES - done)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=several).astype(np.float64)  # (several, n)
        # Where seeds have different test rows, a resample may hold none of one seed: it has no value.
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append(np.stack([metric.value(counts @ table) for table in tables]))
        done += several
    return np.concatenate(parts, axis=1)


def _bounds(values: np.ndarray) -> list[float]:
    low, high = np.quantile(values[np.isfinite(values)], [0.025, 0.975])
    return [float(low), float(high)]


def mean_interval(metric: Metric, cells: Sequence[Answers], seed: int = 0) -> list[float]:
    """95% interval over test rows of the mean of the metric over the cells of a setting."""
    return _bounds(_resampled(metric, _tables(metric, cells), seed).mean(axis=0))


def paired(metric: Metric, before: Sequence[Answers], after: Sequence[Answers], seed: int = 0) -> dict[str, Any]:
    """`after - before`, the mean over seeds; before[i] and after[i] are of one seed and answer the same rows.

    ci95 is the paired bootstrap interval over rows; for one seed it is that of `metrics.difference`. `smallest` is the
    difference that these rows would show in 80 of 100 repetitions: 2.80 standard errors, and where rows are right or
    wrong at least 6 rows. Raises ValueError where a pair answers different rows.
    """
    if not before or len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} cells are no pairs")
    for one, other in zip(before, after, strict=True):
        if list(one.ids) != list(other.ids) or list(one.references) != list(other.references):
            raise ValueError("a pair must answer the same rows")
    seeds = len(before)
    tables = _tables(metric, [*before, *after])
    totals = np.array([float(metric.value(table.sum(axis=0))) for table in tables])
    values = _resampled(metric, tables, seed)
    gaps = values[seeds:].mean(axis=0) - values[:seeds].mean(axis=0)
    n = len(tables[0])
    error = float(np.std(gaps[np.isfinite(gaps)], ddof=1))
    smallest = (Z95 + Z80) * error
    gained = lost = p_value = None
    if metric.proportion:
        smallest = min(1.0, max(smallest, COIN / n))
        if seeds == 1:
            right = [table[:, 0] > 0.5 for table in tables]
            gained, lost = int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum())
            p_value = mcnemar(lost, gained)
    return {
        "value": float(totals[seeds:].mean() - totals[:seeds].mean()),
        "ci95": _bounds(gaps),
        "n": n,
        "seeds": seeds,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "p_value": p_value,
        "gained": gained,
        "lost": lost,
        "smallest": smallest,
    }
