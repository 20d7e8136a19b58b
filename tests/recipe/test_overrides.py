import pytest

from shikomi.errors import BadInput
from shikomi.recipe import differences, dump_recipe, parse_recipe, refused_on_resume

ONE = "model: m\ndata: {train: a.csv, validation: 0.1}\nlearning_rate: 1e-3\nadapter: {name: lora, r: 16}\n"
TWO = ONE + "stages:\n  - {name: first, learning_rate: 1e-4}\n  - {name: second, optim: {name: adamw}}\n"


def load(text: str, *overrides: str):
    return parse_recipe(text, "r", overrides)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(BadInput) as caught:
        load(text, *overrides)
    return [str(problem) for problem in caught.value.problems]


def test_values_are_yaml():
    recipe = load(ONE, "learning_rate=1e-4", "adapter.r=8", "shuffle=false", "data.labels=[no, yes]", "data.prompt=a=b")
    assert recipe.stages[0].learning_rate == 1e-4 and recipe.stages[0].shuffle is False
    assert recipe.adapter.options == {"r": 8} and recipe.data.labels == ("no", "yes") and recipe.data.prompt == "a=b"


def test_blocks_are_made_on_the_way():
    recipe = load("model: m\ndata: a.csv", "adapter.r=4", "optim.adam_beta2=0.9", "data.validation=0.2", "max_steps=3")
    assert recipe.adapter.options == {"r": 4} and recipe.adapter.name == "lora"
    assert recipe.stages[0].optim.options == {"adam_beta2": 0.9}
    assert recipe.data.validation == 0.2 and recipe.data.train[0].path.endswith("a.csv")
    assert load(ONE, "stages.0.max_steps=9").stages[0].max_steps == 9
    assert load(ONE, "data.train.0.limit=5").data.train[0].limit == 5


def test_an_override_of_a_stage_key_reaches_every_stage_and_says_what_it_replaced():
    recipe = load(TWO, "learning_rate=5e-5", "optim.adam_beta2=0.9")
    assert [stage.learning_rate for stage in recipe.stages] == [5e-5, 5e-5]
    assert [stage.optim.options for stage in recipe.stages] == [{"adam_beta2": 0.9}] * 2
    assert any("`learning_rate` replaces `learning_rate: 0.0001`" in note for note in recipe.notes)


def test_a_stage_is_meant_by_its_index_or_its_name():
    assert [s.batch_size for s in load(TWO, "stages.1.batch_size=2").stages] == [16, 2]
    assert [s.batch_size for s in load(TWO, "stages.first.batch_size=2").stages] == [2, 16]
    assert "`stages.2` does not exist: found a list of 2" in problems(TWO, "stages.2.batch_size=2")[0]
    assert "did you mean `first`?" in problems(TWO, "stages.frist.batch_size=2")[0]


def test_a_whole_component_is_replaced():
    recipe = load(ONE, "adapter=full")
    assert (recipe.adapter.name, recipe.adapter.options) == ("full", {})


def test_keys_of_other_tools_work_on_the_command_line_too():
    pasted = "model: m\ndata: a.csv\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 2\n"
    assert load(pasted, "gradient_accumulation_steps=8").stages[0].batch_size == 32
    recipe = load(TWO, "lora_r=4", "num_epochs=7")
    assert recipe.adapter.options["r"] == 4 and [s.num_train_epochs for s in recipe.stages] == [7, 7]


def test_every_bad_override_is_reported_with_what_is_wrong_in_the_file():
    found = problems(ONE + "batch_size: 0\n", "lr", "=3", "a=[", "learning_rate=fast", "modle=x", "model.x=1")
    assert found[0].startswith("r.yaml:5: `batch_size`")
    for says in ("`lr`: allowed: key=value", "`=3`", "`a=[`", "`learning_rate`: found 'fast'", "did you mean `model`?"):
        assert any(problem.startswith("command line: ") and says in problem for problem in found), says
    assert any("`model` holds no keys" in problem for problem in found)


def test_an_override_that_no_stage_would_read_is_refused():
    text = "model: m\nstages:\n  - {data: a.csv}\n  - {data: b.csv}\n"
    assert "every stage has its own data" in problems(text, "data.train=c.csv")[0]
    assert load(text, "stages.0.data.train=c.csv").stages[0].data.train[0].path.endswith("c.csv")


def test_a_resolved_recipe_can_be_extended_and_the_rest_is_refused_on_resume():
    old = load(TWO)
    saved = dump_recipe(old)
    extended = load(
        saved, "num_train_epochs=3", "save_steps=5", "report_to=tensorboard", "eval_steps=2", "logging_steps=1"
    )
    assert [stage.num_train_epochs for stage in extended.stages] == [3, 3]
    assert refused_on_resume(old, extended) == []
    assert ("stages.1.num_train_epochs", 1.0, 3.0) in differences(old, extended)
    changed = load(saved, "num_train_epochs=3", "adapter.r=8", "data.train.0.weight=2")
    assert refused_on_resume(old, changed) == [("adapter.r", 16, 8), ("data.train.0.weight", 1.0, 2.0)]
