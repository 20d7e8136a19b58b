"""Whole runs over a base in few bits: they learn, resume bit for bit, and answer over the base they were trained on."""

import json
import shutil

import pytest
import torch
from running import final_bytes, losses, tiny_recipe, write_rows
from safetensors.torch import load_file, save_file

from shikomi.adapters.lora import Lora
from shikomi.errors import BadInput
from shikomi.inference import merge, open_model
from shikomi.model.load import load_model
from shikomi.quant._quantized import Quantized
from shikomi.quant._serialized import model_to_state_dict, to_config
from shikomi.quant.nf4 import Nf4
from shikomi.run import resume, train

LORA = {"name": "lora", "r": 4, "lora_alpha": 8}
DORA = {"name": "dora", "r": 4, "lora_alpha": 8}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    return write_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("adapter", [LORA, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize(
    "quant", ["nf4", "fp4", "int8", {"name": "nf4", "double_quant": False, "block_size": 32}], ids=str
)
def test_a_run_over_few_bits_learns_and_its_adapter_answers_over_them(quant, adapter, tiny_llama, rows, tmp_path):
    settings = {"quant": quant, "adapter": adapter, "max_steps": 20, "learning_rate": 2e-2, "save_dtype": "fp32"}
    done = train(tiny_recipe(tiny_llama, rows, tmp_path / "run", **settings))
    curve = losses(tmp_path / "run")
    assert curve[-1][1] < 0.8 * curve[0][1] and all(norm > 0 for _, _, norm in curve)
    plain = train(tiny_recipe(tiny_llama, rows, tmp_path / "plain", adapter=adapter, max_steps=1))
    assert done.values["total_parameters"] == plain.values["total_parameters"]  # logical, whatever stores them
    assert losses(tmp_path / "plain")[0][1] != curve[0][1]
    lm = open_model(tmp_path / "run", dtype="fp32").lm
    assert sum(isinstance(module, Quantized) for module in lm.model.modules()) == 14
    assert open_model(tmp_path / "run" / "final", dtype="fp32").lm.total_parameters == lm.total_parameters


def test_a_resumed_run_over_nf4_is_the_uninterrupted_one(tiny_llama, rows, tmp_path):
    keys = {"quant": "nf4", "lr_scheduler_type": "constant"}
    train(tiny_recipe(tiny_llama, rows, tmp_path / "whole", max_steps=6, **keys))
    train(tiny_recipe(tiny_llama, rows, tmp_path / "cut", max_steps=3, **keys))
    resume(tmp_path / "cut", ["max_steps=6"])
    assert final_bytes(tmp_path / "cut") == final_bytes(tmp_path / "whole")


def test_merging_takes_the_base_out_of_its_few_bits(tiny_llama, rows, tmp_path):
    train(tiny_recipe(tiny_llama, rows, tmp_path / "run", quant="nf4", save_dtype="fp32"))
    ids = [[5, 7, 9, 11, 13]]
    with torch.no_grad():
        before = open_model(tmp_path / "run").lm.model(input_ids=torch.tensor(ids)).logits
        report = merge(tmp_path / "run", tmp_path / "merged", "fp32")
        after = open_model(tmp_path / "merged", dtype="fp32").lm.model(input_ids=torch.tensor(ids)).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert report["max_logit_drift"] < 1e-3


def test_a_trial_merge_in_bf16_leaves_no_trace(tiny_llama, rows, tmp_path, monkeypatch):
    """What was rounded for the trial, layers without an adapter and whole trained modules too, is as it was."""
    adapter = {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}
    train(tiny_recipe(tiny_llama, rows, tmp_path / "run", quant="nf4", adapter=adapter, save_dtype="fp32"))
    merge(tmp_path / "run", tmp_path / "fp32", "fp32")
    monkeypatch.setattr("shikomi.checkpoint.merge.SMALL_MODEL", 0)
    monkeypatch.setattr("shikomi.checkpoint.merge.LARGE_DRIFT", -1.0)
    report = merge(tmp_path / "run", tmp_path / "auto", "auto")
    assert report["dtype"] == "float32" and report["notes"]
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "auto"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_full_fine_tuning_of_few_bits_is_refused(tiny_llama, rows, tmp_path):
    with pytest.raises(BadInput, match="quant: nf4 freezes what adapter: full trains"):
        train(tiny_recipe(tiny_llama, rows, tmp_path / "run", quant="nf4", adapter="full"))


def few_bits_folder(model, folder):
    """A folder of the model as bitsandbytes stores it in NF4, with its tokenizer."""
    lm = load_model(str(model), quant=Nf4())
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(model_to_state_dict(lm.model), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = to_config(Nf4(), torch.float32)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_in_few_bits_is_recognised_without_being_told(tiny_llama, rows, tmp_path):
    folder = few_bits_folder(tiny_llama, tmp_path / "nf4")
    train(tiny_recipe(folder, rows, tmp_path / "found", max_steps=3, dtype="bf16"))
    train(tiny_recipe(tiny_llama, rows, tmp_path / "made", max_steps=3, dtype="bf16", quant="nf4"))
    assert losses(tmp_path / "found") == losses(tmp_path / "made")
    assert final_bytes(tmp_path / "found") == final_bytes(tmp_path / "made")


def test_what_does_not_go_with_a_folder_in_few_bits_is_refused(tiny_llama, rows, tmp_path):
    folder = few_bits_folder(tiny_llama, tmp_path / "nf4")
    with pytest.raises(BadInput, match="stored in few bits.*adapter: lora, or give the folder"):
        train(tiny_recipe(folder, rows, tmp_path / "full", adapter="full"))
    with pytest.raises(BadInput, match="quantized already.*write quant: {name: nf4"):
        train(tiny_recipe(folder, rows, tmp_path / "twice", quant={"name": "nf4", "block_size": 128}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="gptq.*bitsandbytes.*before quantization"):
        train(tiny_recipe(folder, rows, tmp_path / "gptq"))


def test_loftq_starts_nearer_to_the_dense_model(tiny_llama):
    ids = torch.tensor([[5, 7, 9, 11, 13, 30, 31]])
    loftq = Lora(r=24, lora_alpha=12, init_lora_weights="loftq", loftq_iter=2)
    logits = {}
    for name, keys in {"dense": {}, "nf4": {"quant": Nf4()}, "loftq": {"quant": Nf4(), "adapter": loftq}}.items():
        lm = load_model(str(tiny_llama), dtype="fp32", **keys)
        with torch.no_grad():
            logits[name] = lm.model(input_ids=ids).logits
    far, near = (float((logits[name] - logits["dense"]).norm()) for name in ("nf4", "loftq"))
    assert near < 0.5 * far


def test_a_loftq_run_saves_a_plain_adapter(tiny_llama, rows, tmp_path):
    adapter = {**LORA, "r": 12, "init_lora_weights": "loftq"}
    train(tiny_recipe(tiny_llama, rows, tmp_path / "run", max_steps=2, quant="nf4", adapter=adapter))
    config = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["r"] == 12 and "loftq_iter" not in config


def test_loftq_without_few_bits_is_refused(tiny_llama, rows, tmp_path):
    with pytest.raises(BadInput, match="undoes the error of quantization"):
        train(tiny_recipe(tiny_llama, rows, tmp_path / "run", adapter={**LORA, "init_lora_weights": "loftq"}))
