"""Row formats: what each row becomes, and what is said about rows that are wrong."""

import pytest

from shikomi.data.columns import ColumnTemplate, cell_text
from shikomi.data.formats import label_set, parse_row, recognise, uses_labels
from shikomi.errors import BadInput
from shikomi.recipe import DataSpec, Source

WHERE = ("rows.jsonl", 7)


def spec(**options):
    return DataSpec(train=(Source(path="rows.jsonl"),), **options)


def parse(row, answer=True, labels=None, **options):
    return parse_row(row, spec(**options), WHERE, labels, answer)


def problems(row, **options):
    with pytest.raises(BadInput) as error:
        parse(row, **options)
    assert all((p.file, p.line) == WHERE for p in error.value.problems)
    return error.value.problems


def roles(conversation):
    return [(m["role"], m["content"]) for m in conversation.messages]


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "row, kind",
    [
        ({"text": "t"}, "text"),
        ({"text": "t", "id": 3, "meta": {}}, "text"),
        ({"messages": []}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"instruction": "i", "output": "o", "input": ""}, "alpaca"),
        ({"prompt": "p", "completion": "c", "id": 1}, "prompt_completion"),
        ({"text": "t", "label": "l"}, None),
        ({"question": "q", "answer": "a"}, None),
    ],
)
def test_formats_are_recognised_by_their_keys(row, kind):
    assert recognise(row) == kind


def test_text():
    assert parse({"text": "t"}).text == "t"
    assert "is empty" in problems({"text": " \n"})[0].what
    assert problems({"text": 3}, format="text")[0].found == "a number"


def test_messages_keep_what_templates_need():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "", "tool_call_id": "1", "name": "f"},
            {"role": "assistant", "content": "c", "train": False, "timestamp": 3},
        ],
        "tools": '[{"type": "function"}]',
    }
    conversation = parse(row)
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert conversation.messages[1]["content"] == "ab"
    assert conversation.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert conversation.messages[3]["tool_call_id"] == "1"
    assert conversation.messages[4] == {"role": "assistant", "content": "c", "train": False}
    assert conversation.tools == [{"type": "function"}]


def test_openai_weight_means_train():
    messages = parse({"messages": [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1}]}).messages
    assert [m.get("train") for m in messages] == [None, False, None, True]


def test_sharegpt():
    row = {
        "system": "s",
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
            {"from": "observation", "value": "o"},
            {"from": "chatgpt", "value": "b"},
        ],
    }
    assert roles(parse(row)) == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "a"),
        ("tool", "o"),
        ("assistant", "b"),
    ]
    assert roles(parse({"conversations": [USER, ASSISTANT]})) == [("user", "q"), ("assistant", "a")]


def test_alpaca():
    with_input = parse({"instruction": "Add {x}", "input": "1 {instruction}", "output": "2"})
    assert roles(with_input) == [("user", "Add {x}\n\n1 {instruction}"), ("assistant", "2")]
    assert "### Input:\n1 {instruction}\n\n### Response:\n" in with_input.plain[0]
    without = parse({"instruction": "Hi", "input": "", "output": "Ho", "system": "s"})
    assert roles(without) == [("system", "s"), ("user", "Hi"), ("assistant", "Ho")]
    assert "### Input" not in without.plain[0] and without.label == "Ho"


def test_prompt_and_completion():
    strings = parse({"prompt": "p", "completion": "c"})
    assert roles(strings) == [("user", "p"), ("assistant", "c")]
    assert (strings.plain, strings.label, strings.completion_from) == (("p", "c"), "c", 1)
    lists = parse({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert lists.completion_from == 3 and lists.plain is None and lists.label == "a"
    assert "different kinds" in problems({"prompt": [USER], "completion": "c"})[0].what
    assert "the completion has no assistant turn" in problems({"prompt": [USER], "completion": []})[0].what


def test_columns():
    conversation = parse(
        {"text": "t{x}", "label": "games", "n": 3},
        prompt="{{Which}} of {labels}?\n{text} {n}",
        completion="{label}",
        system="S {n}",
        labels=("games", "net"),
    )
    assert roles(conversation) == [
        ("system", "S 3"),
        ("user", "{Which} of games, net?\nt{x} 3"),
        ("assistant", "games"),
    ]
    assert conversation.label == "games" and conversation.completion_from == 2
    assert conversation.plain == ("S 3\n\n{Which} of games, net?\nt{x} 3", "games")


def test_rows_without_an_answer_for_prediction():
    assert roles(parse({"prompt": "p"}, answer=False)) == [("user", "p")]
    assert roles(parse({"instruction": "p", "input": "i"}, answer=False)) == [("user", "p\n\ni")]
    assert roles(parse({"text": "t"}, answer=False, prompt="{text}?", completion="{label}")) == [("user", "t?")]
    assert roles(parse({"messages": [USER]}, answer=False)) == [("user", "q")]
    assert roles(parse({"text": "t"}, answer=False, prompt="{text}?")) == [("user", "t?")]


def test_missing_columns_are_named_with_the_nearest():
    found = problems({"txt": "t", "lable": "l"}, prompt="{text} {other}", completion="{label}")
    assert [(p.found, p.fix) for p in found] == [
        ("{text}", "did you mean `txt`?"),
        ("{other}", None),
        ("{label}", "did you mean `lable`?"),
    ]
    assert found[0].allowed == "txt, lable"
    assert problems({"text": "", "label": None}, prompt="{text}", completion="{label}")[1].found == "None"


def test_columns_need_both_templates():
    with pytest.raises(BadInput, match="data.completion"):
        parse({"text": "t"}, prompt="{text}")
    with pytest.raises(BadInput, match="data.prompt"):
        parse({"text": "t"}, format="columns", completion="{text}")


@pytest.mark.parametrize("source, what", [("a {text", "lone brace"), ("a } b", "lone brace"), ("{ }", "empty name")])
def test_malformed_templates(source, what):
    with pytest.raises(BadInput, match=what):
        ColumnTemplate.parse("prompt", source)


def test_braces_and_names_in_templates():
    template = ColumnTemplate.parse("prompt", "{{a}} {my column}{{{b}}}")
    assert template.columns == ["my column", "b"]
    assert template.fill({"my column": 1.5, "b": [1, "é"]}) == '{a} 1.5{[1, "é"]}'
    with pytest.raises(ValueError, match="no label set"):
        ColumnTemplate.parse("prompt", "{labels}").fill({})


def test_cells_as_text():
    assert [cell_text(v) for v in ("a", None, 3, 0.1, True, {"k": "ü"})] == ["a", "", "3", "0.1", "true", '{"k": "ü"}']


def test_answers_outside_the_label_set():
    with pytest.raises(BadInput) as error:
        parse_row({"t": "x", "l": "game"}, spec(prompt="{t}", completion="{l}", labels=("games", "net")), WHERE)
    assert error.value.problems[0].fix == "did you mean `games`?"
    with pytest.raises(BadInput, match="not in the label set"):
        parse_row({"prompt": "x", "completion": "zzz"}, spec(labels=("games", "net")), WHERE)


def test_label_sets():
    rows = [{"t": "x", "l": name} for name in ("net", "games", "net", "")] + [{"t": "y"}]
    assert label_set(spec(prompt="{t}", completion="{l}"), rows) == ("games", "net")
    assert label_set(spec(prompt="{t}", completion="{l}", labels=("b", "a")), rows) == ("b", "a")
    pairs = [{"prompt": "p", "completion": "z"}, {"prompt": [USER], "completion": [ASSISTANT]}]
    assert label_set(spec(), pairs) == ("a", "z")
    assert uses_labels(spec(prompt="{labels} {t}", completion="{l}"))
    assert not uses_labels(spec(prompt="{{labels}} {t}", completion="{l}"))


@pytest.mark.parametrize(
    "turns, what, fix",
    [
        ([USER, {"role": "asistant", "content": "a"}], "turn 2 has an unknown role", "did you mean `assistant`?"),
        ([USER, {"content": "a"}], "turn 2 has no `role`", None),
        ([USER, {"role": "assistant", "content": "  "}], "turn 2 (assistant) is empty", "remove the turn or the row"),
        ([USER, {"role": "assistant"}], "turn 2 has no text under `content`", None),
        ([USER, {"role": "assistant", "content": [{"type": "image_url"}]}], "turn 2 has no text", None),
        ([USER, "hello"], "turn 2 is not a message", None),
        ([USER], "the row has no assistant turn", "add the answer or remove the row"),
        ([], "the row has no assistant turn", None),
        ([ASSISTANT, USER, ASSISTANT], "assistant turn before any user turn", None),
        ([USER, {**ASSISTANT, "train": False}], "no trained token", None),
        ([USER, {**ASSISTANT, "train": "no"}], "turn 2 has a wrong `train`", None),
        ([{**USER, "train": True}, ASSISTANT], "turn 1 has a wrong `train`", None),
        ([USER, {"role": "assistant", "content": "a\x00b"}], "turn 2 holds a NUL character", "remove the character"),
        ([USER, {"role": "assistant", "content": "a\ud800"}], "turn 2 holds half of a surrogate pair", None),
        ([USER, {"role": "assistant", "content": "\ufdd2a"}], "turn 2 holds a Unicode noncharacter", None),
        ([USER, {"role": "assistant", "content": "", "tool_calls": ["f"]}], "tool_calls is not a list of calls", None),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "the arguments of tool call `f` are not JSON",
            None,
        ),
    ],
)
def test_wrong_turns(turns, what, fix):
    found = problems({"messages": turns})
    assert len(found) == 1 and what in found[0].what
    assert fix is None or found[0].fix == fix


def test_every_problem_of_a_row_at_once():
    turns = [{"role": "usr", "content": "q"}, {"role": "assistant", "content": ""}]
    assert len(problems({"messages": turns, "tools": "nonsense"})) == 3


@pytest.mark.parametrize("key, value", [("messages", "x"), ("conversations", None)])
def test_turns_that_are_no_list(key, value):
    assert "is not a list" in problems({key: value})[0].what


def test_unknown_keys_are_refused_with_a_hint():
    assert problems({"promt": "p", "completion": "c"})[0].fix == "did you mean `prompt` by `promt`?"
    found = problems({"text": "t", "label": "l"})[0]
    assert found.found == "text, label" and 'data.prompt: "{text}"' in found.fix and '"{label}"' in found.fix


@pytest.mark.parametrize(
    "row",
    [{"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "p", "completion": "c", "label": True}],
)
def test_rows_of_preferences_are_refused_by_name(row):
    assert "preferences" in problems(row)[0].what
