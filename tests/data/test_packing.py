"""Packing must describe exactly the same (context, target) pairs as the examples one by one."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shikomi.data.packing import MIN_SHARED_PREFIX, Example, Packed, micro_batches, pack, pack_tree


def context(packed: Packed, row: int) -> tuple[int, ...]:
    """Tokens that the hidden state at `row` sees, oldest first, found by walking the parents."""
    offsets = packed.offsets
    segment = max(k for k, start in enumerate(offsets) if start <= row and packed.lengths[k] > 0)
    tokens: list[int] = packed.ids[offsets[segment] : row + 1].tolist()
    while (segment := packed.parents[segment]) >= 0:
        tokens = packed.ids[offsets[segment] : offsets[segment] + packed.lengths[segment]].tolist() + tokens
    return tuple(tokens)


def scored_pairs(packed: Packed) -> list[tuple[int, tuple[int, ...], int]]:
    rows, targets, numbers = packed.scored.tolist(), packed.targets.tolist(), packed.segment.tolist()
    return [(n, context(packed, r), t) for n, r, t in zip(numbers, rows, targets, strict=True)]


def expected_pairs(examples: list[Example]) -> list[tuple[int, tuple[int, ...], int]]:
    return [
        (n, tuple(e.ids[:i].tolist()), int(e.ids[i])) for n, e in enumerate(examples) for i in np.flatnonzero(e.mask)
    ]


def example(ids: list[int], trained: list[int], row: int = 0) -> Example:
    mask = np.zeros(len(ids), bool)
    mask[trained] = True
    return Example(np.asarray(ids, np.int32), mask, row)


@st.composite
def example_lists(draw):
    stems = draw(st.lists(st.lists(st.integers(0, 3), min_size=0, max_size=40), min_size=1, max_size=3))
    out = []
    for row in range(draw(st.integers(1, 8))):
        stem = draw(st.sampled_from(stems))
        ids = stem + draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
        trained = draw(st.sets(st.integers(1, max(1, len(ids) - 1)), max_size=6)) if len(ids) > 1 else set()
        out.append(example(ids, sorted(trained), row))
    return out


@given(example_lists(), st.booleans())
def test_every_target_is_predicted_from_its_own_context(examples, share_prefix):
    packed = pack(examples, share_prefix)
    assert scored_pairs(packed) == expected_pairs(examples)
    assert packed.n_tokens == sum(len(e) for e in examples)
    assert packed.rows == [e.row for e in examples]
    assert sum(packed.lengths) == len(packed.ids) <= packed.n_tokens
    assert all(parent < k for k, parent in enumerate(packed.parents))
    assert all(length > 0 for length in packed.lengths)
    for row, position in enumerate(packed.positions.tolist()):
        assert position == len(context(packed, row)) - 1


@given(example_lists())
def test_shared_prefixes_are_long_enough_and_have_several_children(examples):
    packed = pack(examples, share_prefix=True)
    for k in {p for p in packed.parents if p >= 0}:
        assert packed.lengths[k] >= MIN_SHARED_PREFIX
        assert packed.parents.count(k) >= 2


def test_common_untrained_prefix_is_computed_once():
    stem = list(range(100, 130))
    examples = [example([*stem, 1, 2], [30, 31]), example([5] * 20, [19]), example([*stem, 7], [30])]
    packed = pack(examples, share_prefix=True)
    assert len(packed.ids) == 30 + 2 + 1 + 20
    assert sorted(packed.lengths) == [1, 2, 20, 30]
    # both first own tokens are predicted by the same last row of the shared segment
    parent = packed.lengths.index(30)
    last = packed.offsets[parent] + 29
    assert packed.scored.tolist().count(last) == 2


def test_trained_prefix_is_not_shared():
    stem = list(range(100, 130))
    examples = [example([*stem, 1], [3, 30]), example([*stem, 2], [30])]
    assert len(pack(examples, share_prefix=True).ids) == 62


def test_partition_saves_the_most_tokens():
    short, long = list(range(20)), list(range(200))
    examples = [example([*short, 900, 1], [21]), example([*long, 1], [200]), example([*long, 2], [200])]
    # one group of three would save 2 * 20; the pair alone saves 200
    assert len(pack(examples, share_prefix=True).ids) == 22 + 202


def best_saving(ids: list[np.ndarray], limits: list[int]) -> int:
    """Most tokens that sharing can save, over all partitions into neighbours of the sorted order."""
    order = sorted(range(len(ids)), key=lambda i: ids[i].tobytes())
    best = 0
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        groups = [[order[0]]]
        for cut, i in zip(cuts, order[1:], strict=True):
            if cut:
                groups.append([])
            groups[-1].append(i)
        saved = 0
        for members in groups:
            columns = zip(*(ids[i].tolist() for i in members), strict=False)
            common = next((n for n, column in enumerate(columns) if len(set(column)) > 1), 99)
            common = min(common, *(limits[i] for i in members))
            saved += (len(members) - 1) * common if common >= MIN_SHARED_PREFIX else 0
        best = max(best, saved)
    return best


@given(example_lists())
def test_sharing_saves_as_many_tokens_as_any_partition_would(examples):
    packed = pack(examples, share_prefix=True)
    limits = [int(e.mask.argmax()) if e.mask.any() else len(e) - 1 for e in examples]
    assert packed.n_tokens - len(packed.ids) == best_saving([e.ids for e in examples], limits)


def test_identical_examples_keep_their_trained_tokens_apart():
    ids = list(range(50))
    packed = pack([example(ids, [40, 41], 3), example(ids, [40, 41], 4)], share_prefix=True)
    assert packed.lengths == [40, 10, 10]
    assert packed.segment.tolist() == [0, 0, 1, 1]


def test_pack_tree_scores_every_completion_token():
    prompts = [[1, 2, 3], [4]]
    completions = [[[5, 6], [7]], [[8, 9, 10]]]
    packed = pack_tree(prompts, completions)
    assert scored_pairs(packed) == [
        (0, (1, 2, 3), 5),
        (0, (1, 2, 3, 5), 6),
        (1, (1, 2, 3), 7),
        (2, (4,), 8),
        (2, (4, 8), 9),
        (2, (4, 8, 9), 10),
    ]
    assert len(packed.ids) == 3 + 2 + 1 + 1 + 3
    assert packed.n_tokens == 5 + 4 + 4


def test_pack_tree_shares_the_beginning_of_prompts():
    shots = list(range(100, 140))
    packed = pack_tree([[*shots, 1], [*shots, 2, 3]], [[[5], [6]], [[5], [6]]])
    assert len(packed.ids) == 40 + 1 + 2 + 4
    separate = pack_tree([[*shots, 1], [*shots, 2, 3]], [[[5], [6]], [[5], [6]]], share_prefix=False)
    assert scored_pairs(packed) == scored_pairs(separate)
    assert packed.positions.max() == separate.positions.max() == 42


@pytest.mark.parametrize(
    "call",
    [
        lambda: pack([]),
        lambda: pack([example([], [])]),
        lambda: pack([example([1, 2], [0])]),
        lambda: pack_tree([[]], [[[1]]]),
        lambda: pack_tree([[1]], [[[]]]),
        lambda: pack_tree([[1]], []),
    ],
)
def test_impossible_batches_are_refused(call):
    with pytest.raises(ValueError):
        call()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 100))
def test_micro_batches_keep_every_example_and_the_budget(lengths, budget):
    examples = [example([1] * n, [], row) for row, n in enumerate(lengths)]
    batches = micro_batches(examples, budget)
    assert sorted(e.row for b in batches for e in b) == list(range(len(lengths)))
    sizes = [sum(len(e) for e in b) for b in batches]
    assert all(size <= budget or len(b) == 1 for size, b in zip(sizes, batches, strict=True))
    assert sizes == sorted(sizes, reverse=True)


def test_micro_batches_are_first_fit_decreasing():
    examples = [example([1] * n, [], n) for n in (2, 6, 5, 4, 3)]
    assert [[len(e) for e in b] for b in micro_batches(examples, 10)] == [[6, 4], [5, 3, 2]]
