"""Intervals of paired differences over seeds against hand computations, and against the one-seed difference."""

import math

import numpy as np
import pytest

from shikomi.metrics import difference
from shikomi.metrics.accuracy import Accuracy
from shikomi.metrics.loss import Loss
from shikomi.metrics.macro_f1 import MacroF1
from shikomi.sweep.paired import Answers, mean_interval, paired


def answers(right, ids=None):
    ids = ids or [f"r{i}" for i in range(len(right))]
    return Answers(ids, ["y" if r else "n" for r in right], ["y"] * len(right))


def test_ten_rows_by_hand():
    # `after` alone is right in 8 of 10 rows, so a resample's difference is Binomial(10, 0.8) / 10:
    # P(X <= 4) = 0.0064 and P(X <= 5) = 0.0328 enclose 2.5%; P(X = 10) = 0.107 holds 97.5%.
    found = paired(Accuracy(), [answers([0] * 10)], [answers([1] * 8 + [0] * 2)])
    assert found["value"] == pytest.approx(0.8) and found["ci95"] == pytest.approx([0.5, 1.0])
    assert (found["gained"], found["lost"], found["n"], found["seeds"]) == (8, 0, 10, 1)
    assert found["p_value"] == pytest.approx(2 / 2**8)
    assert found["smallest"] == pytest.approx(6 / 10)  # 2.80 * sqrt(0.16 / 10) = 0.354 is less than six rows


def test_two_seeds_are_one_row_with_two_answers():
    # Of 100 rows seed 0 gains all and seed 1 gains half: row differences are 1 and 0.5 in equal parts, so the mean is
    # 0.75 and its standard error 0.25 / sqrt(100), not that of 200 independent rows.
    before = [answers([0] * 100)] * 2
    after = [answers([1] * 100), answers([1] * 50 + [0] * 50)]
    found = paired(Accuracy(), before, after)
    assert found["value"] == pytest.approx(0.75) and found["n"] == 100 and found["seeds"] == 2
    assert found["ci95"] == pytest.approx([0.75 - 1.96 * 0.025, 0.75 + 1.96 * 0.025], abs=0.006)
    assert found["p_value"] is None and found["gained"] is None
    assert found["smallest"] == pytest.approx(max(2.8016 * 0.025, 0.06), rel=0.05)


def test_pairing_cancels_what_makes_rows_hard():
    hard = [i % 2 for i in range(200)]
    better = hard[:190] + [1] * 10
    found = paired(Accuracy(), [answers(hard)], [answers(better)])
    assert found["value"] == pytest.approx(0.025)
    assert found["ci95"][1] - found["ci95"][0] < 0.06  # unpaired it would be 0.19


@pytest.mark.parametrize("metric", [Accuracy(), MacroF1()])
def test_one_seed_is_the_difference_of_the_metrics(metric):
    rng = np.random.default_rng(3)
    references, before, after = (rng.choice(list("abc"), 60).tolist() for _ in range(3))
    ids = [f"r{i}" for i in range(60)]
    found = paired(metric, [Answers(ids, before, references)], [Answers(ids, after, references)], seed=5)
    expected = difference(metric, before, after, references, seed=5)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, nan_ok=True), key


def test_a_loss_is_lower_where_it_is_better():
    ids = ["a", "b", "c"]
    found = paired(Loss(), [Answers(ids, [-2.0, -3.0, -4.0], [1] * 3)], [Answers(ids, [-1.0, -2.0, -3.0], [1] * 3)])
    assert found["value"] == pytest.approx(-1) and found["ci95"] == pytest.approx([-1, -1])
    assert (
        not found["higher_is_better"] and found["p_value"] is None and found["smallest"] == pytest.approx(0, abs=1e-9)
    )


def test_seeds_with_other_test_rows_are_resampled_over_all_rows():
    first, second = [f"r{i}" for i in range(60)], [f"r{i}" for i in range(30, 90)]
    before = [answers([0] * 60, first), answers([0] * 60, second)]
    after = [answers([1] * 30 + [0] * 30, first), answers([0] * 30 + [1] * 30, second)]
    found = paired(Accuracy(), before, after)
    assert found["n"] == 90 and found["value"] == pytest.approx(0.5)
    low, high = found["ci95"]
    assert 0.3 < low < 0.45 < 0.55 < high < 0.7


def test_pairs_of_other_rows_are_refused():
    with pytest.raises(ValueError, match="same rows"):
        paired(Accuracy(), [answers([1, 0], ["a", "b"])], [answers([1, 0], ["b", "a"])])
    with pytest.raises(ValueError, match="no pairs"):
        paired(Accuracy(), [answers([1])], [])


def test_the_interval_of_a_mean_over_seeds():
    # Rows are right with both seeds or with none: two seeds then say no more than one, sqrt(0.25 / 400) = 0.025.
    low, high = mean_interval(Accuracy(), [answers([1, 0] * 200)] * 2)
    assert (low, high) == pytest.approx((0.5 - 0.049, 0.5 + 0.049), abs=0.006)
    # Right with one seed or the other: the mean over seeds is the same in every resample.
    assert mean_interval(Accuracy(), [answers([1, 0] * 50), answers([0, 1] * 50)]) == pytest.approx([0.5, 0.5])
    assert math.isfinite(low)
