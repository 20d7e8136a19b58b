"""The whole way through the command line on a tiny model: init, train, use, extend, merge; and a stopped run."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shikomi.cli import main

ENOUGH_STEPS = 100_000


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama):
    """A folder with a CSV, test rows and a finished run of the recipe that init wrote."""
    folder = tmp_path_factory.mktemp("place")
    kinds = {"bird": "sings and flies", "fish": "swims in the sea", "tree": "grows in a wood"}
    rows = [f"{number} {about},{kind}" for number in range(20) for kind, about in kinds.items()]
    (folder / "my.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (folder / "test.csv").write_text("text,label\n" + "\n".join(rows[:12]) + "\n")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["init", "my.csv", "--model", str(tiny_llama)]) == 0
        arguments = ["data.test=test.csv", "max_steps=3", "save_steps=1", "device=cpu"]
        assert main(["train", "my.yaml", *arguments, "--json"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def last_object(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_init_explains_itself_and_never_overwrites(place, capsys):
    text = (place / "my.yaml").read_text()
    assert "{labels}" in text and "bird, fish, tree" in text
    assert "60 rows" in text.splitlines()[0] and "machine" in text.splitlines()[0]
    assert main(["init", "my.csv"]) == 2
    assert "--force" in capsys.readouterr().err
    assert (place / "my.yaml").read_text() == text


def test_init_of_a_broken_file_writes_nothing(place, capsys):
    (place / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert main(["init", "broken.jsonl"]) == 2
    assert "broken.jsonl:2" in capsys.readouterr().err
    assert not (place / "broken.yaml").exists()


def test_the_run_compares_with_the_untouched_model(place):
    result = json.loads((place / "runs/my/result.json").read_text())
    evaluation = result["evaluation"]
    assert set(evaluation["baseline"]) == {"majority", "zero-shot", "few-shot"}
    assert evaluation["n"] == 12 and {"accuracy", "macro_f1"} <= set(evaluation["trained"]["metrics"])
    assert (place / "runs/my/report.html").exists()


def test_the_result_is_shown_with_the_next_commands(capsys):
    assert main(["resume", "runs/my"]) == 0
    text = capsys.readouterr().out
    for said in ("majority", "zero-shot", "few-shot", "trained", "report:   runs/my/report.html"):
        assert said in text
    assert "use it:   shikomi generate runs/my 'Some text'" in text


def test_dry_run_shows_which_tokens_are_trained(capsys):
    assert main(["train", "my.yaml", "--dry-run", "output_dir=runs/never"]) == 0
    text = capsys.readouterr().out
    assert "[[bird<|im_end|>]]" in text or "[[fish<|im_end|>]]" in text or "[[tree<|im_end|>]]" in text
    assert "batch    16 rows a step" in text
    assert not Path("runs/never").exists()


def test_train_without_a_recipe_keeps_the_one_it_made(tiny_llama, capsys):
    arguments = ["--model", str(tiny_llama), "--data", "my.csv", "max_steps=1", "output_dir=runs/quick"]
    assert main(["train", *arguments]) == 0
    assert "{labels}" in capsys.readouterr().err, "the guessed prompt was not said"
    assert "completion: '{label}'" in Path("runs/quick/recipe.yaml").read_text()


def test_generate_answers_with_a_label(capsys):
    assert main(["generate", "runs/my", "it swims"]) == 0
    assert capsys.readouterr().out.strip() in {"bird", "fish", "tree"}
    assert main(["generate", "runs/my", "it swims", "--json"]) == 0
    assert last_object(capsys)["answer"] in {"bird", "fish", "tree"}


def test_generate_streams_what_it_returns(tiny_llama, capsys):
    assert main(["generate", str(tiny_llama), "hello", "--max-new-tokens", "6"]) == 0
    streamed = capsys.readouterr().out
    assert main(["generate", str(tiny_llama), "hello", "--max-new-tokens", "6", "--json"]) == 0
    assert last_object(capsys)["answer"].strip() == streamed.strip()


def test_generate_reads_stdin_and_refuses_nothing(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("it swims\n"))
    assert main(["generate", "runs/my", "-", "--json"]) == 0
    assert last_object(capsys)["text"] == "it swims"
    assert main(["generate", "runs/my", " "]) == 2


def test_predict_answers_every_row_and_never_overwrites(place, capsys):
    (place / "new.csv").write_text("text\nit flies\nit grows\n")
    assert main(["predict", "runs/my", "new.csv", "-o", "answers.jsonl", "--json"]) == 0
    assert last_object(capsys)["rows"] == 2
    rows = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["it flies", "it grows"]
    for row in rows:
        assert row["prediction"] == max(row["probabilities"], key=row["probabilities"].get)
    assert main(["predict", "runs/my", "new.csv", "-o", "answers.jsonl"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["predict", "runs/my", "missing.csv", "-o", "none.jsonl"]) == 2
    assert not list(place.glob("none.jsonl*"))


def test_eval_of_the_run_is_what_the_run_measured(place, capsys):
    assert main(["eval", "runs/my", "test.csv", "--metrics", "accuracy", "--json"]) == 0
    found = last_object(capsys)
    measured = json.loads((place / "runs/my/result.json").read_text())["evaluation"]["trained"]
    assert found["n"] == 12
    assert found["metrics"]["accuracy"]["value"] == measured["metrics"]["accuracy"]["value"]


def test_eval_of_a_base_model_takes_templates_and_labels(tiny_llama, capsys):
    options = ["--labels", "bird, fish,tree", "--prompt", "{text}?", "--completion", "{label}"]
    assert main(["eval", str(tiny_llama), "test.csv", "--metrics", "accuracy,loss", *options, "--json"]) == 0
    assert set(last_object(capsys)["metrics"]) == {"accuracy", "loss"}
    assert main(["eval", str(tiny_llama), "test.csv", "--metrics", "accuracy", *options[2:]]) == 2
    assert "--labels" in capsys.readouterr().err


def test_chat_through_a_pipe(tiny_llama, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/base\n/reset\n/base\n/bas\n/quit\nnever\n"))
    assert main(["chat", "runs/my", "--max-new-tokens", "4"]) == 0
    text = capsys.readouterr().out
    assert "untouched model: " in text
    assert "nothing was asked yet" in text
    assert "did you mean /base?" in text
    assert "never" not in text


def test_merge_writes_a_plain_model_that_answers_alike(capsys):
    assert main(["merge", "runs/my", "--output", "merged", "--json"]) == 0
    found = last_object(capsys)
    assert found["top1_agreement"] > 0.99 and found["output"] == "merged"
    assert (Path("merged") / "config.json").exists() and not (Path("merged") / "adapter_config.json").exists()
    assert main(["merge", "runs/my", "--output", "merged"]) == 2


def test_runs_lists_compares_and_clears(capsys):
    assert main(["runs", "--json"]) == 0
    names = {row["name"]: row for row in last_object(capsys)["runs"]}
    assert names["my"]["status"] == "finished" and names["my"]["step"] == 3
    assert main(["runs", "list"]) == 0
    assert "runs/my" in capsys.readouterr().out
    assert main(["runs", "watch", "runs/my"]) == 0
    assert "runs/my: finished  step 3" in capsys.readouterr().out
    before = sorted(p.name for p in Path("runs/my/checkpoints").iterdir())
    assert main(["runs", "gc", "--dry-run"]) == 0
    assert f"runs/my/checkpoints/{before[0]}" in capsys.readouterr().out
    assert sorted(p.name for p in Path("runs/my/checkpoints").iterdir()) == before
    assert main(["runs", "diff", "runs/my", "runs/nope"]) == 2


def test_resume_extends_a_finished_run(tmp_path, tiny_llama, capsys):
    run = tmp_path / "extended"
    assert main(["train", "my.yaml", "max_steps=1", f"output_dir={run}", "--json"]) == 0
    assert last_object(capsys)["steps"] == 1
    assert main(["resume", str(run), "max_steps=2", "--json"]) == 0
    assert last_object(capsys)["steps"] == 2
    assert main(["resume", str(run), "learning_rate=0.1"]) == 2


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_prints_the_command_that_goes_on(tmp_path, number, code):
    run = tmp_path / "a run"
    command = [sys.executable, "-m", "shikomi.cli", "train", "my.yaml", f"max_steps={ENOUGH_STEPS}"]
    with subprocess.Popen([*command, f"output_dir={run}"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith("step 1/"):
                break
        else:
            pytest.fail("".join(seen))
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(60) == code, rest
    assert seen[0].startswith("reading my.yaml")
    assert "Traceback" not in rest
    words = shlex.split(rest.splitlines()[-1].removeprefix("  go on:"))
    assert words == ["shikomi", "resume", str(run)], "the command does not go on with this run"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert main(["resume", str(run), f"max_steps={max(steps) + 1}"]) == 0
    after = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step for step in after if step <= max(steps)] == steps


def test_a_second_writer_is_told_to_try_again(tmp_path, capsys):
    from shikomi.checkpoint.lock import RunLock

    run = tmp_path / "busy"
    assert main(["train", "my.yaml", "max_steps=1", f"output_dir={run}"]) == 0
    with RunLock(run):
        assert main(["resume", str(run), "max_steps=2"]) == 75
    assert "error: " in capsys.readouterr().err
