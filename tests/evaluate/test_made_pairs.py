"""Pairs from samples: which are made of which scores, going on where it stopped, and rankers that are real."""

import json

import pytest

from shikomi.data.formats import parse_row
from shikomi.errors import BadInput
from shikomi.evaluate.made_pairs import Answer, Counts, Pairing, make_pairs, pairs_from_column, pairs_of, state_path
from shikomi.evaluate.ranking import asked, by_function, by_reference, by_reward
from shikomi.recipe import DataSpec, Source

SPEC = DataSpec(train=(Source(path="-"),))


def prompts(count: int, **more):
    made = []
    for i in range(count):
        row = {"prompt": f"question {i}", "completion": f"answer {i}", **more}
        made.append(asked(parse_row(row, SPEC, ("rows", i + 1)), row, ("rows", i + 1)))
    return made


def lengths(some, answers):
    return [[float(len(answer)) for answer in several] for several in answers]


def sampler(calls=None):
    """Two answers of different lengths to each prompt, by the seed."""

    def sample(some, seed):
        if calls is not None:
            calls.append([one.prompt for one in some])
        return [[Answer(f"a{seed % 97}"), Answer(f"longer to {one.prompt}")] for one in some]

    return sample


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "pairing, made",
    [
        (Pairing(), [("best", "worst", 3.0)]),
        (Pairing(all_pairs=True), [("best", "mid", 1.0), ("best", "worst", 3.0), ("mid", "worst", 2.0)]),
        (Pairing(all_pairs=True, min_margin=2), [("best", "worst", 3.0), ("mid", "worst", 2.0)]),
        (Pairing(min_margin=3.5), []),
    ],
)
def test_the_best_stands_against_the_worst(pairing, made):
    ranked = [("mid", 2.0), ("worst", 0.0), ("best", 3.0)]
    counts = Counts()
    assert list(pairs_of(ranked, pairing, True, counts)) == made
    assert counts.pairs == len(made)


def test_ties_and_equal_answers_make_no_pair():
    counts = Counts()
    assert not list(pairs_of([("a", 1.0), ("b", 1.0)], Pairing(), True, counts))
    assert not list(pairs_of([("a", 1.0), (" a", 2.0)], Pairing(), True, counts))
    assert (counts.ties, counts.same, counts.pairs) == (1, 1, 0)
    ranked = [("own", 5.0), ("other", 6.0)]
    assert not list(pairs_of(ranked, Pairing(reference_chosen=True), True, counts)) and counts.reference_lower == 1
    assert list(pairs_of(ranked, Pairing(reference_chosen=True), False, counts)) == [("own", "other", -1.0)]
    several = [("own", 9.0), ("x", 3.0), ("y", 1.0)]
    assert list(pairs_of(several, Pairing(reference_chosen=True), True, counts)) == [("own", "y", 8.0)]


def test_rows_margins_and_length_bias(tmp_path):
    out = tmp_path / "pairs.jsonl"
    counts = make_pairs(prompts(3), out, sampler(), lengths, Pairing(), {}, block=2)
    first = rows_of(out)[0]
    assert first["prompt"] == "question 0" and first["chosen"] == "longer to question 0"
    assert first["margin"] == len(first["chosen"]) - len(first["rejected"])
    assert (counts.pairs, counts.answers, counts.chosen_longer) == (3, 6, 3)
    assert "chosen is longer in 100% of the pairs" in counts.lines()[-1]


def test_conversations_are_written_as_messages_in_every_row(tmp_path):
    row = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]}
    chat = asked(parse_row(row, SPEC, ("rows", 9), answer=False), row, ("rows", 9))
    out = tmp_path / "pairs.jsonl"
    make_pairs([*prompts(1), chat], out, sampler(), lengths, Pairing(), {})
    first, second = rows_of(out)
    assert first["prompt"] == [{"role": "user", "content": "question 0"}]
    assert second["prompt"] == row["messages"] and second["chosen"][0]["role"] == "assistant"


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_it_goes_on_where_it_was_killed_and_gives_the_same_file(stop_at, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "pairs.jsonl"
    expected = make_pairs(prompts(9), whole, sampler(), lengths, Pairing(), {"model": "m"}, block=2)
    calls = []

    def killed(some, seed):
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return sampler(calls)(some, seed)

    with pytest.raises(KeyboardInterrupt):
        make_pairs(prompts(9), out, killed, lengths, Pairing(), {"model": "m"}, block=2)
    with out.open("a") as file:
        file.write('{"prompt": "half a li')  # what a kill in the middle of a write leaves
    again = []
    counts = make_pairs(prompts(9), out, sampler(again), lengths, Pairing(), {"model": "m"}, block=2)
    assert out.read_bytes() == whole.read_bytes() and counts == expected
    assert sum(map(len, again)) == 9 - 2 * stop_at
    assert make_pairs(prompts(9), out, killed, lengths, Pairing(), {"model": "m"}, block=2) == expected


def test_another_file_is_not_touched(tmp_path):
    out = tmp_path / "pairs.jsonl"
    make_pairs(prompts(4), out, sampler(), lengths, Pairing(), {"model": "m"})
    before = out.read_bytes()
    with pytest.raises(BadInput, match="other settings") as caught:
        make_pairs(prompts(4), out, sampler(), lengths, Pairing(), {"model": "n"})
    assert "model: 'n'" in caught.value.problems[0].found
    with pytest.raises(BadInput, match="other prompts"):
        make_pairs(prompts(4)[::-1], out, sampler(), lengths, Pairing(), {"model": "m"})
    with pytest.raises(BadInput, match="other prompts"):
        make_pairs(prompts(3), out, sampler(), lengths, Pairing(), {"model": "m"})
    assert out.read_bytes() == before
    calls = []
    make_pairs(prompts(6), out, sampler(calls), lengths, Pairing(), {"model": "m"})
    assert calls == [["question 4", "question 5"]] and len(rows_of(out)) == 6, "prompts may be added at the end"
    state_path(out).unlink()
    with pytest.raises(BadInput, match="nothing says how it was made"):
        make_pairs(prompts(4), out, sampler(), lengths, Pairing(), {"model": "m"})


def test_empty_and_unfinished_answers_are_counted(tmp_path):
    def sample(some, seed):
        return [[Answer(" "), Answer("a"), Answer("b" * 5, ended=False)] for _ in some]

    counts = make_pairs(prompts(2), tmp_path / "p.jsonl", sample, lengths, Pairing(), {})
    assert (counts.empty, counts.not_ended, counts.pairs) == (2, 2, 2)
    assert any("were cut at --max-new-tokens" in line for line in counts.lines())


def test_the_rows_own_answer_may_be_the_chosen_one(tmp_path):
    counts = make_pairs(prompts(2), tmp_path / "p.jsonl", sampler(), None, Pairing(reference_chosen=True), {})
    assert counts.pairs == 2
    assert rows_of(tmp_path / "p.jsonl")[1] == {"prompt": "question 1", "chosen": "answer 1", "rejected": "a0"}
    row = {"prompt": "no answer here"}
    bare = asked(parse_row(row, SPEC, ("rows", 7), answer=False), row, ("rows", 7))
    with pytest.raises(BadInput, match="has no answer") as caught:
        make_pairs([bare], tmp_path / "q.jsonl", sampler(), None, Pairing(reference_chosen=True), {})
    assert caught.value.problems[0].line == 7


@pytest.mark.parametrize("name", ["chrf", "rougeL"])
def test_nearer_to_the_reference_is_better(name):
    one = prompts(1)
    near, exact, far = by_reference(name)(one, [["answer zero", "answer 0", "no idea"]])[0]
    assert exact > near > far >= 0
    assert exact == pytest.approx(100 if name == "chrf" else 1)
    with pytest.raises(BadInput, match="no such score"):
        by_reference("bleu")


def test_a_function_of_the_users_ranks(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Weight:\n    of: float = 2.0\n"
        "def score(prompt, answers, row):\n    return [Weight().of * len(a) + row['bonus'] for a in answers]\n"
        "def short(prompt, answers, row):\n    return [1.0]\n"
        "def broken(prompt, answers, row):\n    return 1 / 0\n"
    )
    one = prompts(1, bonus=3)
    assert by_function(f"{file}:score")(one, [["ab", "c"]]) == [[7.0, 5.0]]
    with pytest.raises(BadInput, match="returned something else"):
        by_function(f"{file}:short")(one, [["ab", "c"]])
    with pytest.raises(BadInput, match="raised ZeroDivisionError") as caught:
        by_function(f"{file}:broken")(one, [["ab", "c"]])
    assert caught.value.problems[0].line == 1
    with pytest.raises(BadInput, match="no function `scor`") as caught:
        by_function(f"{file}:scor")
    assert "score" in caught.value.problems[0].allowed
    with pytest.raises(BadInput, match="no such file"):
        by_function("nowhere.py:score")
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(BadInput, match="ModuleNotFoundError"):
        by_function(f"{tmp_path / 'bad.py'}:score")


def test_a_reward_model_gets_prompts_with_their_answers():
    row = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]}
    chat = asked(parse_row(row, SPEC, ("rows", 9), answer=False), row, ("rows", 9))
    got = []

    def score(rows):
        got.extend(rows)
        return list(range(len(rows)))

    assert by_reward(score)([*prompts(1), chat], [["a", "b"], ["c"]]) == [[0.0, 1.0], [2.0]]
    assert got[:2] == [("question 0", "a"), ("question 0", "b")]
    assert got[2] == {"messages": [*row["messages"], {"role": "assistant", "content": "c"}]}


def test_answers_that_were_scored_before(tmp_path):
    rated = tmp_path / "rated.jsonl"
    rows = [
        ("q1", "good", 5),
        ("q1", "bad", "1.5"),
        ("q1", "fair", 3),
        ("q2", "only", 4),
        ("q3", "x", True),
        ("q3", "y", False),
    ]
    rated.write_text("".join(json.dumps({"prompt": p, "completion": a, "label": s}) + "\n" for p, a, s in rows))
    out = tmp_path / "pairs.jsonl"
    counts = pairs_from_column(rated, "label", {}, None, Pairing(), out)
    assert rows_of(out) == [
        {"prompt": "q1", "chosen": "good", "rejected": "bad", "margin": 3.5},
        {"prompt": "q3", "chosen": "x", "rejected": "y", "margin": 1.0},
    ]
    assert (counts.prompts, counts.pairs) == (3, 2)
    with pytest.raises(BadInput, match="no column `stars`") as caught:
        pairs_from_column(rated, "stars", {}, None, Pairing(), tmp_path / "other.jsonl")
    assert len(caught.value.problems) == 6
    with pytest.raises(BadInput, match="`prompt` is not a number"):
        pairs_from_column(rated, "prompt", {}, None, Pairing(), tmp_path / "other.jsonl")
    with pytest.raises(BadInput, match="no prompt has two answers"):
        pairs_from_column(rated, "label", {}, None, Pairing(min_margin=9), tmp_path / "other.jsonl")
    assert not (tmp_path / "other.jsonl").exists()
