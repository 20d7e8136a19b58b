import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shikomi.recipe import RESUMABLE, Recipe, Stage, differences, dump_recipe, parse_recipe

TEXT = "model: m\ndata: {train: a.csv, test: t.csv, validation: 0.1}\n"
OLD = parse_recipe(TEXT)

STAGES = st.fixed_dictionaries(
    {},
    optional={
        "learning_rate": st.floats(1e-9, 1),
        "warmup_steps": st.floats(0, 1) | st.integers(0, 1000),
        "max_grad_norm": st.none() | st.floats(1e-6, 100),
        "batch_size": st.integers(1, 1000),
        "recompute": st.sampled_from(["auto", "none", "full"]) | st.integers(0, 100),
        "sample_prompts": st.lists(st.text(min_size=1), max_size=3),
        "objective": st.sampled_from(["sft", {"name": "sft", "dft": True}]),
    },
)


@settings(deadline=None)  # the first example may import a component
@given(st.lists(STAGES, min_size=1, max_size=3), st.text(min_size=1), st.lists(st.text(min_size=1), max_size=3))
def test_any_recipe_survives_being_saved(stages, prompt, new_tokens):
    from shikomi.recipe import load_recipe

    recipe = load_recipe(
        {"model": "m", "data": {"train": "a.csv", "prompt": prompt}, "stages": stages, "new_tokens": new_tokens}
    )
    again = parse_recipe(dump_recipe(recipe))
    assert again == recipe and again.digest() == recipe.digest() and differences(recipe, again) == []


def changed(line: str) -> Recipe:
    return parse_recipe(TEXT + line)


@pytest.mark.parametrize(
    "line",
    [
        *("learning_rate: 1e-3", "seed: 1", "adapter: {name: lora, r: 4}", "max_length: 512", "shuffle: false"),
        *("num_train_epochs: 2", "new_tokens: [x]", "chat: never", "dtype: fp32", "model_revision: x"),
        *("optim: {name: adamw, adam_beta2: 0.9}", "micro_batch_tokens: 64", "objective: {name: sft, dft: true}"),
        *("data: {train: [{path: a.csv, weight: 2}], test: t.csv, validation: 0.1}", "early_stopping_patience: 1"),
    ],
)
def test_the_digest_sees_what_changes_training(line):
    text = TEXT.splitlines()[0] + "\n" + line if line.startswith("data:") else TEXT + line
    assert parse_recipe(text).digest() != OLD.digest()


@pytest.mark.parametrize(
    "line",
    ["logging_steps: 1", "save_steps: 5", "report_to: wandb", "output_dir: x", "evaluate: {metrics: [accuracy]}"],
)
def test_the_digest_does_not_see_what_is_only_written(line):
    assert changed(line).digest() == OLD.digest()
    assert differences(OLD, changed(line))


def test_the_digest_does_not_see_test_rows_of_a_stage_or_of_the_recipe():
    one = "model: m\nstages: [{data: {train: a.csv, test: t.csv}}]"
    assert parse_recipe(one).digest() == parse_recipe(one.replace("t.csv", "u.csv")).digest()
    assert parse_recipe(one).digest() != parse_recipe(one.replace("a.csv", "u.csv")).digest()


def test_differences_are_dotted_and_a_short_form_is_the_long_one_without_options():
    new = changed("adapter: {name: lora, r: 4}\nstages: [{}, {}]")
    found = {key: (old, value) for key, old, value in differences(OLD, new)}
    assert found["adapter.r"] == (None, 4) and "adapter" not in found and "adapter.name" not in found
    assert found["stages.1.batch_size"] == (None, 16)
    assert differences(OLD, OLD) == []


def test_the_keys_that_may_change_on_resume_exist():
    assert RESUMABLE <= set(Recipe.model_fields) | set(Stage.model_fields)
    named = {key for key in Stage.model_fields if key.startswith(("save_", "eval_"))}
    assert named | {"num_train_epochs", "max_steps", "logging_steps", "report_to"} <= RESUMABLE


def test_a_resolved_recipe_cannot_be_changed_in_place():
    with pytest.raises(ValueError):
        OLD.seed = 3
    assert OLD.with_notes(["x"]) == OLD and OLD.with_notes(["x"]).notes == ["x"] and OLD.notes == []
