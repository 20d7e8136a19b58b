import json
import os
from pathlib import Path

import pytest

from shikomi.errors import BadInput
from shikomi.recipe import (
    ComponentSpec,
    DataSpec,
    Source,
    Stage,
    as_json,
    build,
    dump_recipe,
    load_recipe,
    parse_recipe,
)

MINIMAL = "model: smollm2\ndata: rows.jsonl\n"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "sections.yaml") -> Path:
    path = Path(name)
    path.write_text(text, encoding="utf-8")
    return path


def problems(source, overrides=()) -> list[str]:
    with pytest.raises(BadInput) as caught:
        load_recipe(source, overrides)
    return [str(problem) for problem in caught.value.problems]


def test_two_lines_are_a_recipe_with_the_documented_defaults():
    recipe = load_recipe(write(MINIMAL))
    (stage,) = recipe.stages
    assert recipe.data.train == (Source(path=os.path.abspath("rows.jsonl")),)
    assert recipe.output_dir == Path("runs/sections").absolute() and recipe.name == "sections"
    assert (recipe.adapter, recipe.quant) == (ComponentSpec(name="lora"), ComponentSpec(name="none"))
    assert (stage.name, stage.objective.name, stage.optim.name) == ("sft", "sft", "adamw")
    assert (stage.batch_size, stage.micro_batch_tokens, stage.learning_rate) == (16, 2048, 2e-4)
    assert (stage.num_train_epochs, stage.warmup_steps, stage.max_grad_norm) == (1, 0.03, 1.0)
    assert recipe.data.validation is None and recipe.evaluate is None and recipe.notes == []


def test_full_fine_tuning_has_a_tenth_of_the_learning_rate():
    assert load_recipe(write(MINIMAL + "adapter: full")).stages[0].learning_rate == 2e-5
    assert load_recipe(write(MINIMAL + "adapter: full\nlearning_rate: 1e-4")).stages[0].learning_rate == 1e-4
    assert load_recipe(write(MINIMAL + "objective: dpo")).stages[0].learning_rate == 5e-6
    assert load_recipe(write(MINIMAL + "objective: kto\nadapter: full")).stages[0].learning_rate == 5e-7


def test_keys_at_the_top_are_defaults_of_every_stage():
    recipe = load_recipe(
        write(
            MINIMAL
            + "weight_decay: 0.1\nbatch_size: 4\noptim: {name: adamw, adam_beta2: 0.95}\n"
            + "stages:\n  - {batch_size: 8}\n  - {name: second, learning_rate: 5e-6, data: other.jsonl}\n  - {}\n"
        )
    )
    first, second, third = recipe.stages
    assert [stage.batch_size for stage in recipe.stages] == [8, 4, 4]
    assert {stage.weight_decay for stage in recipe.stages} == {0.1}
    assert {stage.optim.options["adam_beta2"] for stage in recipe.stages} == {0.95}
    assert [stage.name for stage in recipe.stages] == ["sft", "second", "sft-2"]
    assert [stage.learning_rate for stage in recipe.stages] == [2e-4, 5e-6, 2e-4]
    assert recipe.data_of(second).train[0].path == os.path.abspath("other.jsonl")
    assert recipe.data_of(first) == recipe.data_of(third) == recipe.data


def test_an_objective_at_the_top_without_stages_is_a_run_of_one_stage():
    (stage,) = load_recipe(write(MINIMAL + "objective: {name: sft}\nmax_steps: 5")).stages
    assert (stage.objective.name, stage.max_steps) == ("sft", 5)


def test_a_recipe_without_data_of_its_own_takes_that_of_its_stages():
    recipe = load_recipe(write("model: m\nstages:\n  - {data: a.jsonl}\n  - {data: b.jsonl}"))
    assert recipe.data.train[0].path.endswith("a.jsonl")
    assert "`data` is missing" in problems(write("model: m\nstages:\n  - {data: a.jsonl}\n  - {}"))[0]


def test_component_options_are_checked_and_built_from_their_own_class():
    recipe = load_recipe(write(MINIMAL + "adapter: {name: lora, r: 4, lora_alpha: 8, target_modules: [q_proj]}"))
    lora = build("adapters", recipe.adapter)
    assert (lora.r, lora.lora_alpha, lora.target_modules, lora.lora_dropout) == (4, 8, ["q_proj"], 0.0)
    with pytest.raises(BadInput, match="`lora.r`"):
        build("adapters", ComponentSpec(name="lora", options={"r": -1}))


def test_a_component_block_without_a_name_is_the_default_one():
    assert load_recipe(write(MINIMAL + "adapter: {r: 4}")).adapter == ComponentSpec(name="lora", options={"r": 4})


def test_sources_may_be_a_path_a_block_or_a_list_of_both():
    text = "model: m\ndata:\n  train: [a.csv, {path: b.csv, weight: 0.5, limit: 10}]\n  test: {path: c.csv, split: x}\n"
    data = load_recipe(write(text)).data
    assert [(Path(s.path).name, s.weight, s.limit) for s in data.train] == [("a.csv", 1, None), ("b.csv", 0.5, 10)]
    assert data.test is not None and data.test[0].split == "x"
    assert load_recipe(write("model: m\ndata: {train: a.csv, validation: 0.05}")).data.validation == 0.05


def test_local_paths_become_absolute_and_hub_ids_and_aliases_do_not(tmp_path):
    def paths(model: str, train: str) -> tuple[str, str]:
        recipe = load_recipe({"model": model, "data": train})
        return recipe.model, recipe.data.train[0].path

    here = str(tmp_path)
    assert paths("smollm2", "owner/rows") == ("smollm2", "owner/rows")
    assert paths("Qwen/Qwen2.5-0.5B", "hf://datasets/owner/rows/x.csv")[1] == "hf://datasets/owner/rows/x.csv"
    assert paths("m", "hub:owner/rows.v2")[1] == "hub:owner/rows.v2"
    assert paths("Qwen/Qwen2.5-0.5B", "owner/rows.jsonl") == ("Qwen/Qwen2.5-0.5B", f"{here}/owner/rows.jsonl")
    assert paths("model.gguf", "rows") == (f"{here}/model.gguf", f"{here}/rows")
    assert paths("./smollm2", "~/rows.csv") == (f"{here}/smollm2", os.path.expanduser("~/rows.csv"))
    Path("owner/rows").mkdir(parents=True)
    Path("smollm2").mkdir()
    assert paths("smollm2", "owner/rows") == ("smollm2", f"{here}/owner/rows")
    Path("smollm2/config.json").write_text("{}")
    assert paths("smollm2", "owner/rows")[0] == f"{here}/smollm2"


def test_a_chat_template_is_jinja_or_a_path(tmp_path):
    inline = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert load_recipe({"model": "m", "data": "a.csv", "chat_template": inline}).chat_template == inline
    path = load_recipe({"model": "m", "data": "a.csv", "chat_template": "t/chat.jinja"}).chat_template
    assert path == str(tmp_path / "t/chat.jinja")
    assert "`chat_template`: found 'chatml'" in problems({"model": "m", "data": "a.csv", "chat_template": "chatml"})[0]


def test_the_saved_recipe_reloads_unchanged_from_anywhere(tmp_path, monkeypatch):
    recipe = load_recipe(
        write(
            'model: ./m\nadapter: {name: lora, r: 4}\ndata: {train: [a.jsonl], validation: 0.1, prompt: "a\\n{b}: #"}\n'
            "stages: [{learning_rate: 1e-05}, {objective: {name: sft, dft: true}, data: c.csv, max_grad_norm: null}]\n"
            "evaluate: {metrics: [accuracy]}\nreport_to: tensorboard\nnew_tokens: ['1e-4', 'no']"
        )
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = load_recipe(write(dump_recipe(recipe), "recipe.yaml"))
    assert again == recipe and again.digest() == recipe.digest() and dump_recipe(again) == dump_recipe(recipe)
    assert load_recipe(write(as_json(recipe), "recipe.json")) == recipe
    assert load_recipe(json.loads(as_json(recipe))) == recipe
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_a_recipe_from_python_may_hold_paths_tuples_and_parts_of_the_schema():
    recipe = load_recipe(
        {"model": Path("m.gguf"), "data": DataSpec(train=(Source(path="a.csv", limit=3),)), "stages": (Stage(),)}
    )
    assert recipe.data.train[0].limit == 3 and recipe.output_dir.name == "m.gguf"
    assert "a value that no recipe can hold" in problems({"model": object(), "data": "a.csv"})[0]


@pytest.mark.parametrize("writer", ["none", None, ["none"], []])
def test_no_writer_can_be_said_in_four_ways(writer):
    assert load_recipe({"model": "m", "data": "a.csv", "report_to": writer}).report_to == ()


def test_a_file_that_cannot_be_a_recipe_is_one_clear_problem(tmp_path):
    assert problems("nowhere.yaml") == ["nowhere.yaml: there is no such recipe: fix: `shikomi init DATA` writes one"]
    assert "found a folder" in problems(tmp_path)[0]
    Path("latin.yaml").write_bytes(b"model: m\ndata: caf\xe9.csv")
    assert problems("latin.yaml")[0].startswith("latin.yaml:2: not UTF-8")
    assert "a block of `key: value`" in problems(write("- a\n- b"))[0]
    assert "`model` is missing" in problems(write(""))[0]
    Path("bom.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_recipe("bom.yaml").model == "smollm2"
    with open("huge.yaml", "wb") as file:
        file.truncate(20_000_000)
    assert "too large for a recipe" in problems("huge.yaml")[0]


def test_nothing_is_written_by_loading(tmp_path):
    load_recipe(write(MINIMAL))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sections.yaml"]
