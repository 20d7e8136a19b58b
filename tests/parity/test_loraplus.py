"""LoRA+ against PEFT's create_loraplus_optimizer: who learns how fast, and the same curve."""

import copy

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, build
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from shikomi.adapters.lora import Lora
from shikomi.data.packing import Example, pack
from shikomi.model.device import Dtypes
from shikomi.model.load import wrap
from shikomi.model.probe import choose_path
from shikomi.optim.adamw import AdamW

LR, RATIO, DECAY = 2e-3, 16.0, 0.05
CASES = {
    "all-linear": ("llama", {"target_modules": "all-linear"}, None),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}, None),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}, None),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}, 3e-4),
    "biases": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}, None),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}, None),
}


def peft_model(case: str):
    architecture, options, _ = CASES[case]
    torch.manual_seed(3)
    return get_peft_model(build(architecture), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options))


def peft_optimizer(model, lr_embedding: float | None) -> torch.optim.Optimizer:
    more = {} if lr_embedding is None else {"loraplus_lr_embedding": lr_embedding}
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY, **more
    )


def file_name(name: str) -> str:
    """PEFT's name of a parameter in its file."""
    name = name.replace(".modules_to_save.default", "").replace(".default", "")
    return name.removesuffix(".weight") if "magnitude_vector" in name else name


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_learns_at_the_rate_that_peft_gives_it(case):
    model, lr_embedding = peft_model(case), CASES[case][2]
    trained = {file_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    options = AdamW(loraplus_lr_ratio=RATIO, loraplus_lr_embedding=lr_embedding)
    ours = options.build(trained, LR, DECAY)

    def settings(optimizer):
        return {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}

    found, theirs = settings(ours), settings(peft_optimizer(model, lr_embedding))
    assert found.keys() == theirs.keys() and len(found) == len(trained)
    for name, p in trained.items():
        assert found[p][0] == pytest.approx(theirs[p][0], rel=1e-12), name
        assert found[p][1] == (DECAY if p.dim() > 1 else 0.0), name  # PEFT decays also some vectors: magnitudes, norms
        assert p.dim() <= 1 or found[p][1] == theirs[p][1], name
    for group in ours.param_groups:  # what the loop multiplies the rate of a step with
        assert group["lr"] == pytest.approx(LR * group["ratio"])
    assert len({lr for lr, _ in found.values()}) == (3 if lr_embedding else 2)


@pytest.mark.parametrize("case", ["all-linear", "rslora", "embedding", "biases"])
def test_the_curve_is_pefts(case):
    architecture, options, lr_embedding = CASES[case]
    theirs = peft_model(case)
    ours = wrap(build(architecture), None, Lora(r=4, lora_alpha=8, **options), Dtypes(torch.float32, torch.float32),
                torch.device("cpu"))  # fmt: skip
    choose_path(ours, 64)
    named = {file_name(n): p for n, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in ours.trainable().items():
            parameter.copy_(named[name])
    mine = AdamW(loraplus_lr_ratio=RATIO, loraplus_lr_embedding=lr_embedding).build(ours.trainable(), LR, DECAY)
    other = peft_optimizer(theirs, lr_embedding)
    ids = np.random.default_rng(1).integers(3, VOCABULARY, (12, 24)).astype(np.int32)
    for row in ids:
        packed = pack([Example(row, np.arange(24) > 0, 0)])
        loss = -ours.score(packed).logp.mean()
        batch = torch.from_numpy(row.astype(np.int64))[None]
        expected = theirs(input_ids=batch, labels=batch).loss
        torch.testing.assert_close(loss, expected, rtol=2e-4, atol=2e-5)
        for value, optimizer in ((loss, mine), (expected, other)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for name, parameter in ours.trainable().items():
        torch.testing.assert_close(parameter, named[name], rtol=1e-3, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_b_is_the_one_that_is_faster():
    """Adam's first step is as long as the rate: so many times longer for B."""
    a, b = (torch.nn.Parameter(torch.zeros(3, 5)) for _ in range(2))
    names = {"base_model.model.q_proj.lora_A.weight": a, "base_model.model.q_proj.lora_B.weight": b}
    optimizer = AdamW(loraplus_lr_ratio=8).build(copy.copy(names), 0.01, 0.0)
    for p in (a, b):
        p.grad = torch.full_like(p, 0.3)
    optimizer.step()
    assert a.abs().mean().item() == pytest.approx(0.01, rel=1e-4)
    assert b.abs().mean().item() == pytest.approx(0.08, rel=1e-4)
