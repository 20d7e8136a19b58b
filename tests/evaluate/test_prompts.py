"""prompt.yaml: read strictly, written back unchanged, and used like an adapter by everything that answers."""

import json
from dataclasses import replace

import pytest
from evaluating import LABELS, conversation, label_rows

from shikomi.errors import BadInput
from shikomi.evaluate.prompts import PromptFile, is_prompt_file, load_prompt, prompt_text, prompted
from shikomi.inference import merge, open_model

SHOTS = ({"text": "a puzzle with\nlevels", "label": "games"}, {"text": "mail: yes", "label": "net"})
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]
FILE = PromptFile(
    model="smollm2",
    system="Answer with the label: alone.",
    prompt="Which of {labels}?\n\n{text}",
    completion="{label}",
    labels=LABELS,
    max_length=600,
    shots=SHOTS,
)


def written(tmp_path, file, name="prompt.yaml"):
    path = tmp_path / name
    path.write_text(prompt_text(file, heading="why it is so"), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "file",
    [
        FILE,
        PromptFile("m"),
        PromptFile("m", shots=({"prompt": "q: 1", "completion": "1e-4"},)),
        PromptFile("m", "s", shots=({"messages": TURNS},)),
        replace(FILE, labels=("yes", "no", "1", "[x]"), shots=({"text": "t", "label": "1"},)),
    ],
)  # fmt: skip
def test_a_file_reads_as_it_was_written(file, tmp_path):
    path = written(tmp_path, file)
    assert is_prompt_file(path) and load_prompt(path).file == file
    assert path.read_text().startswith("# why it is so\n\n")


def test_shots_go_before_the_question_and_the_instruction_before_all():
    used = prompted(FILE)
    (row,) = label_rows(1)
    shown = used.shown(row)
    assert [message["role"] for message in shown.messages] == ["system", *["user", "assistant"] * 3]
    assert shown.messages[0]["content"] == FILE.system
    assert shown.messages[1]["content"] == "Which of admin, games, net?\n\na puzzle with\nlevels"
    assert shown.messages[2]["content"] == "games" and shown.messages[5:] == row.messages
    assert shown.completion_from == len(shown.messages) - 1
    assert shown.plain[0].startswith(f"{FILE.system}\n\n") and shown.plain[0].endswith(row.plain[0])
    with used.off():
        assert used.shown(row) == row
    own = conversation("q", "a", system="its own")
    assert [m["content"] for m in used.shown(own).messages if m["role"] == "system"] == ["its own"]


def test_shots_that_do_not_fit_are_left_out_the_last_first(encoder):
    (row,) = label_rows(1)
    lengths = {}
    for room in range(0, 600, 20):
        ids = prompted(FILE).encode(row, encoder, room)
        assert len(ids) + room <= 600 or len(ids) == min(lengths)
        lengths[len(ids)] = encoder.tokenizer.decode(ids)
    assert len(lengths) == 3
    none, one, both = (lengths[length] for length in sorted(lengths))
    assert "puzzle" in one and "mail: yes" not in one and "puzzle" not in none.split("Which section")[0]
    assert both.index("puzzle") < both.index("mail: yes") and all(FILE.system in text for text in lengths.values())


@pytest.mark.parametrize(
    "text, line, message",
    [
        ("system: x\n", 1, "`model` is missing"),
        ("model: m\nsystm: x\n", 2, "unknown key `systm`.*did you mean `system`"),
        ("model: m\nsystem: [a]\n", 2, "`system`: found a list of 1; allowed: text"),
        ("model: m\nmodel: n\n", 2, "stands twice"),
        ("model: m\nprompt: '{text'\n", 2, "prompt has a lone brace"),
        ("model: m\n\ncompletion: '{label}'\n", 3, "`completion` without `prompt`"),
        ("model: m\nlabels: [a]\n", 2, "at least two"),
        ("model: m\nlabels:\n  - a\n  - 1\n", 4, "found 1; allowed: texts; fix: put quotes"),
        ("model: m\nlabels: [a, a]\n", 2, "twice"),
        ("model: m\nmax_length: 3\n", 2, "a whole number from 8 on"),
        ("model: m\nmax_length: yes\n", 2, "a whole number from 8 on"),
        ("model: m\nshots: 3\n", 2, "a list of rows"),
        ("model: m\nshots:\n  - text\n", 3, "a row"),
        ("model: m\nshots:\n  - {prompt: q, completion: a}\n  - {question: q}\n", 4, "no known format"),
        ("model: m\nshots:\n  - {messages: [{role: user, content: q}]}\n", 3, "assistant"),
        ("model: m\nprompt: '{text}'\ncompletion: '{label}'\nshots:\n  - {text: a}\n", 5, "label"),
        ("model: m\nprompt: '{t}'\ncompletion: '{l}'\nlabels: [a, b]\nshots:\n  - {t: x, l: c}\n", 6, "label set"),
        ("model: m\ndata: rows.jsonl\n", 2, "this is a recipe"),
        ("model: m\n  x: 1\n", 2, "not YAML"),
    ],
)
def test_a_mistake_is_named_with_its_line(text, line, message, tmp_path):
    path = tmp_path / "prompt.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message) as caught:
        load_prompt(path)
    assert str(caught.value).startswith(f"{path}:{line}: "), caught.value
    assert "data." not in str(caught.value)


def test_all_mistakes_are_told_at_once(tmp_path):
    path = tmp_path / "prompt.yaml"
    path.write_text("systm: x\nlabels: [a]\nshots: 3\n")
    with pytest.raises(BadInput) as caught:
        load_prompt(path)
    assert [problem.line for problem in caught.value.problems] == [1, 1, 2, 3]


def test_it_answers_like_an_adapter(tiny_llama, tmp_path):
    path = written(tmp_path, replace(FILE, model=str(tiny_llama)))
    ready, bare = open_model(path, dtype="fp32"), open_model(tiny_llama, dtype="fp32")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"a tool {i}", "label": LABELS[i % 3]}) + "\n" for i in range(6)))

    predicted = list(ready.predict(rows))
    assert all(row["prediction"] in LABELS and len(row["probabilities"]) == 3 for row in predicted)
    scores = ready.evaluate(rows)
    hits = sum(row["prediction"] == row["label"] for row in predicted)
    assert scores["metrics"]["accuracy"]["value"] == pytest.approx(hits / 6)
    assert ready.generate("a tool 0") == predicted[0]["prediction"]

    # The same prompt, written out by hand, through the model alone.
    turns = [{"role": "system", "content": FILE.system}]
    for shot in SHOTS:
        turns.append({"role": "user", "content": f"Which of {', '.join(LABELS)}?\n\n{shot['text']}"})
        turns.append({"role": "assistant", "content": shot["label"]})
    said = ready.generate([{"role": "user", "content": "hello"}], 8)
    assert said == bare.generate([*turns, {"role": "user", "content": "hello"}], 8)
    with ready.base():
        assert ready.generate([{"role": "user", "content": "hello"}], 8) == bare.generate("hello", 8) != said


def test_a_prompt_has_nothing_to_merge(tmp_path):
    with pytest.raises(BadInput, match="no weights to merge"):
        merge(written(tmp_path, FILE), tmp_path / "out")
