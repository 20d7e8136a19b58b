"""A second adapter after a first: the result is what it says, resumes bit for bit, and is one adapter if it can be."""

import json

import pytest
import torch
from running import final_bytes, losses, tiny_recipe, write_rows

from shikomi.data.packing import Example, pack
from shikomi.errors import BadInput, Stopped
from shikomi.inference import open_model
from shikomi.run import resume, train
from shikomi.steps import finish

LORA = {"name": "lora", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
OTHER = {"name": "lora", "r": 3, "lora_alpha": 6, "target_modules": ["v_proj", "down_proj"], "use_rslora": True}
PISSA = {"name": "lora", "r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
DORA = {"name": "dora", "r": 2, "target_modules": ["q_proj", "o_proj"]}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    return write_rows(tmp_path / "rows.jsonl")


def recipe(model, rows, run, first, second, how, **keys):
    stages = [
        {"name": "one", "max_steps": 3},
        {"name": "two", "max_steps": 3, "adapter": second, "previous_adapter": how},
    ]
    return tiny_recipe(model, rows, run, adapter=first, stages=stages, learning_rate=2e-2, save_dtype="fp32", **keys)


def row():
    ids = torch.arange(4, 24).numpy().astype("int32")
    return pack([Example(ids, torch.arange(20).gt(4).numpy(), 0)])


def scores(lm) -> torch.Tensor:
    with torch.no_grad():
        return lm.score(row()).logp


def trained_model(monkeypatch, settings):
    """The model as it was after the last step, and the finished run's values."""
    kept = []
    save = finish.save_final

    def spy(lm, *rest):
        kept.append((lm, scores(lm)))
        return save(lm, *rest)

    monkeypatch.setattr("shikomi.run.save_final", spy)
    values = train(settings).values
    return kept[-1][1], values


@pytest.mark.parametrize("how", ["freeze", "merge"])
@pytest.mark.parametrize("first, second", [(LORA, OTHER), (PISSA, LORA), (OTHER, PISSA)])
def test_two_adapters_become_one_for_the_recipes_own_model(how, first, second, tiny_llama, rows, tmp_path, monkeypatch):
    after, _ = trained_model(monkeypatch, recipe(tiny_llama, rows, tmp_path / "run", first, second, how))
    config = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    torch.testing.assert_close(scores(open_model(tmp_path / "run", dtype="fp32").lm), after, rtol=1e-4, atol=1e-4)
    first_only = scores(open_model(tmp_path / "run" / "stages" / "01-one", dtype="fp32").lm)
    assert (after - first_only).abs().max() > 1e-2  # the second did something, and the first is in there:
    assert losses(tmp_path / "run")[3][1] < losses(tmp_path / "run")[0][1]


@pytest.mark.parametrize("first, second", [(DORA, LORA), (LORA, DORA), (LORA, {"name": "full"})])
def test_what_cannot_be_one_adapter_becomes_a_model(first, second, tiny_llama, rows, tmp_path, monkeypatch):
    after, _ = trained_model(monkeypatch, recipe(tiny_llama, rows, tmp_path / "run", first, second, "merge"))
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    torch.testing.assert_close(
        scores(open_model(tmp_path / "run" / "final", dtype="fp32").lm), after, rtol=1e-4, atol=1e-4
    )


def test_a_frozen_adapter_under_dora_is_in_the_model_that_is_left(tiny_llama, rows, tmp_path, monkeypatch):
    """DoRA does not touch v_proj, where the first adapter stays: its part must not be lost in the merged weights."""
    after, _ = trained_model(monkeypatch, recipe(tiny_llama, rows, tmp_path / "run", LORA, DORA, "freeze"))
    left = open_model(tmp_path / "run" / "final", dtype="fp32").lm
    torch.testing.assert_close(scores(left), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [("merge", "freeze"), ("freeze", "merge"), ("freeze", "freeze"), ("merge", "merge")])
def test_each_of_three_adapters_counts_once(how, tiny_llama, rows, tmp_path, monkeypatch):
    settings = recipe(tiny_llama, rows, tmp_path / "run", LORA, OTHER, how[0])
    third = settings.stages[1].model_copy(
        update={"name": "three", "adapter": settings.adapter, "previous_adapter": how[1]}
    )
    after, _ = trained_model(monkeypatch, settings.model_copy(update={"stages": (*settings.stages, third)}))
    torch.testing.assert_close(scores(open_model(tmp_path / "run", dtype="fp32").lm), after, rtol=1e-4, atol=1e-4)
    second = scores(open_model(tmp_path / "run" / "stages" / "02-two", dtype="fp32").lm)
    assert (after - second).abs().max() > 1e-2


@pytest.mark.parametrize("how, first, second", [("freeze", LORA, OTHER), ("merge", LORA, OTHER), ("merge", DORA, LORA)])
def test_a_resumed_second_stage_is_the_uninterrupted_one(how, first, second, tiny_llama, rows, tmp_path, monkeypatch):
    train(recipe(tiny_llama, rows, tmp_path / "whole", first, second, how, save_steps=1))
    from shikomi.train import loop

    step = loop._step
    monkeypatch.setattr(loop, "_step", lambda run, *rest: stop() if run.state.global_step == 4 else step(run, *rest))
    with pytest.raises(Stopped):
        train(recipe(tiny_llama, rows, tmp_path / "cut", first, second, how, save_steps=1))
    monkeypatch.setattr(loop, "_step", step)
    resume(tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert final_bytes(tmp_path / "cut") == final_bytes(tmp_path / "whole")


def stop():
    raise Stopped("enough", 143)


def test_the_reference_of_a_second_adapter_is_the_first(tiny_llama, rows, tmp_path, monkeypatch):
    """With the second off and the first frozen the model is that of stage one; off is the model as loaded."""
    kept = []
    monkeypatch.setattr("shikomi.run.save_final", lambda lm, *rest: kept.append((lm, scores(lm))))
    train(recipe(tiny_llama, rows, tmp_path / "run", LORA, OTHER, "freeze"))
    lm, after = kept[-1]
    first = kept[0][1]
    with lm.attached.reference():
        torch.testing.assert_close(scores(lm), first, rtol=1e-5, atol=1e-5)
    with lm.adapter_off():
        plain = scores(open_model(tiny_llama, dtype="fp32").lm)
        torch.testing.assert_close(scores(lm), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores(lm), after, rtol=0, atol=0)


@pytest.mark.parametrize(
    "first, second, how, message",
    [
        (LORA, OTHER, "continue", "previous_adapter: freeze"),
        (DORA, LORA, "freeze", "previous_adapter: merge"),
        ({**LORA, "bias": "all"}, OTHER, "freeze", "biases"),
        ({"name": "prompt", "num_virtual_tokens": 4}, LORA, "merge", "neither merged nor kept"),
        (LORA, {"name": "prompt", "num_virtual_tokens": 4}, "merge", "no adapter for the recipe's model"),
        ({"name": "full"}, LORA, "merge", "neither merged nor kept"),
    ],
)
def test_stages_that_cannot_follow_each_other(first, second, how, message, tiny_llama, rows, tmp_path):
    with pytest.raises(BadInput, match=message):
        train(recipe(tiny_llama, rows, tmp_path / "run", first, second, how))
    assert not (tmp_path / "run").exists()
