"""Rows of preferences: what each row becomes, and what is said about rows that are wrong."""

import pytest

from shikomi.data.formats import row_format
from shikomi.data.implicit import common_length, text_prompt
from shikomi.data.preferences import Judgement, answer_of, parse_pair, parse_thumbs, recognise_preference
from shikomi.errors import BadInput
from shikomi.recipe import DataSpec, Source

WHERE = ("rows.jsonl", 7)


def spec(**options):
    return DataSpec(train=(Source(path="rows.jsonl"),), **options)


def pair(row, labels=None, **options):
    return parse_pair(row, spec(**options), WHERE, labels)


def thumbs(row, **options):
    return parse_thumbs(row, spec(**options), WHERE, None)


def problems(read, row, **options):
    with pytest.raises(BadInput) as error:
        read(row, **options)
    return error.value.problems


def turns(text):
    """'u:q a:x' as messages."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": names[part[0]], "content": part[2:]} for part in text.split()]


def told(conversation):
    """A conversation as 'u:q | a:x', the answer behind the bar."""
    parts = [f"{m['role'][0]}:{m['content']}" for m in conversation.messages]
    at = conversation.completion_from
    return " ".join(parts[:at]) + " | " + " ".join(parts[at:])


def test_strings_with_a_prompt():
    found = pair({"prompt": "p", "chosen": "c", "rejected": "r", "system": "s", "margin": "1.5"})
    assert [told(a) for a in found.answers] == ["s:s u:p | a:c", "s:s u:p | a:r"]
    assert [a.plain for a in found.answers] == [("s\n\np", "c"), ("s\n\np", "r")]
    assert found.margin == found.value == 1.5
    assert pair({"prompt": "p", "chosen": "c", "rejected": "r", "margin": None}).margin == 0.0


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),  # the space belongs to the answer
        ("The sky is blue", "The sky is blew", "The sky is bl"),
        ("Q: a\nA: yes", "Q: a\nA:no", "Q: a\nA:"),
        ("abc", "abcdef", "ab"),  # one is the beginning of the other: a character is left over, as in TRL
        ("same", "same", "sam"),
    ],
)
def test_the_prompt_of_strings_is_their_common_beginning(chosen, rejected, prompt):
    trl = pytest.importorskip("trl.data_utils")
    found = pair({"chosen": chosen, "rejected": rejected})
    assert found.chosen.plain == (prompt, chosen[len(prompt) :])
    assert found.rejected.plain == (prompt, rejected[len(prompt) :])
    assert found.chosen.messages == () and found.chosen.question[-1] == prompt
    theirs = trl.extract_prompt({"chosen": chosen, "rejected": rejected})
    assert (prompt, *(a.plain[1] for a in found.answers)) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


@pytest.mark.parametrize(
    "row, chosen, rejected",
    [
        ({"prompt": "u:q", "chosen": "a:x", "rejected": "a:y"}, "u:q | a:x", "u:q | a:y"),
        ({"chosen": "s:z u:q a:x", "rejected": "s:z u:q a:y"}, "s:z u:q | a:x", "s:z u:q | a:y"),
        ({"chosen": "u:q a:x u:r a:y", "rejected": "u:q a:x u:r a:z"}, "u:q a:x u:r | a:y", "u:q a:x u:r | a:z"),
        ({"chosen": "u:q a:x", "rejected": "u:q a:y u:w a:z"}, "u:q | a:x", "u:q | a:y u:w a:z"),
        ({"chosen": "u:q a:x", "rejected": "u:q a:x u:w a:z"}, "u:q | a:x", "u:q | a:x u:w a:z"),  # as TRL
        ({"prompt": "u:q", "chosen": "u:q a:x", "rejected": "a:y"}, "u:q | a:x", "u:q | a:y"),
        ({"prompt": "u:q a:x u:r", "chosen": "a:b t:c a:d", "rejected": "a:e"}, "u:q a:x u:r | a:b t:c a:d", None),
    ],
)
def test_messages(row, chosen, rejected):
    trl = pytest.importorskip("trl.data_utils")
    row = {key: turns(text) for key, text in row.items()}
    found = pair(row)
    assert told(found.chosen) == chosen and told(found.rejected) == (rejected or "u:q a:x u:r | a:e")
    if "prompt" not in row:
        theirs = trl.extract_prompt(row)
        assert found.chosen.completion_from == len(theirs["prompt"])
        assert [list(answer_of(a)) for a in found.answers] == [theirs["chosen"], theirs["rejected"]]


def test_a_prompt_as_string_beside_whole_conversations():
    row = {"prompt": "q", "chosen": turns("u:q a:x"), "rejected": turns("u:q a:y"), "system": "s"}
    assert told(pair(row).chosen) == "s:s u:q | a:x"
    assert "`prompt` is not in the turns" in problems(pair, {**row, "prompt": "other"})[0].what


def test_tools_reach_both_sides():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    found = pair({"prompt": turns("u:q"), "chosen": turns("a:x"), "rejected": turns("a:y"), "tools": tools})
    assert found.chosen.tools == found.rejected.tools == tools


@pytest.mark.parametrize(
    "row, what, found",
    [
        ({"prompt": "p", "chosen": "c", "rejected": turns("a:x")}, "of different kinds", "chosen a string"),
        ({"prompt": "p", "chosen": " ", "rejected": "r"}, "`chosen` is empty", None),
        ({"prompt": "p", "chosen": None, "rejected": "r"}, "`chosen` is not text", "nothing"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": "much"}, "`margin` is not a number", "'much'"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": True}, "`margin` is not a number", "True"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": float("nan")}, "not a number", "nan"),
        ({"chosen": "abc", "rejected": "xbc"}, "no common beginning", None),
        ({"chosen": turns("u:q a:x"), "rejected": turns("u:w a:y")}, "answer different prompts", "user 'w'"),
        ({"chosen": turns("u:q t:x"), "rejected": turns("u:q t:y")}, "answer different prompts", "tool 'x'"),
        ({"chosen": turns("a:x"), "rejected": turns("a:y")}, "there is no prompt", None),
        ({"chosen": turns("u:q a:x"), "rejected": []}, "has no turns", None),
        ({"prompt": turns("u:q"), "chosen": turns("u:w a:x"), "rejected": turns("a:y")}, "not the beginning", "'w'"),
        ({"prompt": turns("u:q"), "chosen": turns("u:q"), "rejected": turns("a:y")}, "no answer after", "alone"),
        ({"prompt": turns("u:q"), "chosen": turns("u:q u:w"), "rejected": turns("a:y")}, "no answer after", "'w'"),
        ({"prompt": turns("u:q"), "chosen": [], "rejected": turns("a:y")}, "`chosen` has no turns", None),
        ({"prompt": [], "chosen": turns("a:x"), "rejected": turns("a:y")}, "before any user", None),
        ({"prompt": 3, "chosen": turns("u:q a:x"), "rejected": turns("u:q a:y")}, "`prompt` is not text", "a number"),
        (
            {"prompt": turns("u:q"), "chosen": [{"role": "asistant"}], "rejected": turns("a:y")},
            "`chosen`: turn 1",
            None,
        ),
    ],
)
def test_wrong_pairs(row, what, found):
    given = problems(pair, row)
    assert what in given[0].what and all((p.file, p.line) == WHERE for p in given)
    assert found is None or found in given[0].found


def test_every_problem_of_a_row_at_once():
    row = {"prompt": turns("u:q"), "chosen": [{"role": "usr", "content": "x"}], "rejected": turns("a:y"), "tools": "no"}
    assert len(problems(pair, {**row, "margin": "m"})) == 3
    assert len(problems(pair, {"prompt": "", "chosen": "", "rejected": 3})) == 3


def test_columns_of_pairs():
    options = {"prompt": "Q {q} of {labels}", "chosen": "{best}!", "rejected": "{worst}", "system": "S"}
    row = {"q": "a", "best": "b", "worst": "c", "margin": 2, "gap": "0.25"}
    found = pair(row, labels=("x", "y"), **options)
    assert told(found.chosen) == "s:S u:Q a of x, y | a:b!" and told(found.rejected).endswith("| a:c")
    assert found.margin == 2.0 and pair(row, ("x", "y"), margin="{gap}", **options).margin == 0.25
    assert "data.labels" in problems(pair, row, **options)[0].what
    missing = problems(pair, row, prompt="{q}", chosen="{bst}", rejected="{worst}")[0]
    assert missing.found == "{bst}" and missing.fix == "did you mean `best`?"
    assert [p.what for p in problems(pair, row, prompt="{q}")] == [
        f"format columns needs a template in data.{key}" for key in ("chosen", "rejected")
    ]
    assert problems(pair, row, margin="{no}", prompt="{q}", chosen="{best}", rejected="{worst}")[0].found == "{no}"
    keyed = {"prompt": "p", "chosen": "c", "rejected": "r", "gap": 3}
    assert pair(keyed, margin="{gap}").margin == 3.0


def test_judged_answers():
    row = {"prompt": "p", "completion": "c", "label": True}
    [found] = thumbs(row)
    assert told(found.conversation) == "u:p | a:c" and found.desirable and found.value == 1.0 and not found.of_pair
    for good, bad in [(True, False), (1, 0), ("True", " false "), ("1", "0")]:
        assert [thumbs({**row, "label": value})[0].desirable for value in (good, bad)] == [True, False]
    lists = {"prompt": turns("u:p"), "completion": turns("a:c"), "label": False}
    assert told(thumbs(lists)[0].conversation) == "u:p | a:c"
    [found] = thumbs({"q": "p", "a": "c", "up": "true"}, prompt="{q}", completion="{a}", desirable="{up}")
    assert found.desirable and told(found.conversation) == "u:p | a:c"
    assert thumbs({"prompt": "p", "completion": "c", "up": 0}, desirable="{up}")[0].desirable is False


def test_pairs_are_taken_apart_into_judged_answers():
    found = thumbs({"prompt": "p", "chosen": "c", "rejected": "r"})
    assert [(told(t.conversation), t.desirable, t.of_pair, t.same) for t in found] == [
        ("u:p | a:c", True, True, False),
        ("u:p | a:r", False, True, False),
    ]
    assert all(t.same for t in thumbs({"prompt": "p", "chosen": "c", "rejected": "c"}))


@pytest.mark.parametrize(
    "row, what, options",
    [
        ({"prompt": "p", "completion": "c", "label": "games"}, "`label` is not true or false", {}),
        ({"prompt": "p", "completion": "c", "label": 2}, "`label` is not true or false", {}),
        ({"prompt": "p", "completion": "c", "label": None}, "`label` is not true or false", {}),
        ({"prompt": "p", "completion": "c", "up": "x"}, "data.desirable is not true or false", {"desirable": "{up}"}),
        ({"prompt": "p", "completion": "c"}, "names a column that this row does not have", {"desirable": "{up}"}),
        ({"prompt": "p", "completion": "", "label": True}, "`completion` is empty", {}),
        (
            {"prompt": turns("u:p"), "completion": turns("u:p a:c"), "label": True},
            "does not begin with an assistant turn",
            {},
        ),
    ],
)
def test_wrong_judgements(row, what, options):
    given = problems(thumbs, row, **options)
    assert len(given) == 1 and what in given[0].what and (given[0].file, given[0].line) == WHERE


@pytest.mark.parametrize(
    "read, row, fix, options",
    [
        (pair, {"prompt": "p", "completion": "c", "label": True}, "objective: kto", {}),
        (pair, {"prompt": "p", "chosen": "c", "rejcted": "r"}, "did you mean `rejected` by `rejcted`?", {}),
        (pair, {"prompt": "p", "chosen": "c"}, "add rejected", {}),
        (pair, {"text": "t"}, None, {}),
        (pair, {"prompt": "p", "chosen": "c", "rejected": "r"}, None, {"format": "messages"}),
        (thumbs, {"prompt": "p", "completion": "c"}, "add label", {}),
        (thumbs, {"prompt": "p", "completion": "c", "labels": True}, "did you mean `label` by `labels`?", {}),
        (thumbs, {"text": "t"}, None, {}),
        (thumbs, {"prompt": "p", "completion": "c", "label": True}, None, {"format": "text"}),
    ],
)
def test_rows_of_another_kind_are_refused_by_name(read, row, fix, options):
    [problem] = problems(read, row, **options)
    assert "this objective learns from" in problem.what and problem.allowed
    assert fix is None or fix in problem.fix


@pytest.mark.parametrize("format", ["preference", "unpaired_preference"])
def test_conversations_do_not_read_formats_of_preferences(format):
    with pytest.raises(BadInput, match="preferences") as error:
        row_format({"messages": []}, spec(format=format), WHERE)
    assert error.value.problems[0].line == 7


def test_recognised_by_keys_alone():
    assert recognise_preference({"chosen": 1, "rejected": 2}) == "preference"
    assert recognise_preference({"prompt": "p", "completion": "c", "label": False}) == "unpaired_preference"
    assert recognise_preference({"prompt": "p", "completion": "c", "label": "games"}) is None
    assert recognise_preference({"prompt": "p", "chosen": "c"}) is None


def test_identity_is_the_prompt():
    rows = [{"prompt": "p", "chosen": c, "rejected": r} for c, r in ("ab", "cd")]
    assert pair(rows[0]).identity == pair(rows[1]).identity == thumbs(rows[0])[0].identity
    other = pair({"prompt": "q", "chosen": "a", "rejected": "b"})
    assert other.identity != pair(rows[0]).identity
    implicit = [pair({"chosen": f"is {x}1", "rejected": f"is {x}2"}).identity for x in "ab"]
    assert implicit[0] != implicit[1]
    assert isinstance(thumbs(rows[0])[0], Judgement)


def test_common_beginnings():
    assert common_length("", "abc") == 0 and common_length("abc", "abd") == 2 and common_length("ab", "ab") == 1
    assert text_prompt("x y", "z w") == 0 and text_prompt(" a", " b") == 0
