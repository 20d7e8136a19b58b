"""Whole runs against TRL's trainers: the same adapter to start from, the same pairs in the same order, step by step.

How far two runs may differ is measured, not guessed: rounding alone separates two runs of ours that pack the same
steps differently, and grows with the steps; TRL may be ten times as far away, and not farther.
"""

import pytest
import torch
from preference_rows import pairs
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl_runs import BATCH, STEPS, begin, compare, ours, peers

METRICS = ("loss", "rewards/margins", "rewards/chosen", "logps/rejected", "grad_norm")


def causal(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(model, adapter): the adapter is one that was trained, so B is not zero."""
    return begin(tmp_path_factory.mktemp("begun"), causal, ("lora_B",), task_type="CAUSAL_LM")


def test_twelve_steps_of_dpo_are_those_of_trl(begun, tmp_path, cache):
    keys = {"objective": {"name": "dpo", "beta": 0.1}}
    rows = pairs(STEPS * BATCH // 2)  # two passes
    got = ours(begun, tmp_path / "a", rows, **keys)
    again = ours(begun, tmp_path / "b", rows, micro_batch_tokens=8, share_prefix=False, **keys)
    want = peers(DPOTrainer, DPOConfig, causal, begun, tmp_path / "trl", rows, beta=0.1, loss_type=["sigmoid"])
    assert got[0]["rewards/chosen"] == 0.0
    compare(got, again, want, METRICS)


def test_twelve_steps_of_kto_are_those_of_trl(begun, tmp_path, cache):
    keys = {"objective": {"name": "kto", "beta": 0.1, "undesirable_weight": 1.5}}
    rows = [  # good answers are alike, so that they become likely after any prompt: the baseline rises above 0
        {"prompt": row["prompt"], "completion": f"a tool with {i % 3} parts" if i % 4 else "no", "label": i % 4 > 0}
        for i, row in enumerate(pairs(STEPS * BATCH))
    ]
    got = ours(begun, tmp_path / "a", rows, **keys)
    again = ours(begun, tmp_path / "b", rows, micro_batch_tokens=8, share_prefix=False, **keys)
    want = peers(KTOTrainer, KTOConfig, causal, begun, tmp_path / "trl", rows, beta=0.1, undesirable_weight=1.5)
    assert got[0]["kl"] == 0.0 and got[-1]["kl"] > 0.1
    compare(got, again, want, ("loss", "rewards/margins", "rewards/chosen", "logps/rejected", "kl", "grad_norm"))
