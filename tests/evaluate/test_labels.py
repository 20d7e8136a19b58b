"""Labels are scored exactly as one at a time, whatever is shared, sorted, split or left out."""

import numpy as np
import pytest
import torch
from fake_model import FakeModel, silent_ticks
from hypothesis import given, settings
from hypothesis import strategies as st

from shikomi.data.packing import pack_tree
from shikomi.evaluate.labels import prompt_groups, score_labels, without_last_tokens

EOT = 63
TOKENS = st.integers(0, 62)
LABELS = st.lists(st.lists(TOKENS, min_size=1, max_size=4), min_size=2, max_size=5, unique_by=tuple).map(
    lambda labels: [[*label, EOT] for label in labels]
)


def one_by_one(model: FakeModel, prompts: list[list[int]], labels: list[list[int]]) -> np.ndarray:
    return np.array([[model.sum_logp(prompt, label) for label in labels] for prompt in prompts])


@settings(max_examples=40, deadline=None)
@given(
    shared=st.lists(TOKENS, max_size=30),
    own=st.lists(st.lists(TOKENS, min_size=1, max_size=25), min_size=1, max_size=6),
    labels=LABELS,
    budget=st.sampled_from([8, 40, 100, 4096]),
)
def test_scores_are_those_of_one_at_a_time(
    shared: list[int], own: list[list[int]], labels: list[list[int]], budget: int
) -> None:
    model, prompts = FakeModel(), [shared + tail for tail in own]
    scores = score_labels(model, prompts, labels, budget)  # type: ignore[arg-type]
    np.testing.assert_allclose(scores, one_by_one(model, prompts, labels), rtol=1e-5)


def test_shared_examples_and_prompts_are_computed_once() -> None:
    shots, labels = list(range(40)), [[1, 2, EOT], [1, EOT], [5, EOT]]
    prompts = [[*shots, 50 + i, 7, 8] for i in range(5)]
    model = FakeModel()
    score_labels(model, prompts, labels)  # type: ignore[arg-type]
    # the shots, then for each row its 3 tokens and the labels without their last token
    assert model.rows == 40 + 5 * (3 + 2 + 1 + 1)


def test_rows_of_a_micro_batch_stay_within_the_budget_and_progress_reaches_the_end() -> None:
    rng = np.random.default_rng(0)
    shots = rng.integers(0, 62, 100).tolist()
    prompts = [shots + rng.integers(0, 62, rng.integers(5, 60)).tolist() for _ in range(50)]
    model, (ticks, progress) = FakeModel(), silent_ticks()
    score_labels(model, prompts, [[1, EOT], [2, EOT]], 300, progress)  # type: ignore[arg-type]
    assert max(model.batches) <= 300
    assert sum(model.batches) < 0.5 * sum(map(len, prompts))
    assert ticks[0] == (0, 50) and ticks[-1] == (50, 50) and ticks == sorted(ticks)


def test_prompts_of_two_kinds_do_not_spoil_each_other() -> None:
    many, few = [9] * 200, [9] * 100 + [3]
    prompts = [[*(many if i % 2 else few), i, i] for i in range(8)]
    groups = list(prompt_groups(prompts, 4, 250))
    assert sorted(row for group in groups for row in group) == list(range(8))
    model = FakeModel()
    score_labels(model, prompts, [[1, EOT], [2, EOT]], 250)  # type: ignore[arg-type]
    assert max(model.batches) <= 250 and model.rows < 0.5 * sum(map(len, prompts))


def test_a_label_that_begins_another_wins_only_where_it_is_the_answer() -> None:
    class Counting(FakeModel):
        """Prefers token 5 after anything, then 6 after 5 in contexts that start with 1, else the end."""

        def logp(self, context: tuple[int, ...], target: int) -> float:
            likely = 5 if context[-1] not in (5, 6) else 6 if context[0] == 1 and context[-1] == 5 else EOT
            return float(np.log(0.9 if target == likely else 0.1 / 63))

    labels = [[5, EOT], [5, 6, EOT]]
    scores = score_labels(Counting(), [[1, 2], [3, 4]], labels)  # type: ignore[arg-type]
    assert scores.argmax(axis=1).tolist() == [1, 0]


@pytest.mark.parametrize("labels", [[[5], [5, 6]], [[5, 6], [5, 6]], [[5, 9], [5, 6], [5]]])
def test_labels_without_an_end_are_refused_where_one_begins_another(labels: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="end of turn"):
        score_labels(FakeModel(), [[1, 2]], labels)  # type: ignore[arg-type]


def test_one_token_labels_need_no_rows_of_their_own() -> None:
    packed = without_last_tokens(pack_tree([[1, 2, 3]], [[[4], [5]]]))
    assert packed.ids.tolist() == [1, 2, 3] and packed.lengths == [3] and packed.scored.tolist() == [2, 2]
    model = FakeModel()
    with torch.no_grad():
        logp = model.score(packed).logp
    assert logp.tolist() == pytest.approx([model.sum_logp([1, 2, 3], [4]), model.sum_logp([1, 2, 3], [5])])
