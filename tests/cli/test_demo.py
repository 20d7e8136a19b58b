"""The demo: its recipe is real and small enough; what it shows, on a tiny model."""

import json

import pytest

from shikomi.cli import main
from shikomi.commands.demo import demo_recipe

TRAINED_TOKENS_LIMIT = 45_000  # at 200 tokens a second, the slowest machine of the plan, under four minutes
CHARACTERS_PER_TOKEN = 4.5


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch, tiny_llama):
    """The words of a demo on a tiny model, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return ["demo", f"model={tiny_llama}", "max_steps=2", "evaluate.limit=12", "device=cpu"]


def test_the_recipe_reads_the_rows_of_the_package_wherever_it_runs(tmp_path, monkeypatch, examples):
    monkeypatch.chdir(tmp_path)
    recipe = demo_recipe(tmp_path / "it's: mine")
    assert recipe.output_dir == tmp_path / "it's: mine"
    train, test = recipe.data.train[0], recipe.data.test[0]
    assert train.path == str(examples / "sections/train.jsonl") and test.path == str(examples / "sections/test.jsonl")
    assert set(recipe.evaluate.baselines) == {"majority", "zero-shot", "few-shot"}


def test_the_recipe_is_small_enough_for_two_slow_cores(examples):
    recipe = demo_recipe(examples)
    rows = [json.loads(line) for line in open(recipe.data.train[0].path)][: recipe.data.train[0].limit]
    tokens = sum(len(row["text"]) / CHARACTERS_PER_TOKEN + 12 for row in rows) * recipe.stages[0].num_train_epochs
    assert tokens < TRAINED_TOKENS_LIMIT
    assert recipe.evaluate.limit <= 150


def test_it_shows_before_and_after_five_rows_and_the_next_commands(tiny_demo, tmp_path, capsys):
    assert main([*tiny_demo, "--text", "a puzzle game"]) == 0
    shown = capsys.readouterr()
    for said in ("majority", "zero-shot", "few-shot", "trained", "accuracy", "macro-F1", "95% intervals"):
        assert said in shown.out
    assert "$ shikomi generate runs/demo 'a puzzle game'\n" in shown.out
    labels = json.loads((tmp_path / "runs/demo/result.json").read_text())["data"]["labels"]
    lines = shown.out.splitlines()
    assert lines[lines.index("$ shikomi generate runs/demo 'a puzzle game'") + 1] in labels
    assert "report    runs/demo/report.html" in shown.out and (tmp_path / "runs/demo/report.html").exists()
    assert "shikomi init my.csv" in shown.out
    assert len(json.loads((tmp_path / "runs/demo/result.json").read_text())["evaluation"]["examples"]) == 5

    # Again: nothing is trained, the same is shown.
    before = (tmp_path / "runs/demo/metrics.jsonl").stat().st_mtime_ns
    assert main(tiny_demo) == 0
    again = capsys.readouterr()
    assert "--force trains it anew" in again.err and "macro-F1" in again.out
    assert (tmp_path / "runs/demo/metrics.jsonl").stat().st_mtime_ns == before

    assert main([*tiny_demo, "--force"]) == 0
    assert (tmp_path / "runs/demo/metrics.jsonl").stat().st_mtime_ns > before


def test_force_removes_only_a_demo(tiny_demo, tmp_path, capsys):
    mine = tmp_path / "runs/demo"
    mine.mkdir(parents=True)
    (mine / "recipe.yaml").write_text("model: mine\n")
    assert main([*tiny_demo, "--force"]) == 2
    assert "does not remove it" in capsys.readouterr().err
    assert (mine / "recipe.yaml").exists()
