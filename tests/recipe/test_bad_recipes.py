from pathlib import Path

import pytest

from shikomi.errors import BadInput
from shikomi.recipe import load_recipe, parse_recipe

BASE = "model: m\ndata: {train: rows.jsonl, validation: 0.1}\n"


def problems(text: str) -> list[str]:
    with pytest.raises(BadInput) as caught:
        parse_recipe(text, "r")
    return [str(problem) for problem in caught.value.problems]


def one(line: str) -> str:
    """The only problem of a recipe whose third line is `line`."""
    (problem,) = problems(BASE + line)
    return problem


def test_every_problem_of_a_file_in_one_go_each_on_its_line():
    found = problems(
        """\
modle: smollm2
adapter: {name: lora, rr: 16, lora_dropout: 1.5,
          r: "8"}
quant: nf5
data:
  train:
    - {path: a.jsonl, weight: -1}
    - {path: b.jsonl, wieght: 2}
  colour: red
learning_rate: "1e-4"
evaluate: {metrics: [acuracy]}
stages:
  - {objective: sfd, max_length: 3}
  - learning_rate: 3
"""
    )
    lines = {
        int(problem.split(":")[1]): problem for problem in found if "missing" not in problem and "rows" not in problem
    }
    assert sorted(lines) == [1, 2, 3, 4, 7, 8, 9, 10, 11, 13, 14]
    assert len(found) == 15  # `model` is missing; lines 2, 11 (no rows to evaluate on) and 13 have two
    assert "unknown key `modle`" in lines[1] and lines[1].endswith("fix: did you mean `model`?")
    assert "`adapter.r`: found '8', a number in quotes" in lines[3]
    assert "`quant: nf5` does not exist" in lines[4] and lines[4].endswith("did you mean `nf4`?")
    assert "`data.train.0.weight`: found -1; allowed: a number, above 0" in lines[7]
    assert "did you mean `weight`?" in lines[8]
    assert "unknown key `data.colour`: allowed: train, validation, test" in lines[9]
    assert "`acuracy` does not exist" in lines[11] and "did you mean `accuracy`?" in lines[11]
    assert "`stages.1.learning_rate`: found 3; allowed: a number, above 0, at most 1" in lines[14]
    assert any("did you mean `r`?" in problem for problem in found)
    assert any("`adapter.lora_dropout`: found 1.5; allowed: a number, at least 0, below 1" in p for p in found)
    assert any("did you mean `sft`?" in problem for problem in found)
    assert any("move it out of the stage" in problem for problem in found)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("learning_rate: '1e-4'", "found '1e-4', a number in quotes; allowed: a number, above 0, at most 1; "),
        ("learning_rate: '1e-4'", "fix: write it without quotes: 1e-4"),
        ("eval_steps: 1_000", "found '1_000', which is text; allowed: a whole number"),
        ("eval_steps: 1,000", "fix: write 1000"),
        ("learning_rate: 0", "found 0;"),
        ("learning_rate: -1e-4", "found -0.0001;"),
        ("learning_rate: 2", "at most 1"),
        ("learning_rate: .nan", "found nan"),
        ("learning_rate: .inf", "found inf"),
        ("learning_rate: true", "found true; allowed: a number"),
        ("learning_rate: [1e-4]", "found a list of 1; allowed: a number"),
        ("batch_size: 0", "found 0; allowed: a whole number, at least 1"),
        ("batch_size: 8.0", "fix: write 8"),
        ("batch_size: 8.5", "found 8.5; allowed: a whole number"),
        ("batch_size: 99999999999999999999999", "at most 1,000,000"),
        ("max_length: 4", "at least 8, at most 1,000,000"),
        ("warmup_steps: -3", "found -3; allowed: a number, at least 0"),
        ("warmup_steps: 1.5", "a share of all steps below 1, or a whole number of steps"),
        ("adapter: {name: lora, lora_dropout: 1}", "`adapter.lora_dropout`: found 1; allowed: a number, at least 0"),
        ("adapter: {name: lora, r: 0}", "`adapter.r`: found 0; allowed: a whole number, at least 1"),
        ("adapter: {name: full, r: 8}", "unknown key `adapter.r`: allowed: last_layers, freeze"),
        ("adapter: loro", "`adapter: loro` does not exist"),
        ("adapter: null", "`adapter`: found null; allowed: a name, or {name: ..., its options}"),
        ("adapter: [lora]", "`adapter`: found a list of 1"),
        ("shuffle: yes", "found 'yes'; allowed: true or false; fix: write true"),
        ("dtype: bf61", "allowed: auto, bf16, fp16, fp32; fix: did you mean `bf16`?"),
        ("report_to: wandbb", "did you mean `wandb`?"),
        ("recompute: some", "allowed: auto, none, full or a whole number, at least 0"),
        ("recompute: -1", "found -1"),
        ("max_steps: 0", "found 0; allowed: a whole number, at least 1"),
        ("seed: -1", "found -1"),
        ("save_total_limit: 0", "or null"),
        ("metric_for_best_model: eval_los", "did you mean `eval_loss`?"),
        ("sample_prompts: Hello", "fix: write it as a list: [Hello]"),
        ("evaluate: {baselines: [zero_shot]}", "did you mean `zero-shot`?"),
        ("new_tokens: [1]", "`new_tokens.0`: found 1; allowed: text, not empty; fix: put it in quotes: '1'"),
        ("prompt: hello", "move it under `data`: `data.prompt`"),
        ("shots: 3", "move it under `evaluate`: `evaluate.shots`"),
        ("output_dir: ''", "`output_dir`"),
        ("chat: sometimes", "allowed: auto, always, never"),
        ("stages: []", "`stages`"),
        ("stages: 3", "`stages`: found 3"),
        ("stages: [sft]", "`stages.0`: found 'sft'"),
    ],
)
def test_one_bad_line_is_one_problem_that_says_what_to_do(line, says):
    problem = one(line)
    assert problem.startswith("r.yaml:3: ") and says in problem


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("{train: []}", "`data.train`"),
        ("{train: [{weight: 1}]}", "`data.train.0.path` is missing"),
        ("{train: a.csv, validation: 2}", "found 2; allowed: a path or a list of {path, weight, limit, split}"),
        ("{train: a.csv, validation: 0}", "found 0;"),
        ("{train: a.csv, validation: [{path: b.csv, limit: 0}]}", "`data.validation.0.limit`: found 0"),
        ("{train: a.csv, labels: [yes, no, 1]}", "`data.labels.2`: found 1"),
        ("{train: a.csv, labels: [a, b, a]}", "`data.labels` names 'a' twice"),
        ("{train: a.csv, labels: [a]}", "`data.labels`"),
        ("{train: a.csv, format: columns}", "`format: columns` without templates"),
        ("{train: 3}", "`data.train`: found 3"),
        ("3", "`data`: found 3"),
    ],
)
def test_bad_data_blocks(data, says):
    (problem,) = problems(f"model: m\ndata: {data}")
    assert problem.startswith("r.yaml:2: ") and says in problem


@pytest.mark.parametrize("key", ["eval_steps: 5", "early_stopping_patience: 2", "load_best_model_at_end: true"])
def test_keys_that_need_validation_rows_say_so(key):
    (problem,) = problems(f"model: m\ndata: a.csv\n{key}\n")
    assert f"`{key}` without validation rows" in problem and "data.validation: 0.05" in problem
    assert parse_recipe(BASE + key)


def test_samples_alone_may_be_drawn_without_validation_rows():
    assert parse_recipe("model: m\ndata: a.csv\neval_steps: 5\nsample_prompts: [Hello]").stages[0].eval_steps == 5


def test_an_evaluation_needs_rows_that_are_not_trained():
    assert "add `data.test: FILE`" in problems("model: m\ndata: a.csv\nevaluate: {metrics: [accuracy]}")[0]
    assert parse_recipe("model: m\ndata: {train: a.csv, test: b.csv}\nevaluate: {metrics: [accuracy]}").evaluate


def test_a_bad_default_at_the_top_is_reported_once_and_by_its_own_name():
    found = problems(BASE + "learning_rate: 5\nstages: [{}, {}, {learning_rate: 1e-4}]")
    assert found == ["r.yaml:3: `learning_rate`: found 5; allowed: a number, above 0, at most 1"]


def test_a_component_that_is_planned_is_not_called_a_spelling_mistake(monkeypatch):
    monkeypatch.setattr("shikomi.registry.names", lambda kind: ["full", "lora"] if kind == "adapters" else ["none"])
    (problem,) = problems("model: m\ndata: a.csv\noptim: none\nobjective: ppo")
    assert problem == "r.yaml:4: `objective: ppo` is not built yet: allowed: none"


def test_a_secret_in_a_recipe_is_refused_and_never_repeated():
    (problem,) = problems(BASE + "token: hf_abcdefgh")
    assert "HF_TOKEN" in problem and "hf_abcdefgh" not in problem
    recipe = parse_recipe(BASE + "token: env:MY_TOKEN")
    assert recipe.model_token_env == "MY_TOKEN"


def test_errors_name_the_file_as_it_was_given():
    path = Path(__file__).parent / "bad.json"
    with pytest.raises(BadInput, match="no such recipe"):
        load_recipe(path)
