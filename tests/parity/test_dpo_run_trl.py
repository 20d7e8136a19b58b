"""Whole runs against TRL's trainers: the same adapter to start from, the same pairs in the same order, step by step.

How far two runs may differ is measured, not guessed: rounding alone separates two runs of ours that pack the same
steps differently, and grows with the steps; TRL may be ten times as far away, and not farther.
"""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from preference_rows import pairs
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl_runs import BATCH, RATE, STEPS, TEMPLATE, as_messages, compare, ours

METRICS = ("loss", "rewards/margins", "rewards/chosen", "logps/rejected", "grad_norm")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(model, adapter): the adapter is one that was trained, so B is not zero."""
    folder = tmp_path_factory.mktemp("begun")
    model = save_tiny(folder / "model")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    peft.save_pretrained(folder / "adapter")
    return model, folder / "adapter"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))


def peers(trainer, config, begun, folder, rows, **options) -> list[dict]:
    model, adapter = begun
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    start = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    args = config(
        output_dir=str(folder), per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=RATE,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False,
        train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    made = trainer(
        model=PeftModel.from_pretrained(start, str(adapter), is_trainable=True),
        args=args,
        train_dataset=Dataset.from_list([as_messages(row) for row in rows]),
        processing_class=tokenizer,
    )
    made.train()
    return [record for record in made.state.log_history if "loss" in record]


def test_twelve_steps_of_dpo_are_those_of_trl(begun, tmp_path, cache):
    keys = {"objective": {"name": "dpo", "beta": 0.1}}
    rows = pairs(STEPS * BATCH // 2)  # two passes
    got = ours(begun, tmp_path / "a", rows, **keys)
    again = ours(begun, tmp_path / "b", rows, micro_batch_tokens=8, share_prefix=False, **keys)
    want = peers(DPOTrainer, DPOConfig, begun, tmp_path / "trl", rows, beta=0.1, loss_type=["sigmoid"])
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
    want = peers(KTOTrainer, KTOConfig, begun, tmp_path / "trl", rows, beta=0.1, undesirable_weight=1.5)
    assert got[0]["kl"] == 0.0 and got[-1]["kl"] > 0.1
    compare(got, again, want, ("loss", "rewards/margins", "rewards/chosen", "logps/rejected", "kl", "grad_norm"))
