"""Merged and fully trained models load in plain transformers and say what they said here."""

import copy

import pytest
import torch
from architectures import EXPECTED, VOCABULARY, build
from tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM

from shikomi.adapters.full import Full
from shikomi.adapters.lora import Lora
from shikomi.checkpoint.merge import _rounded, merge, save_model
from shikomi.errors import BadInput
from shikomi.model.device import Dtypes
from shikomi.model.load import wrap

FP32 = Dtypes(torch.float32, torch.float32)
CPU = torch.device("cpu")
IDS = torch.randint(3, VOCABULARY, (1, 11), generator=torch.Generator().manual_seed(2))


def model(name: str, adapter):
    lm = wrap(copy.deepcopy(build(name)), tiny_tokenizer(), adapter, FP32, CPU)
    with torch.no_grad():
        for parameter in lm.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return lm


def logits(m) -> torch.Tensor:
    with torch.no_grad():
        return m(input_ids=IDS, use_cache=False).logits[0]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_merged_folder_loads_in_transformers(name, tmp_path):
    lm = model(name, Lora(r=3, target_modules="all-linear"))
    before = logits(lm.model)
    report = merge(lm, tmp_path / "merged", "fp32", texts=[IDS[0].tolist()])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=2e-5)
    assert report["adapter_effect"] > 1e-3 and report["max_logit_drift"] < 1e-3 and report["top1_agreement"] == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ],
)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_adapted_embeddings_and_heads_are_merged(name, options, tmp_path):
    lm = model(name, Lora(r=3, **options))
    before = logits(lm.model)
    merge(lm, tmp_path / "merged", "fp32", texts=[IDS[0].tolist()])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_fully_trained_folder_loads_in_transformers(name, tmp_path):
    lm = model(name, Full())
    save_model(lm, tmp_path / "full", torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), logits(lm.model), rtol=1e-5, atol=1e-6)


def test_stochastic_rounding_keeps_the_mean_where_rounding_loses_it():
    weight = torch.full((200, 200), 1.0 + 1 / 1024)  # an eighth of a bf16 step above 1
    generator = torch.Generator().manual_seed(0)
    assert float(_rounded(weight, torch.bfloat16, False, generator).float().mean()) == 1.0
    assert abs(float(_rounded(weight, torch.bfloat16, True, generator).float().mean()) - 1 - 1 / 1024) < 1e-4


def test_merging_refuses_a_full_model_and_a_used_folder(tmp_path):
    with pytest.raises(BadInput, match="no adapter"):
        merge(model("llama", Full()), tmp_path / "x")
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "file").write_text("mine")
    with pytest.raises(BadInput, match="not empty"):
        merge(model("llama", Lora(r=2)), tmp_path / "y")
    assert (tmp_path / "y" / "file").read_text() == "mine"
