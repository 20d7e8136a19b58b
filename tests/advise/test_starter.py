"""The first recipe for a file loads, says why, and estimates; the estimate follows the rows and the machine."""

import json

import pytest

from shikomi.advise.starter import starter
from shikomi.errors import BadInput
from shikomi.plan.speed import known_parameters, product_rate, training_seconds
from shikomi.recipe import parse_recipe


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "file",
    [f"{name}/train.jsonl" for name in ("sections", "summaries", "text")]
    + ["columns/packages.csv", "messages/packages.jsonl"],
)
def test_the_recipe_of_every_example_loads(examples, file):
    made = starter(examples / file, "smollm2")
    recipe = parse_recipe(made.text)
    assert recipe.model == "smollm2" and recipe.notes == []
    assert recipe.data.prompt == made.detected.prompt
    assert made.detected.rows == sum(1 for _ in open(examples / file)) or file.endswith(".csv")


def test_every_line_of_the_recipe_has_a_reason(examples):
    text = starter(examples / "sections/train.jsonl", "smollm2").text
    for key in ("model", "train", "prompt", "completion", "labels", "max_length", "batch_size", "learning_rate"):
        lines = text.splitlines()
        at = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{key}:"))
        assert "# " in lines[at] or lines[at - 1].strip().startswith("# "), f"{key} has no reason"


def test_splits_beside_the_file_are_used(examples, tmp_path):
    recipe = parse_recipe(starter(examples / "sections/train.jsonl", "smollm2").text)
    assert [s.path for s in recipe.data.test] == [str(examples / "sections/test.jsonl")]
    assert [s.path for s in recipe.data.validation] == [str(examples / "sections/validation.jsonl")]
    alone = write_rows(tmp_path / "train.jsonl", [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(80)])
    recipe = parse_recipe(starter(alone, "smollm2").text)
    assert recipe.data.test is None and recipe.data.validation == 0.1


def test_labels_choose_the_metrics(examples):
    assert parse_recipe(starter(examples / "sections/train.jsonl", "smollm2").text).evaluate.metrics[0] == "accuracy"
    assert "accuracy" not in parse_recipe(starter(examples / "summaries/train.jsonl", "smollm2").text).evaluate.metrics


@pytest.mark.parametrize(
    "row, objective",
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "dpo"),
        ({"prompt": "q", "completion": "a", "label": True}, "kto"),
    ],
)
def test_preferences_get_an_objective_and_a_rate_of_their_own(tmp_path, row, objective):
    made = starter(write_rows(tmp_path / "rows.jsonl", [row | {"prompt": f"q{i}"} for i in range(60)]), "smollm2")
    recipe = parse_recipe(made.text)
    (stage,) = recipe.stages
    assert (stage.objective.name, stage.objective.options) == (objective, {"beta": 0.1})
    assert stage.learning_rate == 5e-6 and recipe.evaluate is None and recipe.data.validation == 0.1


def test_few_rows_all_train(tmp_path):
    few = write_rows(tmp_path / "few.jsonl", [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(10)])
    assert parse_recipe(starter(few, "smollm2").text).data.validation is None


def test_the_estimate_follows_the_time(examples):
    asked = []

    def seconds_of(tokens):
        asked.append(tokens)
        return 600.0

    made = starter(examples / "sections/train.jsonl", "smollm2", seconds_of)
    assert "2 passes will take about 10 minutes" in made.text.splitlines()[0] + made.text.splitlines()[1]
    (tokens,) = asked
    # SmolLM2's tokenizer counts 64 tokens of text a row; two passes over 900 rows.
    assert 0.8 < tokens / (2 * 900 * (64 + 15)) < 1.25


def test_an_unknown_model_has_no_estimate_but_a_recipe(examples):
    assert known_parameters("owner/name") is None
    assert "not known" in starter(examples / "text/train.jsonl", "owner/name").text


def test_the_run_is_named_after_the_file_or_its_folder(examples, tmp_path):
    assert parse_recipe(starter(examples / "sections/train.jsonl", "smollm2").text).name == "sections"
    odd = write_rows(tmp_path / "mine & yours.jsonl", [{"prompt": "q", "completion": "a"}] * 3)
    assert parse_recipe(starter(odd, "smollm2").text).name == "mine---yours"


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        starter(tmp_path / "no.jsonl", "smollm2")


def test_time_grows_with_tokens_and_parameters(tiny_llama):
    parameters = known_parameters(str(tiny_llama))
    assert parameters == 39_072
    assert training_seconds(200, parameters, 1e9) == 2 * training_seconds(100, parameters, 1e9)
    assert training_seconds(100, parameters, 1e9, full=True) > training_seconds(100, parameters, 1e9)
    assert 1e8 < product_rate("cpu") < 1e14
