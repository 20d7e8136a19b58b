"""Groups of AdamW and LoRA+ in whole runs: what is the same, what is refused, what may be pasted."""

import pytest
import torch
from running import final_bytes, losses, tiny_recipe, write_rows
from torch import nn

from shikomi.errors import BadInput
from shikomi.optim.adamw import AdamW
from shikomi.run import train


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    return write_rows(tmp_path / "rows.jsonl")


def test_a_ratio_of_one_is_lora_bit_for_bit_and_another_is_not(tiny_llama, rows, tmp_path):
    adapter = {"name": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "embed_tokens", "up_proj"]}
    adapter["modules_to_save"] = ["norm"]
    keys = {"adapter": adapter, "save_dtype": "fp32", "max_steps": 4}
    four = {"loraplus_lr_ratio": 4}
    cases = {"plain": {}, "one": {"loraplus_lr_ratio": 1}, "four": four, "slow": four | {"loraplus_lr_embedding": 1e-6}}
    for name, optim in cases.items():
        train(tiny_recipe(tiny_llama, rows, tmp_path / name, **keys, optim={"name": "adamw", **optim}))
    assert final_bytes(tmp_path / "one") == final_bytes(tmp_path / "plain")
    assert losses(tmp_path / "one") == losses(tmp_path / "plain")
    assert len({final_bytes(tmp_path / name) for name in cases}) == 3


def test_every_step_of_the_schedule_keeps_the_ratio(tiny_llama, rows, tmp_path, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def watched(self, closure=None):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train(tiny_recipe(tiny_llama, rows, tmp_path / "run", loraplus_lr_ratio=16, warmup_steps=2))
    assert len(seen) == 6 and len({a for a, _ in seen}) > 3
    assert all(b == pytest.approx(16 * a) for a, b in seen)


def test_both_names_may_be_pasted_at_the_top(tiny_llama, rows, tmp_path):
    recipe = tiny_recipe(tiny_llama, rows, tmp_path / "run", loraplus_lr_ratio=16, loraplus_lr_embedding=1e-6)
    assert recipe.stages[0].optim.name == "adamw"
    assert recipe.stages[0].optim.options == {"loraplus_lr_ratio": 16, "loraplus_lr_embedding": 1e-6}


def test_it_is_refused_where_no_b_is_trained(tiny_llama, rows, tmp_path):
    with pytest.raises(BadInput, match="low-rank B.*adapter: lora"):
        train(tiny_recipe(tiny_llama, rows, tmp_path / "run", adapter="full", loraplus_lr_ratio=16))
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not losses(tmp_path / "run")
    prefix = {"prompt_embeddings": nn.Parameter(torch.ones(4, 8))}
    with pytest.raises(BadInput, match="prompt_embeddings"):
        AdamW(loraplus_lr_ratio=2).build(prefix, 1e-3, 0.0)


@pytest.mark.parametrize("options", [{"loraplus_lr_ratio": 0.0625}, {"loraplus_lr_embedding": 1e-6}])
def test_a_ratio_the_wrong_way_round_and_an_embedding_rate_alone_are_refused(options, tiny_llama, rows, tmp_path):
    with pytest.raises(BadInput, match="loraplus"):
        tiny_recipe(tiny_llama, rows, tmp_path / "run", optim={"name": "adamw", **options})
