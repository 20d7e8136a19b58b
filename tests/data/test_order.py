"""The order of rows is a function of (seed, epoch, index) only."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shikomi.data.order import Steps, epoch_order, epoch_size


@given(n=st.integers(1, 200), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000))
def test_an_epoch_has_every_row_once_and_is_repeatable(n, seed, epoch):
    order = epoch_order(n, seed, epoch)
    assert sorted(order) == list(range(n))
    assert np.array_equal(order, epoch_order(n, seed, epoch))


def test_epochs_and_seeds_differ():
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_order_is_the_same_in_every_version():
    assert epoch_order(8, seed=7, epoch=1).tolist() == [6, 3, 1, 0, 2, 4, 7, 5]


def test_without_shuffling_rows_keep_their_order():
    assert epoch_order(5, 3, 9, shuffle=False).tolist() == [0, 1, 2, 3, 4]
    assert epoch_order(3, 3, 0, shuffle=False, weights=np.array([1.0, 2.0, 1.0])).tolist() == [0, 1, 1, 2]


@given(
    n=st.integers(1, 60),
    other=st.integers(1, 60),
    weight=st.floats(0.05, 3.5),
    seed=st.integers(0, 9),
    shuffle=st.booleans(),
)
def test_weights_set_how_often_rows_are_seen(n, other, weight, seed, shuffle):
    weights = np.array([weight] * n + [1.0] * other)
    if epoch_size(n + other, weights) < 1:
        return
    for epoch in range(3):
        order = epoch_order(n + other, seed, epoch, shuffle, weights)
        counts = np.bincount(order, minlength=n + other)
        assert len(order) == epoch_size(n + other, weights)
        if weight != 1.0:
            assert set(counts[n:]) == {1}
            assert set(counts[:n]) <= {int(weight), int(weight) + 1}
            assert counts[:n].sum() == int(weight) * n + round((weight - int(weight)) * n)


def test_the_fractional_part_reaches_every_row():
    weights = np.full(10, 0.3)
    seen = np.concatenate([epoch_order(10, 0, epoch, True, weights) for epoch in range(4)])
    assert len(seen) == 12 and set(seen) == set(range(10))


@given(n=st.integers(1, 50), batch=st.integers(1, 20), seed=st.integers(0, 5))
def test_steps_walk_through_epochs(n, batch, seed):
    steps = Steps(n, batch, seed)
    rows = [steps.indices(step) for step in range(3 * steps.per_epoch)]
    for epoch in range(3):
        part = np.concatenate(rows[epoch * steps.per_epoch : (epoch + 1) * steps.per_epoch])
        assert np.array_equal(part, epoch_order(n, seed, epoch))
    assert all(1 <= len(r) <= batch for r in rows)
    fresh = Steps(n, batch, seed)
    assert np.array_equal(fresh.indices(2 * steps.per_epoch), rows[2 * steps.per_epoch])


def test_number_of_steps():
    steps = Steps(30, 3, 0)
    assert steps.per_epoch == 10
    assert [steps.total(e) for e in (0.01, 0.1, 0.3, 0.35, 1, 2.5)] == [1, 1, 3, 4, 10, 25]
    assert steps.total(1, max_steps=7) == 7
    assert steps.epoch(15) == 1.5
    assert Steps(31, 3, 0).per_epoch == 11 and len(Steps(31, 3, 0).indices(10)) == 1


def test_no_rows_are_refused():
    with pytest.raises(ValueError):
        Steps(0, 4, 0)
    with pytest.raises(ValueError):
        Steps(2, 4, 0, weights=np.array([0.1, 0.1]))
