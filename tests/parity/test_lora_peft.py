"""LoRA against PEFT on the same weights: names, gradients, logits, files both ways."""

import copy

import pytest
import torch
from against_peft import assert_equal_but_for_rounding, peft_loss, rows
from architectures import build
from peft import LoraConfig, PeftModel, get_peft_model
from peft import load_peft_weights as read_peft

from shikomi.adapters.dora import Dora
from shikomi.adapters.lora import Lora
from shikomi.checkpoint.peft_format import load_adapter, save_adapter
from shikomi.data.packing import pack
from shikomi.model.device import Dtypes
from shikomi.model.load import wrap
from shikomi.model.probe import choose_path
from shikomi.registry import find

CPU = torch.device("cpu")
FP32 = Dtypes(torch.float32, torch.float32)
CASES = {
    "qv": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "all-linear": ("llama", {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}),
    "regex": ("qwen3", {"r": 2, "target_modules": r".*layers\.1\..*_proj"}),
    "rslora": ("llama", {"r": 4, "use_rslora": True, "target_modules": "all-linear"}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "bias all": ("qwen2", {"r": 2, "target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "modules_to_save": ("llama", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "layers": ("llama", {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "exclude": ("llama", {"r": 2, "target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "gpt2 conv1d": ("gpt2", {"r": 4, "target_modules": "all-linear"}),
    "phi3 fused": ("phi3", {"r": 4, "target_modules": "all-linear"}),
    "neox": ("gpt_neox", {"r": 4, "target_modules": "all-linear"}),
    "gemma2": ("gemma2", {"r": 4, "target_modules": "all-linear"}),
    "mixtral": ("mixtral", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "embedding": ("llama", {"r": 4, "target_modules": ["embed_tokens", "v_proj"]}),
    "dora": ("llama", {"r": 3, "target_modules": "all-linear", "use_dora": True}),
    "dora rslora bias": ("qwen2", {"r": 3, "target_modules": "all-linear", "use_dora": True, "use_rslora": True}),
    "dora qk norm": ("qwen3", {"r": 3, "target_modules": "all-linear", "use_dora": True}),
    "dora conv1d": ("gpt2", {"r": 3, "target_modules": "all-linear", "use_dora": True}),
    "dora fused qkv": ("phi3", {"r": 3, "target_modules": "all-linear", "use_dora": True}),
    "dora head": ("llama", {"r": 3, "target_modules": ["lm_head", "v_proj"], "use_dora": True}),
    "head": ("llama", {"r": 4, "target_modules": ["lm_head", "v_proj"]}),
}


def pair(name: str):
    """PEFT's model and ours with the same base and the same, non-zero, adapter."""
    architecture, options = CASES[name][0], {"lora_alpha": 12, **CASES[name][1]}
    base = build(architecture)
    torch.manual_seed(5)
    peft = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    kind = Dora if options.pop("use_dora", False) else Lora
    ours = wrap(copy.deepcopy(base), None, kind(**options), FP32, CPU)
    choose_path(ours, 64)
    return peft, ours


def file_name(name: str) -> str:
    """What PEFT calls a parameter in its file."""
    plain = name.replace(".default", "").replace("modules_to_save.", "")
    return plain.removesuffix(".weight") if "magnitude_vector" in plain else plain


def gradients_of(peft) -> dict[str, torch.Tensor]:
    """Gradients of PEFT's model by the names of its files."""
    return {file_name(n): p.grad.clone() for n, p in peft.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", CASES)
def test_peft_adapter_loads_here_with_equal_loss_and_gradients(name, tmp_path):
    peft, ours = pair(name)
    peft.save_pretrained(str(tmp_path))
    ours.attached.load(load_adapter(tmp_path).tensors, str(tmp_path))
    expected = peft_loss(peft)
    expected.backward()
    loss = -ours.score(pack(rows())).logp.mean()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_equal_but_for_rounding({n: p.grad for n, p in ours.trainable().items()}, peft, gradients_of)


@pytest.mark.parametrize("name", ["all-linear", "dora", "dora conv1d"])
def test_six_steps_are_pefts_six_steps(name, tmp_path):
    """Also what is derived from A and B (DoRA's norms) follows every update of the fused optimizer."""
    peft, ours = pair(name)
    peft.save_pretrained(str(tmp_path))
    ours.attached.load(load_adapter(tmp_path).tensors, str(tmp_path))
    first = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=2e-3)
    second = find("optim", "adamw")().build(ours.trainable(), 2e-3, 0.01)
    curves = ([], [])
    for _ in range(6):
        for curve, optimizer, loss in (
            (curves[0], first, peft_loss(peft)),
            (curves[1], second, -ours.score(pack(rows())).logp.mean()),
        ):
            curve.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_adapter_saved_here_loads_in_peft_with_equal_logits(name, tmp_path):
    peft, ours = pair(name)
    with torch.no_grad():
        for parameter in ours.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    options = {"lora_alpha": 12, **CASES[name][1]}
    tensors = {k: p.detach() for k, p in ours.trainable().items()}
    save_adapter(tmp_path, {"task_type": "CAUSAL_LM", **options}, tensors, "base", dtype="fp32")
    loaded = PeftModel.from_pretrained(build(CASES[name][0]), str(tmp_path))
    assert set(read_peft(str(tmp_path))) == set(tensors)
    loss = -ours.score(pack(rows())).logp.mean()
    torch.testing.assert_close(loss, peft_loss(loaded), rtol=1e-5, atol=1e-6)


def test_off_is_the_model_as_loaded():
    for name in ("bias all", "modules_to_save", "embedding", "all-linear"):
        _, ours = pair(name)
        plain = wrap(build(CASES[name][0]), None, None, FP32, CPU)
        choose_path(plain, 64)
        with torch.no_grad():
            for parameter in ours.trainable().values():
                parameter.add_(0.3)
            before = ours.score(pack(rows())).logp
            with ours.adapter_off():
                off = ours.score(pack(rows())).logp
            after = ours.score(pack(rows())).logp
            expected = plain.score(pack(rows())).logp
        torch.testing.assert_close(off, expected, rtol=0, atol=1e-6)
        assert (before - off).abs().max() > 1e-3
        assert torch.equal(before, after)
