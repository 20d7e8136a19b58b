"""Intervals: against published values, against simulation, and the properties that users rely on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shikomi.metrics import bootstrap, difference, mcnemar, measure, wilson
from shikomi.metrics.accuracy import Accuracy
from shikomi.metrics.chrf import ChrF
from shikomi.metrics.loss import Loss
from shikomi.metrics.macro_f1 import MacroF1


def test_wilson_gives_published_values() -> None:
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for right, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_stays_inside(case: tuple[int, int]) -> None:
    right, n = case
    low, high = wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1 and low < high
    # rounding at 1e-12: the interval of the wrong ones is the mirror image
    assert wilson(n - right, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_refuses_what_is_no_proportion() -> None:
    for right, n in [(0, 0), (3, 2), (-1, 4)]:
        with pytest.raises(ValueError):
            wilson(right, n)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(2, 8) == mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(0, 2000) < 1e-300  # and no overflow on the way
    assert mcnemar(900, 1100) == pytest.approx(8.5e-6, rel=0.05)


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval() -> None:
    rng = np.random.default_rng(1)
    nll, tokens = rng.gamma(2, 1, 400), [1] * 400
    low, high = measure(Loss(), (-nll).tolist(), tokens)["ci95"]
    half = 1.96 * nll.std() / 20
    assert low == pytest.approx(nll.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(nll.mean() + half, abs=0.15 * half)


def test_intervals_cover_the_truth_about_95_times_of_100() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(300):
        nll = rng.exponential(1.0, 200)
        low, high = bootstrap(Loss(), Loss().statistics((-nll).tolist(), [1] * 200), resamples=400, seed=seed)
        covered += low <= 1.0 <= high
    assert 0.90 <= covered / 300 <= 0.985


def test_intervals_are_seeded_and_independent_of_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions, references = list("abcab" * 9), list("abbaa" * 9)
    first = measure(MacroF1(), predictions, references)
    assert first == measure(MacroF1(), predictions, references)
    assert first["interval"] == "bootstrap"
    assert first["ci95"] != measure(MacroF1(), predictions, references, seed=1)["ci95"]
    monkeypatch.setattr("shikomi.metrics._intervals._COUNTS_AT_ONCE", 500)
    assert first == measure(MacroF1(), predictions, references)


def test_more_rows_give_a_narrower_interval() -> None:
    few = measure(Accuracy(), list("aab"), list("aaa"))
    many = measure(Accuracy(), list("aab" * 100), list("aaa" * 100))
    assert few["interval"] == "wilson" and few["value"] == many["value"]
    assert np.diff(many["ci95"])[0] < np.diff(few["ci95"])[0] / 5


def test_pairing_sees_what_two_separate_intervals_do_not() -> None:
    rng = np.random.default_rng(3)
    truth = ["x"] * 200
    before = ["x" if rng.random() < 0.5 else "y" for _ in truth]
    after = ["x" if b == "x" or rng.random() < 0.2 else "y" for b in before]
    alone = [measure(Accuracy(), side, truth) for side in (before, after)]
    assert alone[0]["ci95"][1] > alone[1]["ci95"][0]  # they overlap
    both = difference(Accuracy(), before, after, truth)
    assert both["ci95"][0] > 0 and both["p_value"] is not None and both["p_value"] < 0.001
    assert both["lost"] == 0 and both["gained"] == round(200 * both["value"])


def test_a_difference_of_a_system_with_itself_is_zero() -> None:
    answers, truth = ["one two", "three four"], ["one two five", "four"]
    same = difference(ChrF(), answers, answers, truth)
    assert same["value"] == 0 and same["ci95"] == [0, 0] and same["p_value"] is None
    swapped = difference(ChrF(), truth, answers, truth)
    assert swapped["value"] < 0 and swapped["ci95"][1] < 0


def test_macro_f1_differences_allow_different_classes() -> None:
    truth = list("aabbcc") * 5
    gain = difference(MacroF1(), list("zzzzzz") * 5, truth, truth)
    assert gain["value"] == 1.0 and gain["gained"] is None


def test_a_difference_needs_the_same_rows() -> None:
    with pytest.raises(ValueError, match="predictions for"):
        difference(Accuracy(), ["a"], ["a", "b"], ["a", "b"])
