"""Jobs of a recipe: the model found without loading it, the rows in tokens, the components built."""

import json

import pytest
from tiny_models import save_tiny, tiny_tokenizer

from shikomi.data.check import load_conversations
from shikomi.data.encode import Encoder
from shikomi.data.sources import rows
from shikomi.errors import BadInput
from shikomi.plan.jobs import jobs, model_of
from shikomi.plan.lengths import rows_of
from shikomi.recipe import load_recipe
from shikomi.recipe.schema import DataSpec, Source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def written(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return str(path)


def recipe(tmp_path, model, **keys):
    text = [{"prompt": "What is it? " + "a server " * (i % 5), "completion": f"a tool {i}"} for i in range(30)]
    data = {"train": written(tmp_path / "rows.jsonl", text)}
    return load_recipe({"model": str(model), "data": data, "output_dir": str(tmp_path / "run"), **keys})


def test_a_job_has_the_recipe_s_values(tmp_path, folder):
    (job,) = jobs(recipe(tmp_path, folder, batch_size=4, num_train_epochs=2, recompute=1, save_dtype="fp32"))
    assert job.architecture.parameters == 39_072 and job.file_dtype == "fp32" and not job.quantized
    assert job.file_bytes == (folder / "model.safetensors").stat().st_size
    assert (job.batch_size, job.steps, job.recompute, job.save_dtype) == (4, 15, 1, "fp32")
    assert job.rows.count == 30 and job.rows.measured and job.adapter.name == "lora" and job.quant is None


def test_a_stage_each(tmp_path, folder):
    pairs = written(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "a b c", "rejected": "d e f"}] * 8)
    stages = [
        {"objective": "sft"},
        {"objective": "dpo", "data": {"train": pairs}},
        {
            "objective": "dpo",
            "data": {"train": pairs},
            "adapter": {"name": "lora", "r": 2},
            "previous_adapter": "merge",
        },
    ]
    first, second, third = jobs(recipe(tmp_path, folder, stages=stages))
    assert (first.fresh, second.fresh, third.fresh) == (True, False, True)
    assert third.adapter.r == 2 and second.rows.prompt_share > 0 and second.rows.count == 8


def test_a_public_model_needs_no_files(tmp_path):
    for name in ("qwen3-8b", "Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base"):
        (job,) = jobs(recipe(tmp_path, name))
        assert job.architecture.parameters == 8_190_735_360 and not job.rows.measured
    assert model_of("smollm2").architecture.parameters == 134_515_008
    with pytest.raises(BadInput, match="the plan does not know this model.*did you mean qwen3-8b"):
        model_of("Qwen/Qwen3-8")
    with pytest.raises(BadInput, match="no such model"):
        model_of("./nothing-here")


def test_config_json_alone_is_enough(tmp_path, folder):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((folder / "config.json").read_bytes())
    found = model_of(str(alone))
    assert found.architecture.parameters == 39_072 and found.file_bytes is None
    (job,) = jobs(recipe(tmp_path, alone))
    assert not job.rows.measured
    (alone / "config.json").unlink()
    with pytest.raises(BadInput, match=r"config\.json is missing"):
        model_of(str(alone))


def test_an_adapter_is_planned_on_its_base(tmp_path, folder):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    (job,) = jobs(recipe(tmp_path, adapter))
    assert job.architecture.parameters == 39_072 and not job.fresh


def test_an_adapter_that_does_not_fit_is_refused(tmp_path, folder):
    with pytest.raises(BadInput, match="no linear or embedding module is named 'c_attn'"):
        jobs(recipe(tmp_path, folder, adapter={"name": "lora", "target_modules": ["c_attn"]}))


@pytest.mark.parametrize("chat", ["never", "auto"])
def test_tokens_are_those_that_are_trained(tmp_path, folder, chat):
    found = [{"prompt": "Which package? " * (1 + i % 7), "completion": f"the tool {i} with parts"} for i in range(40)]
    spec = DataSpec(train=(Source(path=written(tmp_path / "rows.jsonl", found)),))
    planned = rows_of(spec, "conversations", 60, folder, chat)
    encoder = Encoder(tiny_tokenizer(), chat, None, "all", 60)
    real = [encoder.encode(item.conversation) for item in load_conversations(spec.train, spec, None, "train", None)]
    assert planned.count == len(list(rows(spec.train[0]))) == 40
    assert planned.tokens == pytest.approx(sum(len(r.ids) for r in real) / 40, rel=0.15)
    assert planned.longest == pytest.approx(max(len(r.ids) for r in real), rel=0.1)
    assert planned.scored_share == pytest.approx(
        sum(r.mask.sum() for r in real) / sum(len(r.ids) for r in real), rel=0.25
    )


def test_labels_in_a_prompt_are_those_of_the_training_rows(tmp_path, folder):
    found = [{"text": "a tool", "label": label} for label in ("admin", "games", "net", "admin")]
    data = {
        "train": written(tmp_path / "rows.jsonl", found),
        "completion": "{label}",
        "prompt": "One of: {labels}?\n{text}",
    }
    as_recipe = load_recipe({"model": str(folder), "data": data, "output_dir": str(tmp_path / "run")})
    spelled = load_recipe(
        {
            "model": str(folder),
            "data": {**data, "prompt": "One of: admin, games, net?\n{text}"},
            "output_dir": str(tmp_path / "run"),
        }
    )
    assert jobs(as_recipe)[0].rows == jobs(spelled)[0].rows


def test_empty_and_broken_rows_are_refused(tmp_path, folder):
    with pytest.raises(BadInput):
        rows_of(DataSpec(train=(Source(path=written(tmp_path / "no.jsonl", [])),)), "conversations", 64, folder)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\n')
    with pytest.raises(BadInput, match="broken.jsonl:1"):
        rows_of(DataSpec(train=(Source(path=str(tmp_path / "broken.jsonl")),)), "conversations", 64, folder)


def test_a_data_set_on_the_hub_is_not_fetched(folder):
    spec = DataSpec(train=(Source(path="owner/name"),))
    assert not rows_of(spec, "conversations", 512, folder).measured
