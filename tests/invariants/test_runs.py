"""Whole runs: what a kill, a signal, a resume, a changed recipe or a damaged file may and may not change."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import final_bytes, losses, tiny_recipe, write_rows
from safetensors.torch import load_file

from shikomi.checkpoint.lock import RunLock
from shikomi.errors import BadInput, NonFinite, Stopped, TryAgain
from shikomi.recipe import Stage
from shikomi.run import resume, train
from shikomi.steps import hooks

SUPPORT = Path(__file__).resolve().parent.parent / "support"


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    return write_rows(tmp_path / "rows.jsonl")


def test_training_learns_and_repeats_bit_for_bit(tiny_llama, rows, tmp_path):
    for name in ("a", "b"):
        train(tiny_recipe(tiny_llama, rows, tmp_path / name, max_steps=20, learning_rate=2e-2))
    curve = losses(tmp_path / "a")
    assert curve == losses(tmp_path / "b") and final_bytes(tmp_path / "a") == final_bytes(tmp_path / "b")
    assert curve[-1][1] < 0.8 * curve[0][1] and all(norm > 0 for _, _, norm in curve)
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    promised = "wall_seconds training_seconds trained_tokens total_tokens tokens_per_second peak_memory_bytes"
    promised += " trainable_parameters total_parameters final_loss planned evaluation versions"
    assert set(promised.split()) <= set(result)


def test_fifty_kills_change_nothing(tiny_llama, rows, tmp_path):
    """SIGKILL at random instants, 50 times: the same final bytes and the same curve as one uninterrupted run."""
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "killed.py"), str(tiny_llama), str(rows), str(tmp_path), "50"],
        env={**os.environ, "PYTHONPATH": str(SUPPORT), "SHIKOMI_CACHE": str(tmp_path / "cache")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    killed, count = map(int, re.search(r"killed (\d+) runs (\d+)", done.stdout).groups())
    assert killed >= 50
    for number in range(count):
        assert final_bytes(tmp_path / f"killed-{number}") == final_bytes(tmp_path / "whole")
        assert losses(tmp_path / f"killed-{number}") == losses(tmp_path / "whole")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_resumes(number, code, tiny_llama, rows, tmp_path):
    class Impatient:
        def __getattr__(self, name):
            def told(*args):
                if name == "advance" and args[0]["step"] == 3:
                    os.kill(os.getpid(), number)

            return told

    keys = {"max_steps": 7}
    with pytest.raises(Stopped, match="shikomi resume") as stopped:
        train(tiny_recipe(tiny_llama, rows, tmp_path / "run", **keys), Impatient())
    assert stopped.value.exit_code == code
    assert [step for step, *_ in losses(tmp_path / "run")] == [1, 2, 3]
    resume(tmp_path / "run")
    train(tiny_recipe(tiny_llama, rows, tmp_path / "whole", **keys))
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "whole")


def test_a_finished_run_is_left_alone_and_can_be_extended(tiny_llama, rows, tmp_path):
    short = {"max_steps": None, "num_train_epochs": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}
    train(tiny_recipe(tiny_llama, rows, tmp_path / "run", **short))
    before = final_bytes(tmp_path / "run")
    assert resume(tmp_path / "run").values["finished"] and final_bytes(tmp_path / "run") == before
    with pytest.raises(BadInput, match="resume"):
        train(tiny_recipe(tiny_llama, rows, tmp_path / "run", **short))
    resume(tmp_path / "run", ["num_train_epochs=2"])
    train(tiny_recipe(tiny_llama, rows, tmp_path / "long", **{**short, "num_train_epochs": 2}))
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "long")
    with pytest.raises(BadInput, match="learning_rate"):
        resume(tmp_path / "run", ["learning_rate=0.1"])


def test_a_damaged_newest_checkpoint_is_passed_over(tiny_llama, rows, tmp_path):
    keys = {"max_steps": 6, "save_steps": 2}
    train(tiny_recipe(tiny_llama, rows, tmp_path / "run", **keys))
    whole = final_bytes(tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "adapter.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    (tmp_path / "run" / "result.json").write_text(json.dumps({**result, "finished": False}))
    resume(tmp_path / "run")
    assert "step-000006" in (tmp_path / "run" / "log.txt").read_text()
    assert final_bytes(tmp_path / "run") == whole


def test_a_recipe_edited_in_the_run_is_refused_with_the_difference(tiny_llama, rows, tmp_path):
    train(tiny_recipe(tiny_llama, rows, tmp_path / "run", max_steps=2))
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("batch_size: 4", "batch_size: 8"))
    with pytest.raises(BadInput, match="batch_size: was 4, now 8"):
        resume(tmp_path / "run", ["max_steps=4"])


def test_two_writers_and_changed_data_are_refused(tiny_llama, rows, tmp_path):
    recipe = tiny_recipe(tiny_llama, rows, tmp_path / "run", max_steps=4, save_steps=2)
    with RunLock(tmp_path / "run"), pytest.raises(TryAgain):
        train(recipe)
    train(recipe)
    write_rows(rows, 41)
    with pytest.raises(BadInput, match="data"):
        resume(tmp_path / "run", ["max_steps=8"])


def test_a_non_finite_loss_stops_before_the_update(tiny_folder, rows, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    import shutil

    shutil.copytree(tiny_folder("llama"), broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("inf")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises((NonFinite, BadInput)):
        train(tiny_recipe(broken, rows, tmp_path / "run"))
    assert not (tmp_path / "run" / "final").exists()


def test_non_finite_batch_is_written(tiny_llama, rows, tmp_path, monkeypatch):
    from shikomi.objectives._objective import Outcome, Term
    from shikomi.objectives.sft import Sft

    calls = []

    def exploding(self, scored):
        calls.append(1)
        total = -scored.logp.sum() * (float("nan") if len(calls) == 3 else 1)
        return Outcome({"nll": Term(total, "tokens")}, {})

    monkeypatch.setattr(Sft, "__call__", exploding)
    with pytest.raises(NonFinite, match="step 3"):
        train(tiny_recipe(tiny_llama, rows, tmp_path / "run"))
    batch = json.loads((tmp_path / "run" / "non_finite_batch.json").read_text())
    assert batch["step"] == 3 and len(batch["data_rows"]) == 4 and all(batch["text"])
    assert len(losses(tmp_path / "run")) == 2


def test_out_of_memory_halves_the_micro_batch_once(tiny_llama, rows, tmp_path, monkeypatch):
    from shikomi.model.language_model import LanguageModel

    score = LanguageModel.score

    def small(self, packed):
        if len(packed.ids) > 300:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return score(self, packed)

    monkeypatch.setattr(LanguageModel, "score", small)
    train(tiny_recipe(tiny_llama, rows, tmp_path / "run", micro_batch_tokens=512, share_prefix=False, batch_size=8))
    assert "512 -> 256" in (tmp_path / "run" / "log.txt").read_text()
    state = json.loads(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1].joinpath("state.json").read_text())
    assert state["micro_batch_tokens"] == 256
    with pytest.raises(TryAgain, match="micro_batch_tokens"):
        train(
            tiny_recipe(
                tiny_llama, rows, tmp_path / "other", micro_batch_tokens=2048, share_prefix=False, batch_size=32
            )
        )


def test_the_loss_scale_of_fp16_is_part_of_a_checkpoint(tiny_llama, rows, tmp_path, monkeypatch):
    """Scaling by powers of two changes nothing in fp32, so that the scaler's own state can be watched on a CPU."""
    scaler = torch.amp.GradScaler

    def growing(device, enabled):
        return scaler("cpu", init_scale=4.0, growth_interval=2, enabled=True)

    monkeypatch.setattr(torch.amp, "GradScaler", growing)
    states = []
    for name, steps in (("whole", 6), ("cut", 3)):
        train(tiny_recipe(tiny_llama, rows, tmp_path / name, max_steps=steps, lr_scheduler_type="constant"))
    resume(tmp_path / "cut", ["max_steps=6"])
    for name in ("whole", "cut"):
        newest = sorted((tmp_path / name / "checkpoints").iterdir())[-1]
        states.append(json.loads((newest / "state.json").read_text())["loss_scale"])
    assert states[0] == states[1] and states[0]["scale"] == 32.0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_early_stopping_and_the_best_checkpoint(tiny_llama, rows, tmp_path, monkeypatch):
    told = iter([3.0, 2.0, 2.5, 1.5, 1.6, 1.7])  # what the evaluations find, one every two steps

    def scripted(lm, task, *rest):
        done = hooks.evaluate_as_built(lm, task, *rest)
        return replace(done, measurements={"loss": {**done.measurements["loss"], "value": next(told)}})

    monkeypatch.setattr(hooks, "evaluate_as_built", hooks.evaluate, raising=False)
    monkeypatch.setattr(hooks, "evaluate", scripted)
    keys = {
        "data": {"train": str(rows), "validation": 0.2}, "max_steps": 40, "learning_rate": 0.01, "eval_steps": 2,
        "early_stopping_patience": 2, "load_best_model_at_end": True, "save_dtype": "fp32",
    }  # fmt: skip
    done = train(tiny_recipe(tiny_llama, rows, tmp_path / "run", **keys))
    stage = done.values["stages"][0]
    assert stage["stopped_early"] and stage["steps"] == 12
    assert stage["best"] == 1.5 and stage["best_step"] == 8
    best = load_file(tmp_path / "run" / "checkpoints" / "step-000008" / "adapter.safetensors")
    last = load_file(tmp_path / "run" / "checkpoints" / "step-000012" / "adapter.safetensors")
    final = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert all(torch.equal(final[name], best[name]) for name in best)
    assert any(not torch.equal(last[name], best[name]) for name in best)


def test_an_adapter_can_be_the_start_of_a_run(tiny_llama, rows, tmp_path):
    first = train(
        tiny_recipe(tiny_llama, rows, tmp_path / "first", save_dtype="fp32", max_steps=10, learning_rate=2e-2)
    )
    train(tiny_recipe(tmp_path / "first", rows, tmp_path / "second", max_steps=2, learning_rate=1e-6))
    assert abs(losses(tmp_path / "second")[0][1] - first.values["final_loss"]) < 1.0
    assert losses(tmp_path / "second")[0][1] < 0.9 * losses(tmp_path / "first")[0][1]


def test_two_stages_continue_one_adapter(tiny_llama, rows, tmp_path):
    stages = [{"name": "one", "max_steps": 3}, {"name": "two", "max_steps": 2, "learning_rate": 1e-4}]
    done = train(tiny_recipe(tiny_llama, rows, tmp_path / "run", stages=stages))
    assert [s["steps"] for s in done.values["stages"]] == [3, 2]
    assert (tmp_path / "run" / "stages" / "01-one" / "adapter_model.safetensors").exists()
    assert [step for step, *_ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_new_tokens_grow_the_model_and_are_trained(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"say {i}", "completion": "<yes>"}) for i in range(12)))
    done = train(
        tiny_recipe(tiny_llama, path, tmp_path / "run", new_tokens=["<yes>"], max_steps=30, learning_rate=2e-2)
    )
    assert done.values["final_loss"] < 0.5
    from shikomi.inference import open_model

    assert open_model(tmp_path / "run").generate("say 3", max_new_tokens=3) == "<yes>"


# Each key with a value that must change the run in a way a file shows.
CHANGES = {
    "num_train_epochs": {"max_steps": None, "num_train_epochs": 0.5},
    "max_steps": {"max_steps": 3},
    "batch_size": {"batch_size": 2},
    "learning_rate": {"learning_rate": 1e-3},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine"},
    "warmup_steps": {"warmup_steps": 3},
    "weight_decay": {"weight_decay": 0.5},
    "max_grad_norm": {"max_grad_norm": 1e-3},
    "optim": {"optim": {"name": "adamw", "adam_beta1": 0.5}},
    "adam_beta2": {"optim": {"name": "adamw", "adam_beta2": 0.5}},
    "adam_epsilon": {"optim": {"name": "adamw", "adam_epsilon": 0.1}},
    "loraplus_lr_ratio": {"loraplus_lr_ratio": 16},
    "galore": {"adapter": "full", "optim": {"name": "galore", "rank": 4}},  # its options: tests/optim
    "shuffle": {"shuffle": False},
    "seed": {"seed": 3},
    "objective": {"objective": {"name": "sft", "dft": True}},
    "max_length": {"max_length": 40},
    "dtype": {"dtype": "bf16"},
    "chat": {"chat": "never"},
    "chat_template": {"chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"},
    "new_tokens": {"new_tokens": ["<new>"]},
    "r": {"adapter": {"name": "lora", "r": 2, "lora_alpha": 8}},
    "lora_alpha": {"adapter": {"name": "lora", "r": 4, "lora_alpha": 2}},
    "lora_dropout": {"adapter": {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.5}},
    "target_modules": {"adapter": {"name": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}},
    "init_lora_weights": {"adapter": {"name": "lora", "r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian"}},
    "full": {"adapter": "full"},
    "save_dtype": {"save_dtype": "fp32"},
}  # fmt: skip
SHOWN_ELSEWHERE = {  # key: the test, or the place, that shows its effect
    "name": "test_two_stages",
    "adapter": "tests/invariants/test_stages.py",
    "previous_adapter": "tests/invariants/test_stages.py",
    "data": "everywhere",
    "stages": "test_two_stages",
    "model": "everywhere",
    "eval_steps": "test_early_stopping",
    "early_stopping_patience": "test_early_stopping",
    "load_best_model_at_end": "test_early_stopping",
    "metric_for_best_model": "test_prepare",
    "save_steps": "test_damaged",
    "save_total_limit": "test_bookkeeping_keys",
    "logging_steps": "test_bookkeeping_keys",
    "report_to": "test_bookkeeping_keys",
    "sample_prompts": "test_bookkeeping_keys",
    "micro_batch_tokens": "test_out_of_memory",
    "recompute": "test_gradients",
    "share_prefix": "test_bookkeeping_keys",
    "reference": "tests/invariants/test_preferences.py",
    "evaluate": "tests/test_recipes.py",
    "output_dir": "everywhere",
    "model_revision": "tests/model/test_files.py",
    "model_token_env": "tests/model/test_files.py",
    "device": "tests/train/test_parts.py",
    "quant": "tests/train/test_parts.py",
}


@pytest.fixture(scope="module")
def plain(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    rows = write_rows(folder / "rows.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHIKOMI_CACHE", str(folder / "cache"))
        train(tiny_recipe(tiny_llama, rows, folder / "run"))
    return folder


@pytest.mark.parametrize("key", CHANGES)
def test_every_key_changes_something(key, plain, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("SHIKOMI_CACHE", str(plain / "cache"))
    train(tiny_recipe(tiny_llama, plain / "rows.jsonl", tmp_path / "run", **CHANGES[key]))
    assert final_bytes(tmp_path / "run") != final_bytes(plain / "run")


def test_no_key_is_forgotten_here():
    from shikomi.recipe import Recipe

    keys = set(Stage.model_fields) | set(Recipe.model_fields)
    assert keys <= set(CHANGES) | set(SHOWN_ELSEWHERE)


def test_bookkeeping_keys(tiny_llama, rows, tmp_path):
    keys = {
        "save_steps": 1, "save_total_limit": 3, "report_to": ["tensorboard"], "sample_prompts": ["What is it? font"],
        "eval_steps": 2, "logging_steps": 2, "share_prefix": False,
    }  # fmt: skip
    train(tiny_recipe(tiny_llama, rows, tmp_path / "run", **keys))
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 3
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "samples" in r] == [2, 4, 6]
    assert all(r["computed_tokens"] == r["tokens"] for r in records if "loss" in r)


def test_the_first_row_is_marked_in_a_dry_run_and_nothing_is_written(tiny_llama, rows, tmp_path):
    from shikomi.run import dry_run

    found = dry_run(tiny_recipe(tiny_llama, rows, tmp_path / "run"))
    assert "[[a server with 0 parts<|im_end|>]]" in found["first_example"]
    assert found["steps"] == 6 and not (tmp_path / "run").exists()
    done = train(tiny_recipe(tiny_llama, rows, tmp_path / "run"))
    for key in ("trainable_parameters", "total_parameters"):
        assert done.values[key] == found[key]
