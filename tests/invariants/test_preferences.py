"""Preference learning through the one loop: the reference, packing, accumulation, resume, and what a run leaves."""

import json
import math
import os
import re
import signal

import numpy as np
import pytest
import torch
from architectures import EXPECTED, VOCABULARY, build
from preference_rows import pairs, thumbs, write
from running import final_bytes, losses, tiny_recipe, write_rows

from shikomi.adapters.bottleneck import Bottleneck
from shikomi.adapters.dora import Dora
from shikomi.adapters.full import Full
from shikomi.adapters.lora import Lora
from shikomi.adapters.prefix import Prefix
from shikomi.adapters.prompt import Prompt
from shikomi.data.pairs import Completion, Pair, Thumb, pack_pairs
from shikomi.errors import BadInput, NonFinite, Stopped
from shikomi.inference import open_model
from shikomi.model.device import Dtypes
from shikomi.model.load import put_on, wrap
from shikomi.model.probe import choose_path
from shikomi.model.reference import OFF, START, taken
from shikomi.objectives.dpo import Dpo
from shikomi.objectives.ipo import Ipo
from shikomi.objectives.kto import Kto
from shikomi.objectives.orpo import Orpo
from shikomi.objectives.simpo import Simpo
from shikomi.run import dry_run, resume, train
from shikomi.train.prepare import Live
from shikomi.train.step import gradients, plan_step
from shikomi.train.step import losses as without_gradients

FP32 = Dtypes(torch.float32, torch.float32)
BF16 = Dtypes(torch.bfloat16, torch.bfloat16)


def completion(rng: np.random.Generator, length: int) -> Completion:
    return Completion(rng.integers(3, VOCABULARY, length).astype(np.int32), np.ones(length, bool))


def some_pairs() -> list[Pair]:
    rng = np.random.default_rng(0)
    shared = rng.integers(3, VOCABULARY, 18).astype(np.int32)
    found = []
    for row, (own, chosen, rejected) in enumerate([(3, 5, 3), (7, 2, 6), (1, 1, 4), (9, 8, 8)]):
        prompt = np.concatenate([shared, rng.integers(3, VOCABULARY, own).astype(np.int32)])
        found.append(Pair(prompt, completion(rng, chosen), completion(rng, rejected), 0.0, row))
    return found


def some_thumbs() -> list[Thumb]:
    answers = [(pair.prompt, answer) for pair in some_pairs() for answer in pair.completions]
    return [Thumb(prompt, answer, i % 3 != 2, i) for i, (prompt, answer) in enumerate(answers)]


def model(name: str, adapter, dtypes: Dtypes = FP32):
    lm = wrap(build(name).to(dtypes.storage), None, adapter, dtypes, torch.device("cpu"))
    choose_path(lm, 64)
    assert lm.path == EXPECTED[name]
    return lm


def move(lm, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lm.trainable().values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


# The reference

STARTS = {
    "lora": (Lora(r=3), OFF),
    "dora": (Dora(r=3), OFF),
    "bottleneck": (Bottleneck(reduction_factor=8), OFF),
    "embedding": (Lora(r=3, target_modules=["q_proj", "embed_tokens"]), OFF),
    "pissa": (Lora(r=3, init_lora_weights="pissa"), START),
    "dora pissa": (Dora(r=3, init_lora_weights="pissa"), START),
    "random": (Lora(r=3, init_lora_weights=False), START),
    "head": (Lora(r=3, modules_to_save=["lm_head"]), START),
    "full": (Full(), START),
}


LOG2 = pytest.approx(math.log(2), rel=1e-6)


def first_loss(lm, how: str, fresh: bool = True) -> float:
    """DPO's. Rewards are 0 to the bit; after steps the reference still is what the model was, to the bit."""
    packed = pack_pairs(some_pairs()).packed
    with torch.no_grad():
        start = lm.score(packed).logp
    lm.fixed = taken(lm.attached, lm.trainable(), fresh)
    assert lm.fixed.how == how
    plan = plan_step(some_pairs(), 64, True, "pairs", Dpo.needs)
    shown = gradients(lm, Dpo(), plan, key=1, reference=Live(lm))
    assert len(plan.micro) > 1 and any(bool(p.grad.any()) for p in lm.trainable().values() if p.grad is not None)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "chosen_below_reference"):
        assert shown[name] == 0.0
    for seed in (1, 2):
        move(lm, seed)
        with torch.no_grad():
            moved = lm.score(packed).logp
            with lm.reference():
                assert torch.equal(lm.score(packed).logp, start)
            assert torch.equal(lm.score(packed).logp, moved)
        assert (moved - start).abs().max() > 0.01
    versions = {name: p._version for name, p in lm.trainable().items()}
    with lm.reference():
        pass
    changed = [name for name, p in lm.trainable().items() if p._version != versions[name]]
    assert len(changed) == (len(versions) if how == START else 0)  # what is cached by version is made again
    return float(shown["loss"])


@pytest.mark.parametrize("dtypes", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("start", STARTS)
def test_the_reference_is_the_model_as_it_began(start, dtypes):
    adapter, how = STARTS[start]
    assert first_loss(model("llama", adapter, dtypes), how) == LOG2


@pytest.mark.parametrize("adapter, how", [(Lora(r=3), OFF), (Dora(r=3), OFF), (Full(), START)], ids=["l", "d", "full"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral", "bloom", "qwen3"])
def test_the_reference_on_every_path(name, adapter, how):
    assert first_loss(model(name, adapter), how) == LOG2


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_trained_biases_are_put_back_too(name):
    assert first_loss(model(name, Lora(r=3, bias="all")), START) == LOG2


@pytest.mark.parametrize(
    "adapter", [Lora(r=3), Dora(r=3), Bottleneck(reduction_factor=8), Prefix(4), Prompt(4)], ids=str
)
def test_a_trained_adapter_is_a_part_of_the_reference(adapter):
    lm = model("llama", adapter)
    move(lm, 9)
    assert first_loss(lm, START, fresh=False) == LOG2


def test_an_adapter_that_is_kept_frozen_is_a_part_of_the_reference():
    lm = model("llama", Lora(r=3))
    move(lm, 9)
    with torch.no_grad():
        earlier = lm.score(pack_pairs(some_pairs()).packed).logp
    whole = {path: (a.clone(), b.clone()) for path, (a, b) in lm.attached.whole().items()}
    lm.attached.take_off(lm.model)
    put_on(lm, Lora(r=2), 1, 64, whole)
    assert first_loss(lm, START) == LOG2
    with torch.no_grad(), lm.reference():
        torch.testing.assert_close(lm.score(pack_pairs(some_pairs()).packed).logp, earlier, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", [Prefix(4), Prompt(4)], ids=str)
def test_fresh_virtual_tokens_are_no_part_of_the_reference(adapter):
    lm, plain = model("llama", adapter), model("llama", None)
    lm.fixed = taken(lm.attached, lm.trainable(), fresh=True)
    packed = pack_pairs(some_pairs()).packed
    with torch.no_grad(), lm.reference():
        torch.testing.assert_close(lm.score(packed).logp, plain.score(packed).logp)


def test_no_reference_is_an_error_and_not_the_model_itself():
    lm = model("llama", Lora(r=3))
    with pytest.raises(ValueError, match="no reference"):
        lm.reference()
    plan = plan_step(some_pairs(), 64, True, "pairs", Dpo.needs)
    with pytest.raises(ValueError, match="reference"):
        gradients(lm, Dpo(), plan, key=1)


def test_dropout_is_off_under_the_reference():
    lm = model("llama", Lora(r=3, lora_dropout=0.5))
    move(lm, 3)
    lm.fixed = taken(lm.attached, lm.trainable(), fresh=False)
    plan = plan_step(some_pairs(), 64, True, "pairs", Dpo.needs)
    with torch.no_grad():
        lm.bind_dropout(None)
        want = [lm.score(packed).logp for packed in plan.micro]
        lm.bind_dropout(7)
        got = Live(lm)(plan.preferences)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# Packing and accumulation

OBJECTIVES = [Dpo(rpo_alpha=0.5), Ipo(), Kto(undesirable_weight=1.5), Simpo(), Orpo(nll="prompt_and_answer")]


def one_step(lm, objective, tokens: int, share: bool) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    for p in lm.trainable().values():
        p.grad = None
    examples = some_pairs() if objective.data == "pairs" else some_thumbs()
    plan = plan_step(examples, tokens, share, objective.data, objective.needs, 64)
    more = plan.counts["prompt_and_chosen_tokens"] - plan.counts["chosen_tokens"]
    prompts = sum(len(pair.prompt) - 1 for pair in some_pairs())
    assert more == (prompts if "prompt_logp" in objective.needs else 0)
    shown = gradients(lm, objective, plan, key=1, reference=Live(lm))
    again = without_gradients(lm, objective, plan, Live(lm))
    assert {k: float(v) for k, v in again.items()} == pytest.approx({k: float(v) for k, v in shown.items()}, rel=1e-6)
    return {k: float(v) for k, v in shown.items()}, {n: p.grad for n, p in lm.trainable().items()}


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_micro_batches_packing_and_prefixes_change_nothing(name, objective):
    lm = model(name, Lora(r=3))
    lm.fixed = taken(lm.attached, lm.trainable(), fresh=True)
    move(lm, 0)
    shown, grads = one_step(lm, objective, 10_000, share=False)
    for seed in range(1, 9):
        if "kl" in objective.needs and not shown["kl"]:  # a baseline of 0 would not test it
            move(lm, seed)
            shown, grads = one_step(lm, objective, 10_000, share=False)
    assert "kl" not in objective.needs or shown["kl"] > 0
    assert max(float(g.norm()) for g in grads.values()) > 1e-3
    for tokens, share in ((8, False), (64, True), (10_000, True)):
        other, same = one_step(lm, objective, tokens, share)
        assert other == pytest.approx(shown, rel=1e-4, abs=1e-5)
        for key, grad in grads.items():
            assert (same[key] - grad).norm() < 2e-4 * grad.norm() + 1e-7, key


# Whole runs


@pytest.fixture
def rows(tmp_path, cache):
    return write(tmp_path / "pairs.jsonl", pairs())


@pytest.fixture
def judged(tmp_path, cache):
    return write(tmp_path / "thumbs.jsonl", thumbs())


def records(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


PARTS = ("chosen", "rejected", "margins")


@pytest.mark.parametrize("objective", ["dpo", "ipo", "orpo", "kto", "simpo", "cpo"])
def test_every_objective_learns_and_is_evaluated(objective, rows, judged, tiny_llama, tmp_path):
    data = {"train": str(judged if objective == "kto" else rows), "validation": 0.25}
    keys = {"objective": objective, "data": data, "max_steps": 20, "learning_rate": 1e-2}
    done = train(tiny_recipe(tiny_llama, rows, tmp_path / "run", **keys))
    steps = [r for r in records(tmp_path / "run") if "loss" in r]
    held = [r for r in records(tmp_path / "run") if "eval_loss" in r]
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"] and held[-1]["eval_loss"] < held[0]["eval_loss"]
    for record, prefix in ((steps[-1], ""), (held[-1], "eval_")):
        names = {f"{prefix}rewards/{part}" for part in PARTS} | {f"{prefix}logps/{part}" for part in PARTS[:2]}
        assert names <= set(record)
        margin = record[f"{prefix}rewards/chosen"] - record[f"{prefix}rewards/rejected"]
        assert record[f"{prefix}rewards/margins"] == pytest.approx(margin, rel=1e-4, abs=1e-5)
    assert held[-1].get("eval_rewards/accuracies", 1) > 0.9
    compares = objective in ("dpo", "ipo", "kto")
    assert done.values["stages"][0].get("reference") == ("live" if compares else None)
    if compares:
        assert steps[0]["rewards/chosen"] == steps[0]["rewards/rejected"] == 0.0


RUNS = {
    "lora": {},
    "pissa": {"adapter": {"name": "lora", "r": 4, "lora_alpha": 8, "init_lora_weights": "pissa"}},
    "dropout": {"adapter": {"name": "dora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.3}},
    "full": {"adapter": "full", "learning_rate": 1e-3},
    "precompute": {"reference": "precompute", "adapter": "full", "learning_rate": 1e-3},
    "kto": {"objective": "kto"},
}


class Impatient:
    """Asks a run to stop after its third step."""

    def __getattr__(self, name):
        def told(*args):
            if name == "advance" and args[0]["step"] == 3 and args[0].get("stage", "dpo") != "sft":
                os.kill(os.getpid(), signal.SIGTERM)

        return told


@pytest.mark.parametrize("keys", RUNS.values(), ids=RUNS)
def test_a_resumed_run_is_the_same_to_the_bit(keys, rows, judged, tiny_llama, tmp_path):
    keys = {"objective": "dpo", "max_steps": 6, "learning_rate": 1e-2, "save_dtype": "fp32"} | keys
    source = judged if keys["objective"] == "kto" else rows
    with pytest.raises(Stopped):
        train(tiny_recipe(tiny_llama, source, tmp_path / "run", **keys), Impatient())
    assert len(losses(tmp_path / "run")) == 3
    resume(tmp_path / "run")
    train(tiny_recipe(tiny_llama, source, tmp_path / "whole", **keys))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "whole")


def test_a_reference_that_is_lost_is_not_replaced(rows, tiny_llama, tmp_path):
    keys = {"objective": "dpo", "max_steps": 6, "adapter": "full", "learning_rate": 1e-3}
    with pytest.raises(Stopped):
        train(tiny_recipe(tiny_llama, rows, tmp_path / "run", **keys), Impatient())
    kept = tmp_path / "run" / "reference" / "01-dpo" / "reference.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1] + b"\x00")
    with pytest.raises(BadInput, match="the reference of this stage is lost"):
        resume(tmp_path / "run")


@pytest.mark.parametrize("previous", ["continue", "freeze", "merge"])
def test_a_stage_is_compared_with_the_stage_before(previous, rows, tiny_llama, tmp_path):
    answers = write_rows(tmp_path / "rows.jsonl")
    stages = [
        {"name": "sft", "objective": "sft", "data": {"train": str(answers)}},
        {"name": "dpo", "objective": "dpo", "previous_adapter": previous},
    ]
    keys = {"stages": stages, "max_steps": 5, "learning_rate": 1e-2, "save_dtype": "fp32"}
    with pytest.raises(Stopped):
        train(tiny_recipe(tiny_llama, rows, tmp_path / "run", **keys), Impatient())
    resume(tmp_path / "run")
    train(tiny_recipe(tiny_llama, rows, tmp_path / "whole", **keys))
    first = next(r for r in records(tmp_path / "run") if r["stage"] == "dpo")
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "whole")


def test_an_adapter_named_as_model_is_a_part_of_the_reference(rows, tiny_llama, tmp_path):
    train(tiny_recipe(tiny_llama, write_rows(tmp_path / "rows.jsonl"), tmp_path / "sft", learning_rate=2e-2))
    keys = {"objective": "dpo", "max_steps": 3, "learning_rate": 1e-2}
    for how in ("live", "precompute"):
        train(tiny_recipe(tmp_path / "sft" / "final", rows, tmp_path / how, reference=how, **keys))
    train(tiny_recipe(tiny_llama, rows, tmp_path / "base", **keys))
    live, cached, base = (records(tmp_path / name) for name in ("live", "precompute", "base"))
    assert live[0]["rewards/chosen"] == live[0]["rewards/rejected"] == 0.0 and live[0]["logps/chosen"] != pytest.approx(
        base[0]["logps/chosen"], rel=1e-2
    )
    assert abs(cached[0]["rewards/chosen"]) < 1e-5
    assert [r["loss"] for r in cached] == pytest.approx([r["loss"] for r in live], abs=1e-5)


@pytest.mark.parametrize("adapter", [{"name": "lora", "r": 4}, "full", {"name": "prompt", "num_virtual_tokens": 3}])
def test_a_precomputed_reference_is_the_live_one(adapter, rows, tiny_llama, tmp_path, cache):
    data = {"train": str(rows), "validation": 0.25}
    keys = {"objective": "dpo", "data": data, "adapter": adapter, "max_steps": 8, "learning_rate": 1e-3}
    runs = {how: train(tiny_recipe(tiny_llama, rows, tmp_path / how, reference=how, **keys)) for how in
            ("live", "precompute")}  # fmt: skip
    assert {how: run.values["stages"][0]["reference"] for how, run in runs.items()} == {how: how for how in runs}
    live, cached = (records(tmp_path / how) for how in runs)
    assert len(live) == len(cached) and live[0]["rewards/chosen"] == pytest.approx(
        cached[0]["rewards/chosen"], abs=1e-5
    )
    for a, b in zip(live, cached, strict=True):
        for key in ("rewards/margins", "logps/chosen", "eval_rewards/margins", "eval_loss", "loss"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), abs=1e-4, rel=1e-5)
    made = sorted((cache / "references").iterdir())
    assert len(made) == 2  # of the rows that train, and of those that are held back
    before = {path: path.stat().st_mtime_ns for path in (cache / "references").rglob("*.safetensors")}
    other = keys | {"max_steps": 2, "learning_rate": 5e-4}
    train(tiny_recipe(tiny_llama, rows, tmp_path / "again", reference="precompute", **other))
    assert before == {path: path.stat().st_mtime_ns for path in (cache / "references").rglob("*.safetensors")}


def test_in_bf16_a_reference_cached_under_another_packing_is_near_the_live_one(rows, tiny_llama, tmp_path, cache):
    keys = {"objective": {"name": "dpo", "beta": 0.1}, "max_steps": 1, "dtype": "bf16", "reference": "precompute"}
    train(tiny_recipe(tiny_llama, rows, tmp_path / "made", micro_batch_tokens=4096, **keys))
    made = list((cache / "references").iterdir())
    train(tiny_recipe(tiny_llama, rows, tmp_path / "used", micro_batch_tokens=64, share_prefix=False, **keys))
    assert list((cache / "references").iterdir()) == made
    (first,) = records(tmp_path / "used")
    assert abs(first["rewards/chosen"]) < 1e-2 and abs(first["rewards/rejected"]) < 1e-2
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-2)


def test_the_precomputed_reference_belongs_to_its_model_and_rows(rows, tiny_folder, tmp_path, cache):
    keys = {"objective": "dpo", "max_steps": 1, "reference": "precompute"}
    train(tiny_recipe(tiny_folder("llama"), rows, tmp_path / "a", **keys))
    train(tiny_recipe(tiny_folder("llama", 1), rows, tmp_path / "b", **keys))
    write(rows, pairs(seed=1))
    train(tiny_recipe(tiny_folder("llama"), rows, tmp_path / "c", **keys))
    train(tiny_recipe(tiny_folder("llama"), rows, tmp_path / "d", max_length=64, **keys))
    assert len(list((cache / "references").iterdir())) == 4
    assert all(abs(records(tmp_path / name)[0]["rewards/chosen"]) < 1e-5 for name in "abcd")


def test_a_non_finite_loss_names_its_rows(rows, tiny_llama, tmp_path, monkeypatch):
    built = Dpo.__call__
    calls = []

    def exploding(self, scored):
        calls.append(1)
        outcome = built(self, scored)
        term = outcome.terms["dpo"]
        return outcome._replace(terms={"dpo": term._replace(total=term.total * (math.nan if len(calls) == 3 else 1))})

    monkeypatch.setattr(Dpo, "__call__", exploding)
    with pytest.raises(NonFinite, match="step 3"):
        train(tiny_recipe(tiny_llama, rows, tmp_path / "run", objective="dpo"))
    batch = json.loads((tmp_path / "run" / "non_finite_batch.json").read_text())
    assert len(batch["data_rows"]) == 8 and len(set(batch["data_rows"])) == 4


def test_out_of_memory_halves_the_micro_batch(rows, tiny_llama, tmp_path, monkeypatch):
    from shikomi.model.language_model import LanguageModel

    score = LanguageModel.score

    def small(self, packed):
        if len(packed.ids) > 300:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return score(self, packed)

    monkeypatch.setattr(LanguageModel, "score", small)
    keys = {"micro_batch_tokens": 512, "share_prefix": False, "batch_size": 8, "objective": "dpo"}
    train(tiny_recipe(tiny_llama, rows, tmp_path / "run", **keys))
    assert "512 -> 256" in (tmp_path / "run" / "log.txt").read_text()


def test_a_dry_run_marks_both_answers_and_writes_nothing(rows, judged, tiny_llama, tmp_path):
    found = dry_run(tiny_recipe(tiny_llama, rows, tmp_path / "run", objective="dpo"))
    shown = found["first_example"]
    assert "chosen: [[a server<|im_end|>]]" in shown and "rejected: [[the game with 0 parts<|im_end|>]]" in shown
    assert shown.count("What is it") == 1 and found["rows"] == 24 and not (tmp_path / "run").exists()
    found = dry_run(tiny_recipe(tiny_llama, judged, tmp_path / "run", objective="kto"))
    assert "desirable: [[a server<|im_end|>]]" in found["first_example"]


@pytest.mark.parametrize("kind", ["pairs", "conversations"])
def test_the_comparison_takes_chosen_answers_or_rows_of_its_own(kind, rows, tiny_llama, tmp_path):
    test = write(tmp_path / "test.jsonl", pairs(6, 3))
    if kind == "conversations":
        test = write_rows(tmp_path / "test.jsonl", 6)
    keys = {
        "objective": "dpo", "data": {"train": str(rows), "test": str(test)}, "max_steps": 2,
        "evaluate": {"metrics": ["loss", "chrf"], "baselines": ["few-shot"], "shots": 2, "max_new_tokens": 4},
    }  # fmt: skip
    done = train(tiny_recipe(tiny_llama, rows, tmp_path / "run", **keys))
    evaluation = done.values["evaluation"]
    assert evaluation["trained"]["n"] == 6 and evaluation["baseline"]["few-shot"]["metrics"]["loss"]["value"] > 0


def test_without_test_rows_the_comparison_is_on_the_validation_rows(rows, tiny_llama, tmp_path):
    keys = {
        "objective": "dpo", "data": {"train": str(rows), "validation": 0.25}, "max_steps": 2,
        "evaluate": {"metrics": ["loss"], "baselines": ["zero-shot"]},
    }  # fmt: skip
    done = train(tiny_recipe(tiny_llama, rows, tmp_path / "run", **keys))
    assert done.values["evaluation"]["trained"]["n"] == 6


WRONG = {
    "pairs of conversations": (
        "dpo",
        [{"prompt": "a", "completion": "b"}],
        r"x\.jsonl:1.*learns from pairs.*completion",
    ),
    "judged, not pairs": ("orpo", [{"prompt": "a", "completion": "b", "label": True}], "objective: kto"),
    "conversations of pairs": ("sft", pairs(3), r"x\.jsonl:1.*preferences.*objective for preferences"),
    "judged of conversations": ("kto", [{"prompt": "a", "completion": "b"}], r"x\.jsonl:1.*judged answers.*add label"),
    "one label": ("kto", [row | {"label": True} for row in thumbs(6)], "all answers are desirable.*objective: sft"),
    "one answer": ("dpo", [row | {"rejected": row["chosen"]} for row in pairs(6)], "the same in all rows"),
    "beta 0": ({"name": "dpo", "beta": 0}, pairs(3), "objective.beta.*0"),
    "kto beta": ({"name": "kto", "beta": -1}, thumbs(3), "objective.beta"),
    "metric": ("dpo", pairs(6), "eval_loss"),
    "precompute kto": ("kto", thumbs(6), "reference: live"),
    "precompute orpo": ("orpo", pairs(6), "has no reference"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused_before_training(case, tiny_llama, tmp_path, cache):
    objective, content, message = WRONG[case]
    source = write(tmp_path / "x.jsonl", content)
    keys = {"objective": objective}
    if case == "metric":
        keys |= {"metric_for_best_model": "eval_chrf", "data": {"train": str(source), "validation": 0.4}}
    if case.startswith("precompute"):
        keys |= {"reference": "precompute"}
    with pytest.raises(BadInput) as refused:
        train(tiny_recipe(tiny_llama, source, tmp_path / "run", **keys))
    assert re.search(message, str(refused.value), re.DOTALL), str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_run_in_which_both_fall_says_so(rows, tiny_llama, tmp_path):
    keys = {"objective": {"name": "dpo", "beta": 0.05}, "max_steps": 20, "learning_rate": 1e-2}
    flipped = [row | {"chosen": row["rejected"] + " more", "rejected": row["rejected"]} for row in pairs()]
    write(rows, flipped)
    train(tiny_recipe(tiny_llama, rows, tmp_path / "falls", **keys))
    last = [r for r in records(tmp_path / "falls") if "loss" in r][-1]
    said = "both answers have become less likely" in (tmp_path / "falls" / "log.txt").read_text()
    assert said == (last["rewards/chosen"] < 0 and last["rewards/rejected"] < 0)
    write(rows, pairs())
    train(tiny_recipe(tiny_llama, rows, tmp_path / "rises", **keys | {"objective": {"name": "dpo", "rpo_alpha": 1.0}}))
    assert "less likely" not in (tmp_path / "rises" / "log.txt").read_text()


def test_virtual_tokens_named_as_model_are_a_part_of_the_reference(rows, tiny_llama, tmp_path):
    keys = {"adapter": {"name": "prompt", "num_virtual_tokens": 3}, "max_steps": 2, "learning_rate": 1e-1}
    train(tiny_recipe(tiny_llama, write_rows(tmp_path / "rows.jsonl"), tmp_path / "sft", **keys))
    train(tiny_recipe(tmp_path / "sft" / "final", rows, tmp_path / "on", objective="dpo", **keys))
    train(tiny_recipe(tiny_llama, rows, tmp_path / "fresh", objective="dpo", **keys))
    first, fresh = (records(tmp_path / name)[0] for name in ("on", "fresh"))
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0 != fresh["rewards/chosen"]


OWN_NAMES = {"prompt": "q", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize("names", [None, OWN_NAMES], ids=["the usual keys", "templates"])
def test_a_policy_answers_rows_that_have_only_a_question(names, tiny_llama, tmp_path, cache):
    """Those of its pairs, and others with a template that is given now."""
    rows = [{(names or {}).get(key, key): text for key, text in pair.items()} for pair in pairs()]
    file, unseen = write(tmp_path / "pairs.jsonl", rows), write(tmp_path / "unseen.jsonl", [{"text": "red"}] * 2)
    how = {key: f"{{{name}}}" for key, name in names.items()} if names else {"format": "preference"}
    data = {"train": str(file), **how}
    train(tiny_recipe(tiny_llama, file, tmp_path / "run", data=data, objective="dpo", max_steps=1))
    policy = open_model(tmp_path / "run")
    again = [row["prediction"] for row in policy.predict(file, max_new_tokens=3, limit=2)]
    assert again == [policy.generate(pair["prompt"], 3) for pair in pairs()[:2]]
    other = [row["prediction"] for row in policy.predict(unseen, "Say {text}", max_new_tokens=3)]
    assert other[0] == other[1] and len(other) == 2
    answered = write(tmp_path / "answered.jsonl", [{"text": "red", "completion": "a red"}])
    assert policy.evaluate(answered, ["loss"], prompt="Say {text}")["n"] == 1  # {completion}, as with any model
