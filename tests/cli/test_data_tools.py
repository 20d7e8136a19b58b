"""data preview, convert, split and pairs from the command line, on a tiny model."""

import json
import re
from pathlib import Path

import pytest
from preference_rows import pairs as pair_rows
from preference_rows import write

from shikomi.cli import main


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with rows."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is number {i}, and why is it so?", "completion": f"it is {i}"} for i in range(12)]
    write(tmp_path / "rows.jsonl", rows)
    write(tmp_path / "pairs.jsonl", pair_rows())
    return tmp_path


def run(capsys, *words) -> dict:
    """The JSON object that a command ends with."""
    assert main([*map(str, words), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_preview_of_a_file_is_that_of_the_recipe_that_init_writes(here, tiny_llama, capsys):
    found = run(capsys, "data", "preview", "pairs.jsonl", "max_length=200", "--model", tiny_llama, "--rows", 2)
    (stage,) = found["stages"]
    assert (stage["kind"], stage["objective"], stage["counts"]["rows"], stage["max_length"]) == (
        "pairs",
        "dpo",
        24,
        200,
    )
    assert [[part["name"] for part in row["parts"]] for row in stage["rows"]] == [["prompt", "chosen", "rejected"]] * 2
    part = stage["rows"][0]["parts"][1]
    assert len(part["ids"]) == len(part["trained"]) and part["marked"].startswith("[[") and 0 < sum(part["trained"])
    assert main(["init", "pairs.jsonl", "-o", "my.yaml", "--model", str(tiny_llama)]) == 0
    capsys.readouterr()
    again = run(capsys, "data", "preview", "my.yaml", "max_length=200", "--rows", 2)
    assert again["stages"] == found["stages"]


def test_preview_prints_rows_and_writes_a_page(here, tiny_llama, capsys):
    words = ["data", "preview", "rows.jsonl", "--model", str(tiny_llama), "--row", "5", "--html", "page.html"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "[[it is 4<|im_end|>]]" in shown and "micro-batch 1" in shown and "row 5 " in shown
    assert "it is 4" in re.sub(r"<[^>]+>", "", (here / "page.html").read_text()) and "page.html" in shown
    assert main([*words[:-2], "max_length=x"]) == 2
    assert main(["data", "preview", "rows.jsonl", "nonsense"]) == 2


def test_convert_says_what_it_did_and_what_it_cannot(here, capsys):
    found = run(capsys, "data", "convert", "rows.jsonl", "chat.parquet", "--to", "messages")
    assert (found["read"], found["written"], found["lost"]) == (12, 12, {})
    assert main(["data", "convert", "chat.parquet", "alpaca.csv", "--to", "alpaca"]) == 0
    assert "12 rows read, 12 written: alpaca.csv" in capsys.readouterr().out
    assert main(["data", "convert", "pairs.jsonl", "good.jsonl", "--to", "messages"]) == 2
    assert "messages cannot hold rejected answers" in capsys.readouterr().err
    assert main(["data", "convert", "pairs.jsonl", "good.jsonl", "--to", "messages", "--allow-loss"]) == 0
    assert "left out: rejected answers, in 24 rows" in capsys.readouterr().out
    assert main(["data", "convert", "rows.jsonl", "good.jsonl", "--to", "text"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["data", "convert", "rows.jsonl", "x.jsonl", "--to", "mesages"]) == 2
    assert "messages?" in capsys.readouterr().err


def test_split_writes_files_that_init_finds(here, capsys):
    found = run(capsys, "data", "split", "rows.jsonl", "--validation", 0.25, "--test", 0.25, "-o", "out", "--seed", 2,
                "--together", "copy")  # fmt: skip
    assert found["rows"] == {"train": 6, "validation": 3, "test": 3} and found["seed"] == 2
    assert sorted(p.name for p in (here / "out").iterdir()) == ["test.jsonl", "train.jsonl", "validation.jsonl"]
    assert main(["init", "out/train.jsonl", "-o", "my.yaml"]) == 0
    assert "validation.jsonl" in (here / "my.yaml").read_text()
    capsys.readouterr()
    assert main(["data", "split", "rows.jsonl", "-o", "other"]) == 2
    assert "--validation 0.1" in capsys.readouterr().err
    assert main(["data", "split", "rows.jsonl", "-o", "other", "--test", "0.5", "--together", "rows"]) == 2


def test_pairs_of_samples_by_a_function_and_on(here, tiny_llama, capsys):
    (here / "mine.py").write_text(
        "def score(prompt, answers, row):\n    return [answer.count('e') for answer in answers]\n"
    )
    words = ["data", "pairs", tiny_llama, "rows.jsonl", "-o", "made.jsonl", "--rank-by", "function:mine.py:score",
             "--samples", 3, "--max-new-tokens", 12, "--device", "cpu", "--batch", 6]  # fmt: skip
    found = run(capsys, *words, "--limit", 4)
    assert found["prompts"] == 4 and found["answers"] == 12 and found["pairs"] + found["ties"] + found["same"] == 4
    found = run(capsys, *words)
    assert found["prompts"] == 12
    whole = (here / "made.jsonl").read_bytes()
    for row in rows_of(here / "made.jsonl"):
        assert row["chosen"].count("e") - row["rejected"].count("e") == row["margin"] > 0
    words[5] = "once.jsonl"
    run(capsys, *words)
    assert (here / "once.jsonl").read_bytes() == whole and len(rows_of(here / "once.jsonl")) > 2
    assert main([*map(str, words), "--temperature", "0.5"]) == 2
    assert "other settings" in capsys.readouterr().err
    (here / "mine.py").write_text((here / "mine.py").read_text().replace("'e'", "'a'"))
    assert main([*map(str, words)]) == 2
    assert "rank_digest" in capsys.readouterr().err


def test_pairs_by_the_rows_own_answers_train(here, tiny_llama, capsys):
    found = run(capsys, "data", "pairs", tiny_llama, "rows.jsonl", "-o", "made.jsonl", "--chosen", "reference",
                "--max-new-tokens", 8, "--device", "cpu")  # fmt: skip
    assert found["pairs"] == 12 and rows_of(here / "made.jsonl")[3]["chosen"] == "it is 3"
    assert "margin" not in rows_of(here / "made.jsonl")[0]
    found = run(capsys, "data", "pairs", tiny_llama, "rows.jsonl", "-o", "near.jsonl", "--rank-by", "reference:chrf",
                "--max-new-tokens", 8, "--device", "cpu", "--samples", 2, "--chosen", "reference")  # fmt: skip
    assert all(0 < row["margin"] <= 100 for row in rows_of(here / "near.jsonl"))
    assert run(capsys, "data", "preview", "made.jsonl", "--model", tiny_llama)["stages"][0]["kind"] == "pairs"


def test_pairs_of_rated_answers_need_no_model(here, capsys):
    rated = [{"prompt": "q", "completion": "good", "stars": 5}, {"prompt": "q", "completion": "bad", "stars": 1}]
    write(here / "rated.jsonl", rated)
    found = run(capsys, "data", "pairs", "none", "rated.jsonl", "-o", "made.jsonl", "--rank-by", "column:stars")
    assert found["pairs"] == 1
    assert rows_of(here / "made.jsonl") == [{"prompt": "q", "chosen": "good", "rejected": "bad", "margin": 4.0}]


@pytest.mark.parametrize(
    "words, what",
    [
        (["m"], "nothing says which answer is better"),
        (["m", "--rank-by", "length"], "reference:rougeL"),
        (["m", "--rank-by", "reference:chrf", "--samples", "1"], "one answer makes no pair"),
        (["m", "--rank-by", "reference:chrf", "--temperature", "0"], "all samples are equal"),
        (["m", "--rank-by", "column:stars"], "nothing is sampled"),
        (["none", "--rank-by", "reference:chrf"], "nothing is sampled"),
        (["m", "--chosen", "best"], "allowed: reference"),
    ],
)
def test_options_that_do_not_go_together_are_told_before_anything_is_loaded(words, what, here, capsys):
    assert main(["data", "pairs", words[0], "rows.jsonl", "-o", "made.jsonl", *words[1:]]) == 2
    assert what in " ".join(capsys.readouterr().err.split())
    assert not (here / "made.jsonl").exists()
