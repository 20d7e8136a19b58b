import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shikomi.recipe import parse_recipe, starter_recipe

WORDS = st.text(min_size=1, max_size=40)


def test_a_starter_recipe_loads_and_says_what_it_was_given():
    text = starter_recipe(
        model="smollm2",
        train="examples/sections/train.jsonl",
        validation="v.jsonl",
        test="t.jsonl",
        prompt="Which of {labels}?\n\n{text}",
        completion="{label}",
        labels=["admin", "no", "1e-4", "a, b", "[x]"],
        rows=900,
        r=8,
        batch_size=4,
        num_train_epochs=2,
        learning_rate=1e-4,
        max_length=512,
        metrics=["accuracy", "macro_f1"],
        output_dir="runs/x",
        reasons={"max_length": "the longest row has 312 tokens", "batch_size": "a long reason " * 10},
        estimate="About 3 minutes on this machine.\nPeak memory 1.3 GB.",
    )
    recipe = parse_recipe(text)
    (stage,) = recipe.stages
    assert recipe.data.prompt == "Which of {labels}?\n\n{text}"
    assert recipe.data.labels == ("admin", "no", "1e-4", "a, b", "[x]")
    assert recipe.adapter.options == {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    assert (stage.batch_size, stage.num_train_epochs, stage.learning_rate, recipe.max_length) == (4, 2, 1e-4, 512)
    assert recipe.evaluate is not None and recipe.evaluate.metrics == ("accuracy", "macro_f1")
    assert text.startswith("# About 3 minutes on this machine.\n# Peak memory 1.3 GB.\n\n")
    assert "900 rows" in text and "# the longest row has 312 tokens" in text
    assert all(len(line) <= 110 for line in text.splitlines())
    assert recipe.notes == []


def test_every_key_of_a_starter_recipe_has_a_reason():
    lines = starter_recipe(
        model="m", train="a.csv", rows=3, validation=0.1, test="t.csv", metrics=["loss"]
    ).splitlines()
    for i, line in enumerate(lines):
        key = line.strip().partition(":")[0]
        if line.strip() and not line.strip().startswith("#") and key != "data":
            assert "  # " in line or lines[i - 1].strip().startswith("# "), line


def test_without_validation_the_key_is_there_to_switch_on():
    text = starter_recipe(model="m", train=["a.csv", "b.csv"])
    assert parse_recipe(text).data.validation is None
    switched = text.replace("# validation:", "validation:")
    assert parse_recipe(switched).data.validation == 0.05


def test_an_evaluation_is_only_written_where_there_are_rows_for_it():
    assert "evaluate:" not in starter_recipe(model="m", train="a.csv", metrics=["accuracy"])


def test_a_reason_for_a_key_that_is_not_written_is_an_error():
    with pytest.raises(ValueError, match="batchsize"):
        starter_recipe(model="m", train="a.csv", reasons={"batchsize": "x"})


@settings(deadline=None)
@given(WORDS, WORDS, st.lists(WORDS, min_size=2, max_size=6, unique=True), WORDS, WORDS)
def test_any_text_may_be_a_template_a_label_a_reason_or_an_estimate(prompt, system, labels, reason, estimate):
    text = starter_recipe(
        model="m",
        train="a.csv",
        prompt=prompt,
        system=system,
        labels=labels,
        reasons={"prompt": reason, "labels": reason},
        estimate=estimate,
    )
    data = parse_recipe(text).data
    assert (data.prompt, data.system, data.labels) == (prompt, system, tuple(labels))
