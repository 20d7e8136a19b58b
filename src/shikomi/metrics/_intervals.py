"""95% intervals for a metric and for the difference of two systems on the same rows. numpy only."""

import math
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from shikomi.metrics._metric import Metric, Unit, check_paired

Z95 = 1.959963984540054  # 97.5% point of the normal distribution
RESAMPLES = 2000
_COUNTS_AT_ONCE = 4_000_000  # resample counts held in memory: 32 MB


class Measurement(TypedDict):
    """A metric on a set of rows, as it stands in result.json."""

    value: float
    ci95: list[float]
    n: int
    unit: Unit
    higher_is_better: bool
    interval: str  # wilson | bootstrap
    details: dict[str, Any]


class Difference(TypedDict):
    """`after - before` on the same rows, as it stands in result.json."""

    value: float
    ci95: list[float]
    n: int
    unit: Unit
    higher_is_better: bool
    p_value: float | None  # McNemar, exact, two-sided; None where rows are not right or wrong
    gained: int | None  # rows that only `after` has right
    lost: int | None  # rows that only `before` has right


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval for a proportion (1927): inside [0, 1], and with a width at 0 and at 1."""
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"{right} right of {n}")
    share, z2 = right / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # Exactly 0 and 1 at the ends: rounding would leave 1e-18.
    return (0.0 if right == 0 else middle - half), (1.0 if right == n else middle + half)


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p of McNemar's test: without a difference, rows change either way like a coin."""
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**n)


def _resample(systems: Sequence[tuple[Metric, np.ndarray]], resamples: int, seed: int) -> list[np.ndarray]:
    """Values of every system on the same resamples of the rows: one (resamples,) array per system."""
    n = len(systems[0][1])
    rng = np.random.default_rng(seed)
    values: list[list[np.ndarray]] = [[] for _ in systems]
    done = 0
    while done < resamples:
        several = min(max(1, _COUNTS_AT_ONCE // n), resamples - done)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=several).astype(np.float64)  # (several, n)
        for out, (metric, statistics) in zip(values, systems, strict=True):
            out.append(metric.value(counts @ statistics))
        done += several
    return [np.concatenate(parts) for parts in values]


def bootstrap(metric: Metric, statistics: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a metric from its rows' statistics (n, k)."""
    (values,) = _resample([(metric, statistics)], resamples, seed)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def measure(metric: Metric, predictions: Sequence[Any], references: Sequence[Any], seed: int = 0) -> Measurement:
    """Value and 95% interval of a metric: Wilson for proportions, seeded bootstrap over rows for the others.

    Raises ValueError for no rows, or different numbers of predictions and references.
    """
    check_paired(predictions, references)
    statistics = metric.statistics(predictions, references)
    if metric.proportion:
        interval, bounds = "wilson", wilson(round(statistics[:, 0].sum()), len(statistics))
    else:
        interval, bounds = "bootstrap", bootstrap(metric, statistics, seed=seed)
    return Measurement(
        value=float(metric.value(statistics.sum(axis=0))),
        ci95=list(bounds),
        n=len(statistics),
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
        interval=interval,
        details=metric.details(predictions, references),
    )


def difference(
    metric: Metric,
    before: Sequence[Any],
    after: Sequence[Any],
    references: Sequence[Any],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """How much `after` is above `before` on the same rows, with a paired bootstrap interval.

    Both systems are scored on the same resamples, so that what makes a row hard for both cancels. Where a row
    is right or wrong, McNemar's exact test is added. Raises ValueError unless all three have equally many rows.
    """
    check_paired(before, references)
    check_paired(after, references)
    pair = [(metric, metric.statistics(side, references)) for side in (before, after)]
    values = _resample(pair, resamples, seed)
    low, high = np.quantile(values[1] - values[0], [0.025, 0.975])
    totals = [float(metric.value(statistics.sum(axis=0))) for _, statistics in pair]
    gained = lost = p_value = None
    if metric.proportion:
        right = [statistics[:, 0] > 0.5 for _, statistics in pair]
        gained, lost = int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum())
        p_value = mcnemar(lost, gained)
    return Difference(
        value=totals[1] - totals[0],
        ci95=[float(low), float(high)],
        n=len(pair[0][1]),
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
        p_value=p_value,
        gained=gained,
        lost=lost,
    )
