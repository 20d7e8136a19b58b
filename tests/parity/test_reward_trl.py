"""A reward model's run against TRL's RewardTrainer, and its adapter in PEFT over transformers' classifier."""

import json

import pytest
import torch
from peft import PeftModel
from preference_rows import pairs, write
from reward_models import by_transformers, conversations
from running import tiny_recipe
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer
from trl_runs import BATCH, STEPS, begin, compare, ours, peers

from shikomi.inference import open_reward_model
from shikomi.run import train


def classifier(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(model, adapter): PEFT's own adapter of a classifier, with B and the head moved off their start."""
    options = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    return begin(tmp_path_factory.mktemp("begun"), classifier, ("lora_B", "modules_to_save"), **options)


def test_twelve_steps_are_those_of_trl(begun, tmp_path, cache):
    rows = [row | {"margin": 0.25 * (i % 3)} for i, row in enumerate(pairs(STEPS * BATCH // 2))]  # two passes
    keys = {"objective": {"name": "reward", "center_rewards_coefficient": 0.02}}
    got = ours(begun, tmp_path / "a", rows, **keys)
    again = ours(begun, tmp_path / "b", rows, micro_batch_tokens=8, share_prefix=False, **keys)
    trl = (RewardTrainer, RewardConfig, classifier, begun)
    want = peers(*trl, tmp_path / "trl", rows, center_rewards_coefficient=0.02)
    compare(got, again, want, ("loss", "margin", "mean_reward", "grad_norm"))
    assert [r["accuracy"] for r in got] == [r["accuracy"] for r in want]
    plain = peers(*trl, tmp_path / "plain", [{k: v for k, v in row.items() if k != "margin"} for row in rows])
    assert abs(plain[0]["loss"] - want[0]["loss"]) > 0.01  # the margins are seen


@pytest.mark.parametrize("adapter, save_dtype", [("lora", "bf16"), ("dora", "fp32"), ("prompt", "fp32")])
def test_peft_gives_the_values(adapter, save_dtype, tiny_folder, tmp_path, cache):
    model = tiny_folder("qwen3")  # a head of its own, which a classifier has not
    rows = write(tmp_path / "pairs.jsonl", pairs())
    options = {"num_virtual_tokens": 3} if adapter == "prompt" else {"r": 4, "lora_alpha": 8}
    keys = {"objective": "reward", "learning_rate": 1e-2, "adapter": {"name": adapter, **options}}
    train(tiny_recipe(model, rows, tmp_path / "run", save_dtype=save_dtype, **keys))
    rm = open_reward_model(tmp_path / "run", dtype="fp32")
    want = torch.tensor(rm.score(conversations()))
    theirs = PeftModel.from_pretrained(classifier(model), str(tmp_path / "run" / "final"))
    assert theirs.peft_config["default"].task_type == "SEQ_CLS"
    saved = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert saved["modules_to_save"] == ["score"] and saved["task_type"] == "SEQ_CLS"
    pad = AutoTokenizer.from_pretrained(tmp_path / "run" / "final").pad_token_id
    theirs.config.pad_token_id = pad
    one_by_one = [by_transformers(theirs, rm, [row], pad) for row in conversations()]
    assert want.std() > 0.01
    torch.testing.assert_close(torch.cat(one_by_one), want, rtol=1e-4, atol=1e-5)
    if adapter != "prompt":  # with embeddings instead of tokens transformers sees no padding
        torch.testing.assert_close(by_transformers(theirs, rm, conversations(), pad), want, rtol=1e-4, atol=1e-5)
