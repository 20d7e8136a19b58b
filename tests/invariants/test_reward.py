"""Reward models through the one loop: packing, accumulation, resume, what a run leaves, and what uses it."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from architectures import VOCABULARY
from preference_rows import pairs, write
from reward_models import by_transformers, conversations, reward_model
from running import Interrupting, final_bytes, losses, tiny_recipe, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shikomi import registry
from shikomi.adapters.full import Full
from shikomi.adapters.lora import Lora
from shikomi.cli import main
from shikomi.data.pairs import Completion, Pair, Thumb
from shikomi.errors import BadInput, Stopped
from shikomi.evaluate.values import judged, values_of
from shikomi.inference import merge, open_model, open_reward_model
from shikomi.model.heads import SCORE
from shikomi.model.language_model import LanguageModel
from shikomi.objectives.reward import Reward
from shikomi.progress import Silent
from shikomi.run import dry_run, resume, train
from shikomi.train.step import gradients, plan_step
from shikomi.train.step import losses as without_gradients

ADAPTERS = {
    "lora": {"name": "lora", "r": 4, "lora_alpha": 8},
    "dora": {"name": "dora", "r": 4, "lora_alpha": 8},
    "bottleneck": "bottleneck",
    "prefix": {"name": "prefix", "num_virtual_tokens": 3},
    "prompt": {"name": "prompt", "num_virtual_tokens": 3},
    "full": "full",
}
RATES = {"full": 1e-3}


def some_pairs() -> list[Pair]:
    rng = np.random.default_rng(0)

    def some(n: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, n).astype(np.int32)

    shared, found = some(18), []
    for row, (own, *lengths) in enumerate([(3, 5, 3), (7, 2, 6), (1, 1, 4), (9, 8, 8)]):
        answers = [Completion(some(n), np.ones(n, bool)) for n in lengths]
        found.append(Pair(np.concatenate([shared, some(own)]), *answers, margin=0.3 * row, row=row))
    return found


def one_step(lm, tokens: int, share: bool):
    for p in lm.trainable().values():
        p.grad = None
    objective = Reward(center_rewards_coefficient=0.1)
    plan = plan_step(some_pairs(), tokens, share, "pairs", objective.needs, 64)
    shown = {k: float(v) for k, v in gradients(lm, objective, plan, key=1).items()}
    again = {k: float(v) for k, v in without_gradients(lm, objective, plan).items()}
    assert again == pytest.approx(shown, rel=1e-6)
    return len(plan.micro), shown, {n: p.grad for n, p in lm.trainable().items()}


PATHS = [("llama", adapter) for adapter in ADAPTERS] + [
    (name, adapter) for name in ("gemma2", "bloom") for adapter in ("lora", "full")
]


@pytest.mark.parametrize("name, adapter", PATHS)
def test_micro_batches_packing_and_prefixes_change_nothing(name, adapter):
    options = {"lora": Lora(r=3), "full": Full()}.get(adapter) or registry.find("adapters", adapter)()
    lm = reward_model(name, options)
    with torch.no_grad():
        for i, p in enumerate(lm.trainable().values()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    count, shown, grads = one_step(lm, 10_000, share=False)
    assert count == 1 and float(grads[SCORE].norm()) > 1e-2
    others = [g for n, g in grads.items() if g is not None and n != SCORE]
    assert max(float(g.norm()) for g in others) > 1e-4
    for tokens, share in ((8, False), (64, True), (10_000, True)):
        _, other, same = one_step(lm, tokens, share)
        assert other == pytest.approx(shown, rel=1e-4, abs=1e-5)
        for key, grad in grads.items():
            if grad is None:
                assert same[key] is None
            else:
                assert (same[key] - grad).norm() < 2e-4 * grad.norm() + 1e-7, key


def test_margins_reach_the_loss():
    lm = reward_model("llama", Lora(r=3))
    plan = plan_step(some_pairs(), 10_000, True, "pairs", Reward.needs, 64)
    (batch,) = plan.preferences
    value = lm.values(batch.packed, batch.ends).detach()
    difference = value[0::2] - value[1::2] - 0.3 * torch.tensor(batch.packed.rows[0::2])  # as `some_pairs` has them
    got = float(without_gradients(lm, Reward(), plan)["loss"])
    assert got == pytest.approx(float(-torch.nn.functional.logsigmoid(difference).mean()), rel=1e-5)


def test_no_log_probabilities_are_computed(monkeypatch):
    lm = reward_model("llama", Lora(r=3))

    def forbidden(self, packed):
        raise AssertionError("log-probabilities were computed")

    monkeypatch.setattr(LanguageModel, "score", forbidden)
    assert one_step(lm, 10_000, share=True)[1]["loss"] > 0


def test_values_compute_the_prompt_of_several_answers_once(monkeypatch):
    """However long the answers are and wherever they stand; a prompt's last token is computed with each answer."""
    lm = reward_model("llama", Lora(r=3))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCABULARY, 40).astype(np.int32) for _ in range(6)]
    answers = [rng.integers(3, VOCABULARY, 1 + i % 9).astype(np.int32) for i in range(24)]
    rows = [
        Thumb(prompts[i % 6], Completion(answer, np.ones(len(answer), bool)), True) for i, answer in enumerate(answers)
    ]
    computed, own = [], LanguageModel.values

    def values(self, packed, ends):
        computed.append(len(packed.ids))
        return own(self, packed, ends)

    monkeypatch.setattr(LanguageModel, "values", values)
    found = values_of(lm, rows, 70, Silent(), "values")
    assert sum(computed) <= sum(map(len, prompts)) + sum(len(answer) + 1 for answer in answers)
    assert max(computed) <= 70
    alone = [values_of(lm, [row], 70, Silent(), "values")[0] for row in rows]
    assert found == pytest.approx(alone, rel=1e-4, abs=1e-5)
    computed.clear()
    assert values_of(lm, rows, 50, Silent(), "values") == pytest.approx(alone, rel=1e-4, abs=1e-5)
    assert max(computed) <= 50


# Whole runs


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    return write(tmp_path / "pairs.jsonl", pairs())


def reward_recipe(model, rows, run, adapter="lora", **keys):
    settings = {"objective": "reward", "adapter": ADAPTERS[adapter], "learning_rate": RATES.get(adapter, 1e-2)}
    return tiny_recipe(model, rows, run, **(settings | {"save_dtype": "fp32"} | keys))


def records(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("adapter", ["lora", "bottleneck", "prefix", "prompt", "full"])
def test_it_learns_is_evaluated_and_gives_the_values_it_had(adapter, rows, tiny_llama, tmp_path):
    held = write(tmp_path / "held.jsonl", pairs(8, seed=1))
    keys = {
        "data": {"train": str(rows), "validation": str(held)}, "max_steps": 14, "eval_steps": 7, "batch_size": 8,
        "metric_for_best_model": "accuracy", "load_best_model_at_end": True,
    }  # fmt: skip
    done = train(reward_recipe(tiny_llama, rows, tmp_path / "run", adapter, **keys))
    steps = [r for r in records(tmp_path / "run") if "loss" in r]
    evaluated = [r for r in records(tmp_path / "run") if "eval_loss" in r]
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"] and steps[-1]["margin"] > steps[0]["margin"]
    assert {"accuracy", "margin", "mean_reward"} <= steps[0].keys() and len(evaluated) == 2
    best = max(evaluated, key=lambda record: record["eval_accuracy"])
    assert done.values["stages"][0]["best"] == best["eval_accuracy"] >= 0.75
    rm = open_reward_model(tmp_path / "run", dtype="fp32")
    found = rm.evaluate(held)
    assert found["n"] == 8 and found["metrics"]["accuracy"]["value"] == best["eval_accuracy"]
    for name in ("margin", "mean_reward"):
        assert found[name] == pytest.approx(best[f"eval_{name}"], rel=1e-3, abs=1e-4)
    if adapter == "lora":
        values = rm.score(conversations(8))
        margins = [a - b for a, b in zip(values[:8], values[8:], strict=True)]
        assert np.mean(margins) == pytest.approx(found["margin"], rel=1e-3, abs=1e-4)
        texts = [(row[0]["content"], row[1]["content"]) for row in conversations(8)]
        assert rm.score(texts) == pytest.approx(values, rel=1e-4, abs=1e-5)
        asked = [{"prompt": prompt, "completion": answer} for prompt, answer in texts]
        assert rm.score(asked[:1]) == pytest.approx(values[:1], rel=1e-4, abs=1e-5)


RESUMED = {
    "lora": {"micro_batch_tokens": 64},
    "full": {"adapter": "full", "learning_rate": 1e-3},
    "prompt": {"adapter": "prompt"},
}


@pytest.mark.parametrize("keys", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_is_the_same_to_the_bit(keys, rows, tiny_llama, tmp_path):
    with pytest.raises(Stopped):
        train(reward_recipe(tiny_llama, rows, tmp_path / "run", **keys), Interrupting(3))
    assert len(losses(tmp_path / "run")) == 3
    resume(tmp_path / "run")
    train(reward_recipe(tiny_llama, rows, tmp_path / "whole", **keys))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "whole")


@pytest.mark.parametrize("how", ["merged", "nf4", "untied"])
def test_the_whole_model_is_a_classifier_of_transformers(how, rows, tiny_folder, tmp_path):
    """Its rows are padded, and the tokenizer's own padding ends every row: transformers must not take it for that."""
    model = tmp_path / "model"
    tiny = tiny_folder("qwen3" if how == "untied" else "llama")
    model.mkdir()
    for path in tiny.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = load_file(model / "model.safetensors")  # which a base that is stored in bf16 does not round
    save_file({n: t.bfloat16().float() for n, t in weights.items()}, model / "model.safetensors", {"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(model)
    adapter = "full" if how == "untied" else "lora"
    keys = {"quant": "nf4"} if how == "nf4" else {}
    train(reward_recipe(model, rows, tmp_path / "run", adapter, **keys))
    folder = tmp_path / "run" / "final"
    rm = open_reward_model(tmp_path / "run", dtype="fp32")
    want = torch.tensor(rm.score(conversations()))
    if adapter == "lora":
        found = merge(tmp_path / "run", tmp_path / "merged", "fp32")
        assert found["lost_share"] < 0.1 and found["adapter_effect"] > 1e-3 and "kl" not in found
        folder = tmp_path / "merged"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification" if how == "untied" else
                                       "LlamaForSequenceClassification"]  # fmt: skip
    theirs, about = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not about["missing_keys"] and not about["unexpected_keys"] and theirs.config.num_labels == 1
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    assert pad == theirs.config.pad_token_id == config["pad_token_id"] != tokenizer.eos_token_id
    assert want.std() > 0.01
    torch.testing.assert_close(by_transformers(theirs, rm, conversations(), pad), want, rtol=1e-4, atol=1e-5)
    again = open_reward_model(folder, dtype="fp32").score(conversations())
    torch.testing.assert_close(torch.tensor(again), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_reward_model_is_trained_on(adapter, rows, tiny_llama, tmp_path):
    """The head of the model that is named goes on, in a run of one stage and in stages that are all reward."""
    train(reward_recipe(tiny_llama, rows, tmp_path / "one", adapter))
    before = open_reward_model(tmp_path / "one", dtype="fp32").evaluate(rows)
    keys = {"max_steps": 1, "batch_size": 24}
    train(reward_recipe(tmp_path / "one", rows, tmp_path / "two", adapter, **keys))
    assert records(tmp_path / "two")[0]["margin"] == pytest.approx(before["margin"], rel=1e-3, abs=1e-4)


def test_stages_that_are_all_reward_share_one_head(rows, tiny_llama, tmp_path):
    other = write(tmp_path / "other.jsonl", pairs(12, 5))
    stages = [{"name": "a", "objective": "reward"}, {"name": "b", "objective": "reward", "data": {"train": str(other)}}]
    keys = {"stages": stages, "objective": None, "max_steps": 4}
    recipe = reward_recipe(tiny_llama, rows, tmp_path / "run", **{k: v for k, v in keys.items() if v is not None})
    train(recipe)
    first = open_reward_model(tmp_path / "run" / "stages" / "01-a", dtype="fp32").evaluate(other)
    begun = next(r for r in records(tmp_path / "run") if r["stage"] == "b" and "loss" in r)
    assert begun["mean_reward"] == pytest.approx(first["mean_reward"], abs=0.5) and begun["step"] == 5
    last = open_reward_model(tmp_path / "run", dtype="fp32")
    assert not torch.equal(last.lm.scalar.weight, open_reward_model(tmp_path / "run" / "stages" / "01-a",
                                                                    dtype="fp32").lm.scalar.weight)  # fmt: skip


def test_a_fine_tuned_adapter_is_where_a_reward_model_begins(rows, tiny_llama, tmp_path):
    train(tiny_recipe(tiny_llama, write_rows(tmp_path / "rows.jsonl"), tmp_path / "sft", learning_rate=2e-2))
    train(reward_recipe(tmp_path / "sft", rows, tmp_path / "on", max_steps=1))
    train(reward_recipe(tiny_llama, rows, tmp_path / "base", max_steps=1))
    on, base = (records(tmp_path / name)[0]["margin"] for name in ("on", "base"))
    assert on != pytest.approx(base, rel=1e-3)


# What cannot be


REFUSED = {
    "evaluate": ({"evaluate": {"metrics": ["chrf"]}}, "evaluate compares answers, and a reward model gives none"),
    "samples": ({"sample_prompts": ["Hello"]}, "sample_prompts: a reward model gives no answers"),
    "new tokens": ({"new_tokens": ["<x>"]}, "new_tokens train the head for tokens"),
    "metric": ({"metric_for_best_model": "chrf"}, "allowed: eval_loss, eval_accuracy"),
    "reference": ({"reference": "precompute"}, "objective: reward has no reference"),
    "stages": (
        {"stages": [{"name": "sft", "objective": "dpo"}, {"name": "rm", "objective": "reward"}]},
        r"found dpo \(continue\), reward \(continue\).*make it a recipe of its own",
    ),
    "merged": (
        {"stages": [{"name": "a"}, {"name": "b", "previous_adapter": "merge"}]},
        "allowed: stages that are all reward, each with previous_adapter: continue",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_training(case, rows, tiny_llama, tmp_path):
    keys, message = REFUSED[case]
    keys = {"data": {"train": str(rows), "validation": 0.25}} | keys
    with pytest.raises(BadInput) as refused:
        train(reward_recipe(tiny_llama, rows, tmp_path / "run", **keys))
    assert re.search(message, str(refused.value), re.DOTALL), str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_base_without_a_classifier_is_refused(rows, tiny_folder, tmp_path):
    with pytest.raises(BadInput, match="cannot serve falcon_h1: transformers has no sequence classification model"):
        train(reward_recipe(tiny_folder("falcon_h1"), rows, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama):
    """(LoRA run, folder of the whole model, rows) of a reward model."""
    folder = tmp_path_factory.mktemp("reward")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHIKOMI_CACHE", str(folder / "cache"))
        rows = write(folder / "pairs.jsonl", pairs())
        train(reward_recipe(tiny_llama, rows, folder / "run", max_steps=20))
        merge(folder / "run", folder / "merged", "fp32")
        yield folder / "run", folder / "merged", rows


def test_a_reward_model_is_no_policy_and_a_policy_no_reward_model(trained, tiny_llama, tmp_path, capsys):
    run, merged, rows = trained
    for folder in (run, run / "final", merged):
        with pytest.raises(BadInput, match="a reward model, which gives values and cannot answer"):
            open_model(folder)
        for objective, data in (("dpo", rows), ("sft", write_rows(tmp_path / "rows.jsonl"))):
            with pytest.raises(BadInput, match="a reward model, which gives values"):
                train(tiny_recipe(folder, data, tmp_path / "no", objective=objective))
    with pytest.raises(BadInput, match="a reward model, which gives values"):
        open_model(tiny_llama, dtype="fp32").add_adapter("judge", run)
    with pytest.raises(BadInput, match="not a reward model"):
        open_reward_model(tiny_llama)
    for command in (["generate", str(run), "Hello"], ["chat", str(run)]):
        assert main(command) == 2
        assert "a reward model, which gives values and cannot answer" in capsys.readouterr().err
    assert main(["combine", str(run), str(run), "-o", str(tmp_path / "both")]) == 2
    assert "score.weight" in capsys.readouterr().err


def test_an_adapter_that_lost_its_head_is_refused(trained, tmp_path):
    run, _, _ = trained
    shutil.copytree(run / "final", tmp_path / "final")
    path = tmp_path / "final" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "score" not in n}, path)
    with pytest.raises(BadInput, match="task_type SEQ_CLS and without base_model.model.score.weight"):
        open_reward_model(tmp_path / "final")


def test_the_end_of_a_run_says_how_it_is_used(rows, tiny_llama, tmp_path, capsys):
    keys = {"model": str(tiny_llama), "data": str(rows), "objective": "reward", "output_dir": str(tmp_path / "run")}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(keys | {"max_steps": 1, "dtype": "fp32"}))
    assert main(["train", str(path)]) == 0
    assert f"use it:   shikomi eval {tmp_path / 'run'} pairs.jsonl" in capsys.readouterr().out


def test_eval_of_a_reward_model_counts_pairs_beside_their_length(trained, capsys):
    run, _, rows = trained
    assert main(["eval", str(run), str(rows), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    accuracy, longer = found["metrics"]["accuracy"], found["by_length"]["accuracy"]
    assert found["n"] == accuracy["n"] == 24 and accuracy["value"] > 0.8 > longer["value"]
    assert accuracy["ci95"][0] < accuracy["value"] <= accuracy["ci95"][1] and accuracy["interval"] == "wilson"
    assert found["difference"]["value"] == pytest.approx(accuracy["value"] - longer["value"])
    assert main(["eval", str(run), str(rows)]) == 0
    shown = capsys.readouterr().out
    assert "24 pairs" in shown and "the longer answer" in shown and "against the longer answer: +" in shown
    assert main(["eval", str(run), str(rows), "--limit", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 5
    assert main(["eval", str(run), str(rows), "--metrics", "accuracy"]) == 2
    assert "scored on pairs" in capsys.readouterr().err


def test_what_is_said_of_pairs():
    values = np.array([[2.0, 1.0], [1.0, 1.0], [0.0, 3.0], [5.0, 1.0]])
    lengths = np.array([[10, 20], [10, 10], [20, 19], [30, 10]])
    found = judged(values, lengths)
    assert found["metrics"]["accuracy"]["value"] == 0.5  # equal values are no preference
    assert found["by_length"]["accuracy"]["value"] == pytest.approx((0 + 0.5 + 1 + 1) / 4)
    assert found["metrics"]["accuracy_lengths_alike"]["n"] == 2
    assert found["metrics"]["accuracy_lengths_alike"]["value"] == 0.0
    assert found["by_length"]["accuracy_lengths_alike"]["value"] == pytest.approx(0.75)
    assert found["margin"] == pytest.approx(0.5) and found["mean_reward"] == pytest.approx(1.75)
    assert "lengths_alike" not in str(judged(values[:1], lengths[:1])["metrics"])


@pytest.mark.parametrize(
    "row, message",
    [
        ([{"role": "user", "content": "Hello"}], "rows:1: the row has no assistant turn"),
        ({"prompt": "Hello", "chosen": "a", "rejected": "b"}, "rows:1"),
        (("one", 2), "not a prompt and an answer"),
        (("word " * 2000, "answer"), "the prompt alone fills max_length"),
    ],
)
def test_a_row_without_an_answer_gets_no_value(trained, row, message):
    rm = open_reward_model(trained[0], dtype="fp32")
    with pytest.raises(BadInput, match=message):
        rm.score([row])
    assert rm.score([]) == []


def test_a_dry_run_counts_the_head(rows, tiny_llama, tmp_path):
    found = dry_run(reward_recipe(tiny_llama, rows, tmp_path / "run"))
    other = dry_run(reward_recipe(tiny_llama, rows, tmp_path / "run", objective="dpo"))
    assert found["trainable_parameters"] == other["trainable_parameters"] + 32
