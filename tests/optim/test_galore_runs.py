"""Whole runs with GaLore: resumed == uninterrupted, accumulated == one batch, and every option does something."""

import json

import pytest
from running import Interrupting, final_bytes, losses, tiny_recipe, write_rows
from safetensors.torch import load_file

from shikomi.errors import BadInput, Stopped
from shikomi.optim import _moments, _subspace, galore
from shikomi.run import resume, train


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setenv("SHIKOMI_CACHE", str(tmp_path / "cache"))
    return write_rows(tmp_path / "rows.jsonl")


def recipe(model, rows, run, optim=None, **keys):
    """Full fine-tuning of the tiny model by GaLore of rank 4, renewed every 3 steps."""
    options = {"name": "galore", "rank": 4, "update_proj_gap": 3, **(optim or {})}
    defaults = {"adapter": "full", "optim": options, "save_dtype": "fp32", "learning_rate": 1e-2}
    return tiny_recipe(model, rows, run, **(defaults | keys))


@pytest.mark.parametrize(
    "stop, case",
    [
        (3, {"optim": {"proj_type": "std"}}),
        (4, {"optim": {"proj_type": "full", "project_embeddings": True}, "micro_batch_tokens": 64}),
        (3, {"optim": {"state_bits": 8}, "sketched": True, "micro_batch_tokens": 64}),
    ],
    ids=["std", "full, micro-batches", "sketched, 8 bits"],
)
def test_interrupted_and_resumed_is_uninterrupted(stop, case, tiny_llama, rows, tmp_path, monkeypatch):
    """Stopped just before a renewal (after step 3) and within a projection's life (after step 4)."""
    if case.get("sketched"):
        monkeypatch.setattr(_subspace, "EXACT_BELOW", 8)
        monkeypatch.setattr(_subspace, "OVERSAMPLING", 1)
        monkeypatch.setattr(_moments, "SMALLEST", 100)
    keys = {"max_steps": 7, "micro_batch_tokens": case.get("micro_batch_tokens", 2048)}
    with pytest.raises(Stopped):
        train(recipe(tiny_llama, rows, tmp_path / "run", case["optim"], **keys), Interrupting(stop))
    assert [step for step, *_ in losses(tmp_path / "run")] == list(range(1, stop + 1))
    resume(tmp_path / "run")
    train(recipe(tiny_llama, rows, tmp_path / "whole", case["optim"], **keys))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "whole")


def test_it_learns_and_micro_batches_are_one_batch(tiny_llama, rows, tmp_path):
    keys = {"max_steps": 14, "share_prefix": False, "learning_rate": 3e-2}
    train(recipe(tiny_llama, rows, tmp_path / "one", **keys))
    train(recipe(tiny_llama, rows, tmp_path / "parts", **keys, micro_batch_tokens=32))
    one, parts = losses(tmp_path / "one"), losses(tmp_path / "parts")
    assert one[-1][1] < 0.75 * one[0][1]
    for (_, loss, norm), (_, other, other_norm) in zip(one, parts, strict=True):
        assert loss == pytest.approx(other, rel=1e-3) and norm == pytest.approx(other_norm, rel=5e-3)


def moved(model, run) -> float:
    """How far training moved a projected matrix."""
    name = "model.layers.0.mlp.gate_proj.weight"
    return (load_file(run / "final" / "model.safetensors")[name] - load_file(model / "model.safetensors")[name]).norm()


def test_the_norm_is_of_what_is_projected_and_clips_it(tiny_llama, rows, tmp_path):
    """At rank 31 of 32 the projected gradients hold nearly all of the norm that full fine-tuning logs."""
    options = {"rank": 31, "project_embeddings": True, "adam_epsilon": 1.0}
    train(recipe(tiny_llama, rows, tmp_path / "galore", options, max_steps=1))
    train(recipe(tiny_llama, rows, tmp_path / "clipped", options, max_steps=1, max_grad_norm=1e-3))
    train(tiny_recipe(tiny_llama, rows, tmp_path / "full", adapter="full", max_steps=1))
    (low,), (whole,) = losses(tmp_path / "galore"), losses(tmp_path / "full")
    assert low[1] == whole[1] and 0.99 * whole[2] < low[2] < whole[2]
    assert losses(tmp_path / "clipped") == [low]
    assert 0 < moved(tiny_llama, tmp_path / "clipped") < 0.02 * moved(tiny_llama, tmp_path / "galore")


def test_a_stage_without_it_follows_a_stage_with_it(tiny_llama, rows, tmp_path):
    """The second stage learns all that AdamW learns: nothing of the first one's hooks is left."""
    keys = {"adapter": "full", "learning_rate": 1e-2}
    low = {"name": "galore", "rank": 4}
    stages = [{"name": "one", "max_steps": 1, "optim": low}, {"name": "two", "max_steps": 8, "optim": "adamw"}]
    train(tiny_recipe(tiny_llama, rows, tmp_path / "run", **keys, stages=stages))
    train(tiny_recipe(tiny_llama, rows, tmp_path / "full", **keys, max_steps=1))
    found = losses(tmp_path / "run")
    assert found[-1][1] < 0.8 * found[0][1]
    assert found[1][2] > 0.5 * losses(tmp_path / "full")[0][2]


def test_an_adapter_is_refused_before_the_start(tiny_llama, rows, tmp_path):
    with pytest.raises(BadInput, match="adapter: full"):
        train(tiny_recipe(tiny_llama, rows, tmp_path / "run", optim={"name": "galore"}))
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())


OPTIONS = {
    "rank": 6,
    "update_proj_gap": 2,
    "scale": 0.5,
    "proj_type": "reverse_std",
    "project_embeddings": True,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 0.1,
    "state_bits": 8,
}


def test_every_option_changes_something(tiny_llama, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(_moments, "SMALLEST", 100)
    assert set(OPTIONS) == set(galore.GaLore.__dataclass_fields__) - {"name"}
    train(recipe(tiny_llama, rows, tmp_path / "plain", max_steps=3))
    plain = final_bytes(tmp_path / "plain")
    for key, value in OPTIONS.items():
        train(recipe(tiny_llama, rows, tmp_path / key, {key: value}, max_steps=3))
        assert final_bytes(tmp_path / key) != plain, key


def test_the_checkpoint_holds_the_low_rank_state(tiny_llama, rows, tmp_path):
    from shikomi.checkpoint.tensors import read_safetensors

    train(recipe(tiny_llama, rows, tmp_path / "run", max_steps=2))
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    found = read_safetensors(folder / "optimizer.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"  # (64, 32): the shorter side is the right one
    assert {k.split("/")[0]: tuple(t.shape) for k, t in found.items() if k.endswith("/" + name)} == {
        "step": (),
        "exp_avg": (64, 4),
        "exp_avg_sq": (64, 4),
        "right": (4, 32),
    }
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == 2


@pytest.mark.parametrize("pasted", [{"optim": "galore_adamw"}, {"optimizer": "galore_adamw_layerwise"}])
def test_other_tools_names_are_understood(pasted, tiny_llama, rows, tmp_path):
    assert tiny_recipe(tiny_llama, rows, tmp_path / "run", adapter="full", **pasted).stages[0].optim.name == "galore"
