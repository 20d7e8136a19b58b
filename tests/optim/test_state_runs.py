"""Whole runs with optimizers whose state is small or elsewhere: resumed == uninterrupted, and offloaded == adamw."""

import pytest
from running import Interrupting, final_bytes, losses, tiny_recipe, write_rows

from shikomi.checkpoint.tensors import read_safetensors
from shikomi.errors import BadInput, Stopped
from shikomi.optim import _moments
from shikomi.optim._by_tensor import TensorAdamW
from shikomi.optim.adamw_8bit import AdamW8bit
from shikomi.run import resume, train


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    return write_rows(tmp_path / "rows.jsonl")


def recipe(model, rows, run, optim, **keys):
    defaults = {"adapter": "full", "optim": optim, "save_dtype": "fp32", "learning_rate": 1e-2, "weight_decay": 0.1}
    return tiny_recipe(model, rows, run, **(defaults | keys))


@pytest.mark.parametrize(
    "optim",
    ["adamw_8bit", {"name": "offload", "offload_to": "host"}, {"name": "offload", "offload_to": "disk"}],
    ids=str,
)
def test_interrupted_and_resumed_is_uninterrupted(optim, tiny_llama, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(_moments, "SMALLEST", 100)
    with pytest.raises(Stopped):
        train(recipe(tiny_llama, rows, tmp_path / "run", optim), Interrupting(3))
    resume(tmp_path / "run")
    train(recipe(tiny_llama, rows, tmp_path / "whole", optim))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "whole")
    if optim != "adamw_8bit":
        train(recipe(tiny_llama, rows, tmp_path / "adamw", "adamw"))
        assert final_bytes(tmp_path / "adamw") == final_bytes(tmp_path / "whole")
        return
    name = "model.layers.0.mlp.gate_proj.weight"
    (folder,) = (f for f in (tmp_path / "whole" / "checkpoints").iterdir() if f.name == "step-000006")
    found = read_safetensors(folder / "optimizer.safetensors")
    assert {k.split("/")[0]: str(t.dtype) for k, t in found.items() if k.endswith("/" + name)} == {
        "step": "torch.float32",
        "exp_avg": "torch.uint8",
        "exp_avg_absmax": "torch.float32",
        "exp_avg_sq": "torch.uint8",
        "exp_avg_sq_absmax": "torch.float32",
    }


def test_resumed_state_is_put_back_to_its_place(tiny_llama, rows, tmp_path, monkeypatch):
    """Nothing is only copied beside the place: what is stepped after a resume is the mapped file."""
    put = []
    original = TensorAdamW.put
    monkeypatch.setattr(TensorAdamW, "put", lambda self, p, key, t: (put.append(key), original(self, p, key, t)))
    keys = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    optim = {"name": "offload", "offload_to": "disk"}
    train(recipe(tiny_llama, rows, tmp_path / "run", optim, max_steps=2, **keys))
    assert not put
    resume(tmp_path / "run", ["max_steps=3"])
    assert put.count("exp_avg") == put.count("step") == 21


def test_eight_bits_learn_as_adamw_does(tiny_llama, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(_moments, "SMALLEST", 100)
    for optim in ("adamw", "adamw_8bit"):
        train(recipe(tiny_llama, rows, tmp_path / optim, optim, max_steps=14))
    plain, small = losses(tmp_path / "adamw"), losses(tmp_path / "adamw_8bit")
    assert plain[-1] != small[-1] and small[-1][1] < 0.75 * small[0][1]
    assert small[-1][1] == pytest.approx(plain[-1][1], rel=0.03)


def test_lora_plus_and_an_adapter_go_with_each_of_them(tiny_llama, rows, tmp_path):
    lora = {"adapter": {"name": "lora", "r": 4, "lora_alpha": 8}, "max_steps": 2}
    settings = {"loraplus_lr_ratio": 16}
    for name, options in {"adamw": {}, "disk": {"name": "offload", "offload_to": "disk"}}.items():
        optim = {"name": "adamw", **options, **settings}
        train(recipe(tiny_llama, rows, tmp_path / name, optim, **lora))
    train(recipe(tiny_llama, rows, tmp_path / "plain", "adamw", **lora))
    assert final_bytes(tmp_path / "adamw") == final_bytes(tmp_path / "disk") != final_bytes(tmp_path / "plain")


def test_embedding_bits_change_what_is_trained(tiny_llama, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(_moments, "SMALLEST", 100)
    for bits in (32, 8):
        optim = {"name": "adamw_8bit", "embedding_bits": bits}
        train(recipe(tiny_llama, rows, tmp_path / str(bits), optim, max_steps=3))
    assert final_bytes(tmp_path / "32") != final_bytes(tmp_path / "8")
    assert AdamW8bit().bits("model.embed_tokens.weight", (100, 100)) == 32


def test_paged_is_refused_before_anything_is_written(tiny_llama, rows, tmp_path):
    with pytest.raises(BadInput, match="optim: adamw_8bit"):
        train(recipe(tiny_llama, rows, tmp_path / "run", {"name": "paged", "state_bits": 8}))
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    "pasted, name, options",
    [
        ("adamw_8bit", "adamw_8bit", {}),
        ("adamw_bnb_8bit", "adamw_8bit", {}),
        ("paged_adamw_8bit", "paged", {"state_bits": 8}),
        ("paged_adamw_32bit", "paged", {}),
        ("adamw_torch_fused", "adamw", {}),
    ],
)
def test_other_tools_names_are_understood(pasted, name, options, tiny_llama, rows, tmp_path):
    for key in ("optim", "optimizer"):
        found = tiny_recipe(tiny_llama, rows, tmp_path / "run", **{key: pasted}, adam_beta2=0.95).stages[0].optim
        assert (found.name, found.options) == (name, {**options, "adam_beta2": 0.95})
