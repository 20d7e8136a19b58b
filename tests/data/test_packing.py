"""Packing must describe exactly the same (context, target) pairs as the examples one by one."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shikomi.data.packing import MIN_SHARED_PREFIX, Example, Packed, micro_batches, pack, pack_tree
from shikomi.data.pairs import Completion, Pair, Thumb, mismatched, pack_pairs, pack_thumbs, unshared_length


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


def completion(draw):
    ids = draw(st.lists(st.integers(0, 3), min_size=1, max_size=9))
    mask = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    return Completion(np.asarray(ids, np.int32), np.asarray(mask, bool))


@st.composite
def pair_lists(draw):
    stem = draw(st.lists(st.integers(0, 3), min_size=MIN_SHARED_PREFIX, max_size=30))
    out = []
    for row in range(draw(st.integers(1, 5))):
        prompt = np.asarray(
            draw(st.sampled_from([stem, [1], [1, 2]])) + draw(st.lists(st.integers(0, 3), max_size=4)), np.int32
        )
        out.append(Pair(prompt, completion(draw), completion(draw), float(row), 10 + row))
    return out


def expected(prompt, answer, number):
    whole = np.concatenate([prompt, answer.ids])
    return [(number, tuple(whole[: len(prompt) + k].tolist()), int(answer.ids[k])) for k in np.flatnonzero(answer.mask)]


@given(pair_lists(), st.booleans(), st.booleans())
def test_each_scored_token_is_predicted_from_its_own_prompt(pairs, share_prefix, score_prompts):
    found = pack_pairs(pairs, share_prefix, score_prompts)
    packed, answers = found.packed, [(p.prompt, c) for p in pairs for c in p.completions]
    wanted = [line for number, (prompt, c) in enumerate(answers) for line in expected(prompt, c, number)]
    if score_prompts:
        for number, p in enumerate(pairs, start=2 * len(pairs)):
            wanted += [(number, tuple(p.prompt[:k].tolist()), int(p.prompt[k])) for k in range(1, len(p.prompt))]
    assert scored_pairs(packed) == wanted
    assert found.chosen == list(range(0, 2 * len(pairs), 2)) and found.rejected == [i + 1 for i in found.chosen]
    assert found.margin == [p.margin for p in pairs]
    assert found.lengths == [c.n_targets for _, c in answers]
    assert found.prompt_tokens == len(wanted) - sum(found.lengths)
    assert packed.rows == [p.row for p in pairs for _ in range(2)]
    assert packed.n_tokens == sum(len(prompt) + len(c) for prompt, c in answers)
    assert [context(packed, end) for end in found.ends] == [
        (*prompt.tolist(), *c.ids.tolist()) for prompt, c in answers
    ]
    assert len(packed.ids) <= sum(map(len if share_prefix else unshared_length, pairs))
    if not share_prefix:
        assert len(packed.ids) == packed.n_tokens


def test_a_pair_is_one_prompt_with_two_children():
    answers = [Completion(np.arange(n, dtype=np.int32), np.ones(n, bool)) for n in (3, 4)]
    packed = pack_pairs([Pair(np.arange(20, dtype=np.int32), *answers)]).packed
    assert (packed.lengths, packed.parents) == ([20, 3, 4], [-1, 0, 0])
    assert packed.positions.tolist() == [*range(20), 20, 21, 22, 20, 21, 22, 23]
    assert packed.scored[0] == packed.scored[3] == 19
    apart = pack_pairs([Pair(np.arange(20, dtype=np.int32), *answers)], share_prefix=False).packed
    assert (apart.lengths, apart.parents) == ([20, 3, 20, 4], [-1, 0, -1, 2])


def test_prompts_that_begin_alike_share_that_beginning():
    answers = [Completion(np.asarray([7], np.int32), np.ones(1, bool))] * 2
    prompts = [np.asarray([*range(20), n], np.int32) for n in (50, 51)]
    packed = pack_pairs([Pair(p, *answers) for p in prompts]).packed
    assert packed.lengths == [20, 1, 1, 1, 1, 1, 1] and packed.parents == [-1, 0, 1, 1, 0, 4, 4]


def test_judged_answers_are_numbered_in_order():
    one = Completion(np.asarray([7, 8], np.int32), np.asarray([True, False]))
    thumbs = [Thumb(np.asarray([n, n], np.int32), one, n % 3 == 0, n) for n in range(4)]
    found = pack_thumbs(thumbs)
    assert (found.chosen, found.rejected, found.lengths) == ([0, 3], [1, 2], [1] * 4)
    assert found.packed.rows == [0, 1, 2, 3] and found.packed.segment.tolist() == [0, 1, 2, 3]
    assert found.packed.targets.tolist() == [7] * 4 and found.margin == []
    assert found.to("cpu").packed.ids.tolist() == found.packed.ids.tolist()


def test_mismatched_answers_fit_behind_their_new_prompt():
    short, long = (np.arange(n, dtype=np.int32) for n in (2, 6))
    full = [Completion(np.arange(n, dtype=np.int32), np.ones(n, bool)) for n in (5, 3)]
    found = mismatched([Thumb(short, full[0], True, 0), Thumb(long, full[1], False, 1)], max_length=8)
    assert [len(t.completion) for t in found] == [3, 2] and [len(t) for t in found] == [5, 8]
    assert [t.desirable for t in found] == [True, False]
    assert mismatched([Thumb(short, full[0], True)]) == []


def test_both_answers_of_a_pair_are_in_one_micro_batch():
    def pair(prompt, chosen, rejected):
        sides = [Completion(np.zeros(n, np.int32), np.ones(n, bool)) for n in (chosen, rejected)]
        return Pair(np.zeros(prompt, np.int32), *sides)

    pairs = [pair(10, 5, 5), pair(4, 3, 3), pair(30, 1, 9)]
    assert [len(p) for p in pairs] == [20, 10, 40] and [unshared_length(p) for p in pairs] == [30, 14, 70]
    assert [[len(p) for p in batch] for batch in micro_batches(pairs, 30)] == [[40], [20, 10]]
    assert [[len(p) for p in batch] for batch in micro_batches(pairs, 43, unshared_length)] == [[40], [20], [10]]
