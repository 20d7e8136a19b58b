"""What `init` proposes for a file."""

import csv
import json

import pytest

from shikomi.data.check import load_conversations
from shikomi.data.detect import detect
from shikomi.errors import BadInput
from shikomi.recipe import DataSpec, Source


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def usable(found):
    """The proposal reads its own file."""
    source = Source(path=found.path)
    spec = DataSpec(train=(source,), prompt=found.prompt, completion=found.completion, labels=found.labels)
    return load_conversations([source], spec, labels=found.labels)


def test_classification_in_a_csv(tmp_path):
    rows = [[n, f"text number {n}", ["net", "games"][n % 2]] for n in range(40)]
    found = detect(table(tmp_path / "r.csv", ["id", "text", "category"], rows))
    assert (found.format, found.completion, found.labels) == ("columns", "{category}", ("games", "net"))
    assert "{text}" in found.prompt and "{labels}" in found.prompt and "{id}" not in found.prompt
    assert found.rows == 40 and not found.at_least and len(found.sample) == 3
    assert any("label set" in reason for reason in found.reasons)
    assert usable(found)[0].conversation.messages[-1]["content"] == "net"


def test_label_column_without_a_known_name(tmp_path):
    rows = [[["net", "games"][n % 2], f"this is the long text number {n}"] for n in range(40)]
    found = detect(table(tmp_path / "r.csv", ["kind", "words"], rows))
    assert (found.completion, found.labels) == ("{kind}", ("games", "net"))
    assert "{words}" in found.prompt


def test_free_answers_are_no_label_set(tmp_path):
    found = detect(jsonl(tmp_path / "r.jsonl", [{"question": f"q{n}", "answer": f"a{n}"} for n in range(40)]))
    assert (found.prompt, found.completion, found.labels) == ("{question}", "{answer}", None)
    assert len(usable(found)) == 40


def test_few_rows_are_no_label_set(tmp_path):
    found = detect(jsonl(tmp_path / "r.jsonl", [{"text": str(n), "label": "ab"[n % 2]} for n in range(6)]))
    assert found.labels is None


def test_translation_and_several_columns(tmp_path):
    found = detect(jsonl(tmp_path / "r.jsonl", [{"id": "x1", "en": f"hello {n}", "ja": f"ã {n}"} for n in range(9)]))
    assert found.prompt == "Translate into Japanese.\n\n{en}" and found.completion == "{ja}"
    rows = [{"question": f"q{n}", "context": f"c{n}", "answer": f"a{n}"} for n in range(9)]
    found = detect(jsonl(tmp_path / "s.jsonl", rows))
    assert found.prompt == "question: {question}\n\ncontext: {context}"


@pytest.mark.parametrize(
    "row, kind",
    [
        ({"text": "t"}, "text"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages"),
        ({"prompt": "p", "completion": "c"}, "prompt_completion"),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca"),
    ],
)
def test_known_formats_need_no_templates(tmp_path, row, kind):
    found = detect(jsonl(tmp_path / "r.jsonl", [row] * 3))
    assert (found.format, found.prompt, found.completion) == (kind, None, None)


def test_label_set_of_prompt_and_completion(tmp_path):
    rows = [{"prompt": f"p{n}", "completion": "yn"[n % 2]} for n in range(20)]
    assert detect(jsonl(tmp_path / "r.jsonl", rows)).labels == ("n", "y")


def test_nothing_to_propose(tmp_path):
    with pytest.raises(BadInput, match="no question and answer"):
        detect(jsonl(tmp_path / "r.jsonl", [{"words": "t"}] * 3))
    with pytest.raises(BadInput, match="broken JSON"):
        bad = tmp_path / "b.jsonl"
        bad.write_text("{", encoding="utf-8")
        detect(bad)
