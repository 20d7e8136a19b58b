"""One pass over all data: every problem at once, everything counted."""

import json

import pytest

from shikomi.data.check import MOST_LABELS, Scan, labels_of, load_conversations
from shikomi.data.checkup import checkup
from shikomi.data.conversation import Conversation
from shikomi.data.encode import Encoder
from shikomi.data.split import row_key, split_rows
from shikomi.errors import BadInput
from shikomi.recipe import DataSpec, Source


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(path))


def errors(found):
    """(code, place) of every error."""
    return [(f.code, place) for f in found.findings if f.severity == "error" for place in f.places]


def pair(prompt, completion="a", **more):
    return {"prompt": prompt, "completion": completion, **more}


@pytest.fixture(scope="module")
def encoder(make_tokenizer):
    return Encoder(make_tokenizer("qwen2_5"), max_length=120)


def test_problems_of_all_files_come_together(tmp_path):
    first = jsonl(tmp_path / "a.jsonl", [pair("p"), {"prompt": "p"}, pair("p", " "), {"text": "t"}])
    (tmp_path / "b.jsonl").write_text('{"prompt": \n{"messages": []}\n', encoding="utf-8")
    spec = DataSpec(
        train=(first, Source(path=str(tmp_path / "b.jsonl")), Source(path=str(tmp_path / "c.jsonl"))),
        test=(Source(path=str(tmp_path / "d.jsonl")),),
    )
    found = checkup(spec)
    places = errors(found)
    assert {(code, place.file.rsplit("/", 1)[-1], place.line) for code, place in places} == {
        ("D103", "a.jsonl", 2),
        ("D105", "a.jsonl", 3),
        ("D104", "a.jsonl", 4),
        ("D102", "b.jsonl", 1),
        ("D106", "b.jsonl", 2),
        ("D101", "c.jsonl", None),
        ("D101", "d.jsonl", None),
    }
    [mixed] = [place.note for code, place in places if code == "D104"]
    assert "mixes row formats" in mixed and "prompt_completion, as on line 1" in mixed
    assert found.rows == {"train": 1, "test": 0} and found.errors == len(places) == 7


def test_each_file_may_have_its_own_format(tmp_path, encoder):
    spec = DataSpec(
        train=(
            jsonl(tmp_path / "a.jsonl", [pair("p", id=1), pair("q", note="x")]),
            jsonl(tmp_path / "b.jsonl", [{"text": "hello <|im_end|>"}]),
        )
    )
    scan = Scan(spec.train, spec)
    list(scan.encoded(encoder))
    report = scan.report
    assert scan.problems.all() == []
    assert report.formats == {"prompt_completion": 2, "text": 1}
    assert list(report.files.values()) == [2, 1]
    assert report.unused == ["id", "note"]
    assert (report.rows, report.kept, report.plain_as_chat, report.special_text) == (3, 3, 2, 1)
    assert report.tokens > report.trained_tokens > 0
    said = "\n".join(report.lines(120))
    assert "columns not used: id, note" in said
    assert "2 plain prompts became a conversation" in said and "1 rows hold special-token strings" in said


def test_cut_and_dropped_rows_are_counted(tmp_path, encoder):
    source = jsonl(tmp_path / "a.jsonl", [pair("p"), pair("p", "long answer " * 50), pair("long prompt " * 50)])
    scan = Scan([source], DataSpec(train=(source,)))
    lengths = [len(encoded.ids) for _, encoded in scan.encoded(encoder)]
    report = scan.report
    assert len(lengths) == 2 and max(lengths) == 120
    assert (report.rows, report.kept, report.truncated, report.too_long) == (3, 2, 1, 1)
    uncut = Encoder(encoder.tokenizer).encode_many(
        [item.conversation for item in Scan([source], DataSpec(train=(source,)))]
    )
    assert report.tokens == sum(lengths) and report.tokens_cut == len(uncut[1].ids) - 120
    assert report.longest == max(len(e.ids) for e in uncut)
    said = "\n".join(report.lines(120))
    assert "1 of 3 rows were longer than max_length 120" in said and "their answer begins after max_length" in said


def test_rows_without_a_target_are_counted(tmp_path, make_tokenizer):
    user = {"role": "user", "content": "q"}
    first, last = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b", "train": False}
    source = jsonl(tmp_path / "a.jsonl", [{"messages": [user, first, user, last]}, {"messages": [user, first]}])
    scan = Scan([source], DataSpec(train=(source,)))
    kept = list(scan.encoded(Encoder(make_tokenizer("qwen2_5"), train_on="last")))
    assert len(kept) == 1 and scan.report.dropped_no_target == 1
    assert "none of their tokens is trained" in scan.report.lines(None)[0]


def test_all_rows_too_long_is_an_error(tmp_path, encoder):
    source = jsonl(tmp_path / "a.jsonl", [pair("long prompt " * 50)] * 3)
    scan = Scan([source], DataSpec(train=(source,)))
    assert list(scan.encoded(encoder)) == []
    [problem] = scan.problems.all()
    assert "all rows are too long" in problem.what and "max_length=" in problem.fix
    found = checkup(DataSpec(train=(source,)), encoder=encoder)
    assert {finding.code for finding in found.findings} >= {"D112", "D702"} and found.errors


def test_refusals_of_the_template_are_placed(tmp_path, make_tokenizer):
    source = jsonl(tmp_path / "a.jsonl", [pair("p"), pair("p", system="s")])
    found = checkup(DataSpec(train=(source,)), encoder=Encoder(make_tokenizer("gemma")))
    [(code, place)] = errors(found)
    assert (code, place.line) == ("D112", 2) and "System role not supported" in place.note


def test_joined_without_space_is_said(tmp_path, make_tokenizer):
    source = jsonl(tmp_path / "a.jsonl", [pair("p"), pair("p "), pair("p", " a")])
    scan = Scan([source], DataSpec(train=(source,)))
    list(scan.encoded(Encoder(make_tokenizer("qwen2_5"), chat="never")))
    assert scan.report.joined_without_space == 1 and scan.report.plain_as_chat == 0


def test_labels_come_from_all_training_rows(tmp_path):
    train = jsonl(tmp_path / "a.jsonl", [{"t": "x", "l": label} for label in "cab"])
    test = jsonl(tmp_path / "b.jsonl", [{"t": "y", "l": "a"}])
    spec = DataSpec(train=(train,), test=(test,), prompt="{labels}: {t}", completion="{l}")
    assert labels_of(spec) == ("a", "b", "c")
    [item] = load_conversations(spec.test, spec)
    assert item.conversation.messages[0]["content"] == "a, b, c: y"
    [item] = load_conversations(spec.test, spec, labels=("x", "y"))
    assert item.conversation.messages[0]["content"] == "x, y: y"


def test_too_many_labels_for_a_prompt(tmp_path):
    train = jsonl(tmp_path / "a.jsonl", [{"t": "x", "l": str(n)} for n in range(MOST_LABELS + 1)])
    [(_, place)] = errors(checkup(DataSpec(train=(train,), prompt="{labels}: {t}", completion="{l}")))
    assert "too many answers" in place.note


def test_missing_training_file_is_named_once(tmp_path):
    missing = Source(path=str(tmp_path / "no.jsonl"))
    [(code, place)] = errors(checkup(DataSpec(train=(missing,), prompt="{labels}: {t}", completion="{l}")))
    assert code == "D101" and "no such file" in place.note


def test_load_conversations_raises_every_problem(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [pair("p"), pair(""), pair("p", 3)])
    with pytest.raises(BadInput) as error:
        load_conversations([source], DataSpec(train=(source,)))
    assert [p.line for p in error.value.problems] == [2, 3]
    only_prompts = jsonl(tmp_path / "b.jsonl", [{"t": "x"}])
    spec = DataSpec(train=(source,), prompt="{t}", completion="{l}")
    assert len(load_conversations([only_prompts], spec, labels=(), answer=False)) == 1


def test_problems_come_before_a_split_that_fails(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [pair("p"), pair("")])
    spec = DataSpec(train=(source,))
    with pytest.raises(BadInput, match="a.jsonl:2"):
        split_rows(Scan([source], spec).conversations(), 0.5, 0)


def conversations(texts):
    return [Conversation(({"role": "user", "content": t}, {"role": "assistant", "content": "a"})) for t in texts]


@pytest.mark.parametrize("n, fraction, expected", [(2, 0.05, 1), (20, 0.05, 1), (100, 0.1, 10), (10, 0.99, 9)])
def test_split_sizes(n, fraction, expected):
    rows = conversations(map(str, range(n)))
    train, validation = split_rows(rows, fraction, seed=0)
    assert sum(r in validation for r in rows) == expected
    assert all((r in train) != (r in validation) for r in rows)


def test_copies_stay_on_one_side():
    rows = conversations([str(n % 10) for n in range(40)])
    train, validation = split_rows(rows, 0.2, seed=1)
    sides = {r.messages[0]["content"]: set() for r in rows}
    for r in rows:
        sides[r.messages[0]["content"]].add(r in validation)
    assert all(len(side) == 1 for side in sides.values())
    assert sum(r in validation for r in rows) == 8


def test_split_depends_on_content_and_seed_not_on_order():
    rows = conversations(map(str, range(50)))
    chosen = {
        tuple(sorted(r.messages[0]["content"] for r in rows if r in split_rows(given, 0.2, seed)[1]))
        for seed, given in [(0, rows), (0, rows[::-1]), (1, rows)]
    }
    assert len(chosen) == 2
    assert row_key(rows[0], 0) != row_key(rows[0], 1)


def test_split_needs_two_different_rows():
    with pytest.raises(BadInput, match="all the same"):
        split_rows(conversations(["x", "x"]), 0.5, 0)
    with pytest.raises(BadInput, match="cannot be split off"):
        split_rows([], 0.5, 0)
