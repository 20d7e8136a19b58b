"""Conversion between formats and files: what goes there and back is what it was; what would be lost is refused."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shikomi.data import writers
from shikomi.data.convert import content, convert
from shikomi.data.problems import Problems
from shikomi.data.records import held_rows, kind_of_rows
from shikomi.errors import BadInput
from shikomi.recipe import DataSpec, Source

TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {"q": {}}}}}
CALL = {"type": "function", "id": "c1", "function": {"name": "find", "arguments": {"q": "dogs", "n": 2}}}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": 'Hi\n"there", you; 犬'},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Find dogs."},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "[1, 2]", "tool_call_id": "c1", "name": "find"},
        {"role": "assistant", "content": "Two."},
    ],
    "tools": [TOOL],
}
HALF = {"messages": [*CHAT["messages"][1:2], {**CHAT["messages"][2], "train": False}, *CHAT["messages"][3:4],
                     {"role": "assistant", "content": "None."}]}  # fmt: skip
PLAIN = {"prompt": "What is it?", "completion": 'A dog; "really",\nyes.'}
SYSTEM = {"system": "Be brief.", "prompt": "What?", "completion": "That."}
ALPACA = {"instruction": "Say it.", "input": "", "output": "It."}
PAIR = {"prompt": "What is it?", "chosen": "A dog.", "rejected": "I do not know.", "margin": 1.5}
LISTS = {
    "prompt": CHAT["messages"][:2],
    "chosen": [CHAT["messages"][2]],
    "rejected": [{"role": "assistant", "content": "What?"}],
    "tools": [TOOL],
}
IMPLICIT = {"chosen": "Q: what? A: this", "rejected": "Q: what? A: that"}
THUMB = {"prompt": "What is it?", "completion": "A dog.", "label": False}


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def spec_of(path: Path, **keys) -> DataSpec:
    return DataSpec(train=(Source(path=str(path)),), **keys)


def said(path: Path, **keys) -> list:
    """What the rows of a file say, whatever they are written as."""
    spec, problems = spec_of(path, **keys), Problems()
    found = [content(r) for held in held_rows(spec, kind_of_rows(spec), problems) for r in held.records]
    problems.raise_if_any()
    return found


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


THERE_AND_BACK = [
    (CHAT, "sharegpt"),
    (CHAT, "prompt_completion"),
    (HALF, "sharegpt"),
    (HALF, "prompt_completion"),
    (PLAIN, "messages"),
    (PLAIN, "alpaca"),
    (SYSTEM, "alpaca"),
    (SYSTEM, "sharegpt"),
    (ALPACA, "prompt_completion"),
    (ALPACA, "messages"),
    (PAIR, "preference"),
    (LISTS, "preference"),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("row, target", THERE_AND_BACK, ids=lambda value: value if isinstance(value, str) else "")
def test_there_and_back_says_the_same(row, target, suffix, tmp_path):
    first = write(tmp_path / "in.jsonl", [row, row])
    keys = {"chosen": "preference", "messages": "messages", "output": "alpaca", "prompt": "prompt_completion"}
    original = next(name for key, name in keys.items() if key in row)
    there = tmp_path / f"there{suffix}"
    convert(spec_of(first), target, there)
    back = tmp_path / "back.jsonl"
    convert(spec_of(there, format=target), original, back)
    assert said(there, format=target) == said(first) == said(back)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_tables_hold_strings_and_refuse_lists(suffix, tmp_path):
    out = tmp_path / f"out{suffix}"
    convert(spec_of(write(tmp_path / "in.jsonl", [PLAIN, SYSTEM])), "prompt_completion", out)
    assert said(out) == said(tmp_path / "in.jsonl")
    with out.open(newline="") as file:
        assert next(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")) == {**PLAIN, "system": ""}
    with pytest.raises(BadInput, match="`messages` of row 1 is a list"):
        convert(spec_of(tmp_path / "in.jsonl"), "messages", tmp_path / f"chat{suffix}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", f"out{suffix}"], "nothing half-written stays"


def test_judgements_survive_a_csv(tmp_path):
    out = tmp_path / "out.csv"
    convert(spec_of(write(tmp_path / "in.jsonl", [THUMB, {**THUMB, "label": True}])), "unpaired_preference", out)
    assert said(out, format="unpaired_preference") == said(tmp_path / "in.jsonl")


@pytest.mark.parametrize("cell", ["a\rb", "a\r\nb", '"', " x ", "\\n", "a;b|c\td", "\u2028x", "犬"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_odd_cells_are_kept(cell, suffix, tmp_path):
    rows = [{"prompt": cell, "completion": f"{cell}{cell}"}, PLAIN]
    convert(spec_of(write(tmp_path / "in.jsonl", rows)), "prompt_completion", tmp_path / f"out{suffix}")
    assert said(tmp_path / f"out{suffix}") == said(tmp_path / "in.jsonl")


@pytest.mark.parametrize(
    "spoil, what",
    [
        (lambda rows: [{**row, "completion": row["completion"].lower()} for row in rows], "does not keep this row"),
        (lambda rows: rows[:-1], "does not keep all rows"),
        (lambda rows: [*rows, rows[0]], "does not keep this row"),
        (lambda rows: [{**row, "prompt": ""} for row in rows], "cannot be read back"),
    ],
)
def test_a_file_that_does_not_keep_its_rows_is_refused(spoil, what, tmp_path, monkeypatch):
    honest = writers.WRITERS[".csv"]
    monkeypatch.setitem(writers.WRITERS, ".csv", lambda path, rows: honest(path, lambda: iter(spoil(list(rows())))))
    with pytest.raises(BadInput, match=what):
        convert(spec_of(write(tmp_path / "in.jsonl", [PLAIN, PLAIN])), "prompt_completion", tmp_path / "out.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_table_gives_no_call_the_keys_of_another(tmp_path):
    other = {"type": "function", "function": {"name": "stop", "arguments": {"now": True}}}  # without an id
    chats = [CHAT, {"messages": [*CHAT["messages"][:4], {"role": "assistant", "content": "", "tool_calls": [other]}]}]
    first = write(tmp_path / "in.jsonl", chats)
    convert(spec_of(first), "sharegpt", tmp_path / "out.parquet")
    assert said(tmp_path / "out.parquet") == said(first)


TRAINED = st.booleans()
TURN = st.fixed_dictionaries({"content": st.text("ab \n\"',;|\t犬é{}\\", min_size=1).filter(str.strip)})
EXCHANGES = st.lists(st.tuples(TURN, TURN, TRAINED), min_size=1, max_size=3)
CHATS = st.lists(st.tuples(st.booleans(), EXCHANGES), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chats=CHATS, target=st.sampled_from(["sharegpt", "prompt_completion", "messages"]),
       suffix=st.sampled_from([".jsonl", ".json", ".parquet"]))  # fmt: skip
def test_any_conversation_goes_there_and_back(chats, target, suffix, tmp_path):
    rows = []
    for system, turns in chats:
        messages = [{"role": "system", "content": "S"}] if system else []
        for number, (asked, answer, trained) in enumerate(turns):
            last = number == len(turns) - 1  # at least one is trained
            flag = {} if trained or last else {"train": False}
            messages += [{"role": "user", **asked}, {"role": "assistant", **answer, **flag}]
        rows.append({"messages": messages})
    first = write(tmp_path / "in.jsonl", rows)
    there, back = tmp_path / f"there{suffix}", tmp_path / "back.jsonl"
    convert(spec_of(first), target, there)
    convert(spec_of(there, format=target), "messages", back)
    assert said(first) == said(there, format=target) == said(back)


def test_columns_by_templates(tmp_path):
    (tmp_path / "in.csv").write_text("text,kind,note\nit sings,bird,x\nit swims,fish,y\n")
    templates = {"prompt": "What? {text}", "completion": "{kind}"}
    done = convert(spec_of(tmp_path / "in.csv", **templates), "prompt_completion", tmp_path / "out.jsonl")
    assert rows_of(tmp_path / "out.jsonl")[1] == {"prompt": "What? it swims", "completion": "fish", "note": "y"}
    assert (done.read, done.written, done.lost) == (2, 2, {})
    with pytest.raises(BadInput, match="a column beside the columns keys"):
        convert(spec_of(tmp_path / "in.csv", prompt="{text}", completion="{note}"), "text", tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    "row, target, what",
    [
        (CHAT, "alpaca", "conversations of several turns"),
        (CHAT, "text", "a chat template makes text of them"),
        (PLAIN, "text", "which part of a text is trained"),
        (PAIR, "messages", "rejected answers"),
        (PAIR, "unpaired_preference", "margins"),
        (THUMB, "messages", "judged bad"),
        ({"text": "only text"}, "messages", "plain texts"),
    ],
)
def test_a_loss_is_refused_with_its_first_row(row, target, what, tmp_path):
    first = write(tmp_path / "in.jsonl", [row])
    with pytest.raises(BadInput, match=what) as caught:
        convert(spec_of(first), target, tmp_path / "out.jsonl")
    assert caught.value.problems[0].line == 1 and "--allow-loss" in caught.value.problems[0].fix
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("row, target", [(PLAIN, "preference"), (PLAIN, "unpaired_preference"), (THUMB, "preference")])
def test_what_no_flag_can_make_is_refused(row, target, tmp_path):
    first = write(tmp_path / "in.jsonl", [row])
    for allowed in (False, True):
        with pytest.raises(BadInput, match="cannot become"):
            convert(spec_of(first), target, tmp_path / "out.jsonl", allow_loss=allowed)


def test_an_allowed_loss_is_counted(tmp_path):
    first = write(tmp_path / "in.jsonl", [PAIR, {**PAIR, "margin": 0, "prompt": "And now?"}])
    done = convert(spec_of(first), "messages", tmp_path / "out.jsonl", allow_loss=True)
    assert done.lost == {"rejected answers": 2, "margins": 1} and done.written == 2
    assert rows_of(tmp_path / "out.jsonl")[0]["messages"][-1] == {"role": "assistant", "content": "A dog."}
    thumbs = write(tmp_path / "thumbs.jsonl", [THUMB, {**THUMB, "label": True}])
    done = convert(spec_of(thumbs), "prompt_completion", tmp_path / "good.jsonl", allow_loss=True)
    assert (done.read, done.written, done.left_out) == (2, 1, 1)
    with pytest.raises(BadInput, match="no row can be written"):
        convert(spec_of(write(tmp_path / "bad.jsonl", [THUMB])), "messages", tmp_path / "none.jsonl", allow_loss=True)


def test_pairs_become_two_judged_answers(tmp_path):
    first = write(tmp_path / "in.jsonl", [{**PAIR, "margin": 0}, {**PAIR, "margin": 0, "prompt": "Else?"}])
    convert(spec_of(first), "unpaired_preference", tmp_path / "out.jsonl")
    assert [row["label"] for row in rows_of(tmp_path / "out.jsonl")] == [True, False] * 2
    assert rows_of(tmp_path / "out.jsonl")[1] == {
        "prompt": "What is it?",
        "completion": "I do not know.",
        "label": False,
    }


def test_an_implicit_prompt_stays_one(tmp_path):
    first = write(tmp_path / "in.jsonl", [IMPLICIT])
    convert(
        spec_of(first, chosen="{chosen}", rejected="{rejected}", prompt="{chosen}"), "preference", tmp_path / "a.jsonl"
    )
    convert(spec_of(first), "preference", tmp_path / "b.parquet")
    assert said(tmp_path / "b.parquet") == said(first)


def test_other_columns_come_along_unless_they_would_be_read(tmp_path):
    first = write(tmp_path / "in.jsonl", [{**ALPACA, "id": 7, "prompt": "mine", "completion": "theirs"}])
    with pytest.raises(BadInput, match="would be read as part of prompt_completion") as caught:
        convert(spec_of(first, format="alpaca"), "prompt_completion", tmp_path / "out.jsonl")
    assert [p.found for p in caught.value.problems] == ["prompt", "completion"]
    convert(spec_of(first, format="alpaca"), "prompt_completion", tmp_path / "out.jsonl", drop=["prompt", "completion"])
    assert rows_of(tmp_path / "out.jsonl") == [{"prompt": "Say it.", "completion": "It.", "id": 7}]


def test_bad_rows_are_named_and_nothing_is_written(tmp_path):
    first = write(tmp_path / "in.jsonl", [PLAIN, {"prompt": "", "completion": "x"}, {"prompt": "p", "completion": 3}])
    with pytest.raises(BadInput) as caught:
        convert(spec_of(first), "messages", tmp_path / "out.jsonl")
    assert [p.line for p in caught.value.problems] == [2, 3]
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(BadInput, match="this kind of file is not written"):
        convert(spec_of(first), "messages", tmp_path / "out.xlsx")
