"""`shikomi advise` from outside: flags, refusals, questions, JSON, and files that the other commands take."""

import json
from types import SimpleNamespace

import pytest
from running import WORDS

from shikomi.cli import main
from shikomi.recipe import load_recipe


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    lines = [json.dumps({"text": f"{WORDS[i % 9]} {i}", "label": f"l{i % 3}"}) for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return "rows.jsonl"


SAID = ["--no-prompt-solves", "--no-new-knowledge", "--no-understands", "--machine", "rtx-4090"]


def test_it_writes_a_recipe_and_says_why(rows, tmp_path, capsys):
    assert main(["advise", "--data", rows, *SAID, "-o", "my.yaml"]) == 0
    text = capsys.readouterr().out
    assert "Advice: LoRA" in text and "[show-the-task]" in text and "3 labels in rows.jsonl" in text
    assert "$10-100" in text and "What else, and when it would win" in text
    assert "shikomi train my.yaml --dry-run" in text
    assert load_recipe("my.yaml").data.labels == ("l0", "l1", "l2")
    assert main(["advise", "--data", rows, *SAID, "-o", "my.yaml"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_json_is_one_object_with_ranges(rows, capsys):
    assert main(["advise", "--data", rows, *SAID, "--currency", "jpy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["outcome"], found["then"], found["task"]) == ("lora", [], "classification")
    for key in ("peak_memory_bytes", "seconds", "cost"):
        assert 0 < found[key]["low"] <= found[key]["likely"] <= found[key]["high"], key
    assert found["currency"] == "JPY" and found["usual_cost_usd"] == [10, 100]
    assert [reason["rule"] for reason in found["reasons"]][:2] == ["prompt-falls-short", "enough-to-train"]


def test_a_missing_answer_is_an_error_off_a_terminal_and_yes_takes_defaults(rows, capsys):
    assert main(["advise", "--data", rows]) == 2
    text = capsys.readouterr().err
    assert "--understands or --no-understands" in text and "--yes" in text and "--prompt-solves" in text
    assert main(["advise", "--data", rows, "--yes", "--machine", "rtx-4090"]) == 0
    assert "(assumed)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "chatbt", "--yes"], "did you mean chatbot"),
        (["--data", "none.jsonl", "--yes"], "no such file"),
        (["--prompt-solves", "--examples-solve"], "give one of them"),
        (["--machine", "rtx-40900", "--yes"], "unknown machine"),
        (["--currency", "gold", "--yes"], "unknown currency"),
        (["--price", "-1", "--yes"], "--price is no price"),
        (["--data", "90", "--run-baseline", "--yes"], "needs rows to measure on"),
    ],
)
def test_nonsense_is_refused(arguments, message, rows, capsys):
    assert main(["advise", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_on_a_terminal_only_open_questions_are_asked(rows, monkeypatch, capsys):
    from shikomi.commands import advising

    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(advising.sys, "stdin", terminal)
    monkeypatch.setattr(advising.sys.stderr, "isatty", lambda: True, raising=False)
    asked = []

    def prompt(text, **options):
        asked.append(text)
        return "maybe" if len(asked) == 1 else "few-shot"

    monkeypatch.setattr(advising.typer, "prompt", prompt)
    assert main(["advise", "--data", rows, "-o", "p.yaml"]) == 0
    assert len(asked) == 2 and "zero-shot, few-shot, no" in asked[0], "asked again after what is no answer"
    assert "Advice: few-shot prompt" in capsys.readouterr().out


def test_on_a_terminal_without_data_it_asks_for_that_too(rows, monkeypatch, capsys):
    from shikomi.commands import advising

    monkeypatch.setattr(advising.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(advising.sys.stderr, "isatty", lambda: True, raising=False)
    said = iter(["900", "", "", "", "a lot", "0"])
    monkeypatch.setattr(advising.typer, "prompt", lambda text, **options: next(said))
    monkeypatch.setattr(advising.typer, "confirm", lambda text, **options: False)
    words = ["--task", "chatbot", "--no-prompt-solves", "--machine", "rtx-4090", "--model", "qwen3-8b"]
    assert main(["advise", *words]) == 0
    text = capsys.readouterr().out
    assert "900 rows" in text and "model: Qwen/Qwen3-8B" in text
    assert "[nothing-fits]" in text, "a budget of 0 allows nothing"


def test_the_baseline_decides_and_the_prompt_is_used_like_a_model(rows, tiny_llama, capsys):
    model = ["--model", str(tiny_llama), "--dtype", "fp32"]
    measure = ["--run-baseline", "--sample", "8", "--shots", "3", "--yes"]
    assert main(["advise", "--data", rows, *model, *measure, "--target", "0", "-o", "zero.yaml"]) == 0
    assert "accuracy on 8 rows" in capsys.readouterr().out
    assert main(["advise", "--data", rows, *model, "--examples-solve", "-o", "prompt.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["outcome"] == "few-shot" and found["cost"]["high"] == 0

    for file in ("zero.yaml", "prompt.yaml"):
        assert main(["eval", file, rows, "--limit", "6", "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 6
    assert main(["predict", "prompt.yaml", rows, "-o", "out.jsonl", "--limit", "4"]) == 0
    assert {json.loads(line)["prediction"] for line in open("out.jsonl")} <= {"l0", "l1", "l2"}
    assert main(["generate", "prompt.yaml", "server 0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["answer"] in ("l0", "l1", "l2")


def test_chat_takes_a_prompt(rows, tiny_llama, monkeypatch, capsys):
    import io

    with open("p.yaml", "w") as file:
        file.write(f"model: {tiny_llama}\nsystem: be brief\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/base\n/quit\n"))
    assert main(["chat", "p.yaml", "--max-new-tokens", "2", "--dtype", "fp32"]) == 0
    assert "untouched model:" in capsys.readouterr().out
