"""Shots: balanced, seeded, short, and as earlier turns of the same conversation."""

from collections import Counter

import pytest
from evaluating import LABELS, conversation, label_rows

from shikomi.data.conversation import Conversation
from shikomi.data.encode import Encoder
from shikomi.evaluate.baselines import (
    answer_of,
    choose_shots,
    few_shot_prompts,
    input_of,
    majority_label,
    with_shots,
)


def test_majority_is_the_most_frequent_and_ties_go_by_name() -> None:
    assert majority_label(["b", "a", "b"]) == "b"
    assert majority_label(["b", "a"]) == majority_label(["a", "b"]) == "a"


@pytest.mark.parametrize("shots", [1, 3, 4, 7])
def test_shots_are_balanced_over_labels_and_differ_by_seed(shots: int) -> None:
    rows = label_rows(60) + (conversation("a rare one", "sound"),)
    chosen = choose_shots(rows, shots, seed=0, balanced=True)
    assert chosen == choose_shots(rows, shots, seed=0, balanced=True)
    counts = Counter(map(answer_of, chosen))
    assert sum(counts.values()) == shots and len({id(row) for row in chosen}) == shots
    assert len(counts) == min(shots, 4)  # "sound" has one row: every label before any has a second
    others = [choose_shots(rows, shots, seed, balanced=True) for seed in range(1, 6)]
    assert any(other != chosen for other in others)


def test_shots_come_from_the_shorter_half() -> None:
    rows = [conversation("word " * n, "x") for n in range(1, 41)]
    chosen = choose_shots(rows, 8, seed=3, balanced=False)
    assert max(len(input_of(row)) for row in chosen) <= len("word " * 20)
    assert choose_shots(rows[:3], 8, seed=3, balanced=False) and choose_shots([], 3, 0, True) == []
    assert len(choose_shots(rows[:3], 8, seed=3, balanced=False)) == 3


def test_shots_are_earlier_turns_after_the_system_message() -> None:
    row, shot = conversation("q", "a", system="Be brief."), conversation("q0", "a0", system="Be brief.")
    made = with_shots(row, [shot])
    assert [(m["role"], m["content"]) for m in made.messages] == [
        ("system", "Be brief."),
        ("user", "q0"),
        ("assistant", "a0"),
        ("user", "q"),
        ("assistant", "a"),
    ]
    assert made.completion_from == 4 and answer_of(made) == "a" and with_shots(row, []) == row


def test_shots_of_plain_text_are_blocks_before_the_prompt(encoder: Encoder) -> None:
    plain = Encoder(encoder.tokenizer, chat="never")
    row, shots = conversation("q: ", "a"), [conversation("q0: ", "a0"), conversation("q1: ", "a1")]
    assert plain.tokenizer.decode(plain.encode_prompt(with_shots(row, shots))) == "q0: a0\n\nq1: a1\n\nq: "


def test_a_few_shot_prompt_ends_as_the_prompt_alone(encoder: Encoder) -> None:
    row, shot = label_rows(2)
    alone = encoder.encode_prompt(row)
    few = few_shot_prompts([row], [shot], encoder, max_length=10_000, room=4)
    assert few.used == [1] and few.notes() == []
    assert few.prompts[0][-len(alone) :] == alone
    before = few.prompts[0][: -len(alone)]
    # the shot stands there as it was trained on, end of turn included
    ids = encoder.encode(shot).ids.tolist()
    assert before[: len(ids)] == ids


def test_rows_without_room_get_fewer_shots_from_the_end(encoder: Encoder) -> None:
    short, long = conversation("short", "x"), conversation("long " * 40, "x")
    shots = [conversation(f"shot {i} " * 5, "y") for i in range(3)]
    whole = [len(encoder.encode_prompt(with_shots(row, shots))) for row in (short, long)]
    limit = whole[0] + 10
    few = few_shot_prompts([short, long], shots, encoder, limit, room=4)
    assert few.used[0] == 3 and few.used[1] < 3
    assert all(len(p) + 4 <= limit for p, used in zip(few.prompts, few.used, strict=True) if used)
    assert few.prompts[1] == encoder.encode_prompt(with_shots(long, shots[: few.used[1]]))
    assert few.notes() == ["few-shot: 1 of 2 rows had room for fewer than 3 examples"]


def test_inputs_and_answers_of_all_kinds_of_rows() -> None:
    assert LABELS[0] == answer_of(label_rows(1)[0])
    assert input_of(conversation("q", "a", system="s")) == "q"
    open_prompt = conversation("q", None)
    assert answer_of(open_prompt) is None and input_of(open_prompt) == "q"
    text = Conversation(text="some text")
    assert answer_of(text) is None and input_of(text) == "some text"
    assert answer_of(Conversation(plain=("p", "c"))) == "c" and input_of(Conversation(plain=("p", "c"))) == "p"
