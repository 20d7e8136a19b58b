"""What must not change a gradient: micro-batches, packing, shared prefixes, recomputation, storage of nothing."""

import numpy as np
import pytest
import torch
from architectures import EXPECTED, VOCABULARY, build

from shikomi.adapters.full import Full
from shikomi.adapters.lora import Lora
from shikomi.data.packing import Example, pack, pack_tree
from shikomi.model.device import Dtypes
from shikomi.model.load import wrap
from shikomi.model.probe import choose_path
from shikomi.objectives.sft import Sft
from shikomi.train.step import gradients, plan_step

FP32 = Dtypes(torch.float32, torch.float32)
MIXED = Dtypes(torch.bfloat16, torch.float32)
BF16 = Dtypes(torch.bfloat16, torch.bfloat16)


def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    prefix = rng.integers(3, VOCABULARY, 18).astype(np.int32)
    found = []
    for row, length in enumerate((30, 22, 41, 9, 27, 160)):
        ids = rng.integers(3, VOCABULARY, length).astype(np.int32)
        if length > 20:
            ids[:18] = prefix
        mask = np.zeros(length, bool)
        mask[-(2 + row * 3) :] = True
        mask[0] = False
        found.append(Example(ids, mask, row))
    return found


def model(name: str, adapter, dtypes: Dtypes = FP32):
    base = build(name).to(dtypes.storage)
    lm = wrap(base, None, adapter, dtypes, torch.device("cpu"))
    choose_path(lm, 64)
    with torch.no_grad():
        for p in lm.trainable().values() if lm.attached else ():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    return lm


def step(lm, micro_batch_tokens: int, share_prefix: bool) -> tuple[float, dict[str, torch.Tensor]]:
    for p in lm.trainable().values():
        p.grad = None
    plan = plan_step(examples(), micro_batch_tokens, share_prefix)
    sums = gradients(lm, Sft(), plan, key=1)
    return float(sums["loss"]), {n: p.grad for n, p in lm.trainable().items() if p.grad is not None}


def close(got: dict, want: dict, tolerance: float) -> None:
    assert set(got) == set(want) and got
    for name, grad in want.items():
        gap = float((got[name] - grad).norm() / grad.norm().clamp_min(1e-9))
        assert gap < tolerance, f"{name}: {gap}"


@pytest.mark.parametrize("name", sorted(EXPECTED))
@pytest.mark.parametrize("adapter", [Lora(r=3, target_modules="all-linear"), Full()], ids=["lora", "full"])
def test_micro_batches_packing_and_prefixes_change_nothing(name, adapter):
    lm = model(name, adapter)
    loss, whole = step(lm, 10_000, share_prefix=False)
    for tokens, share in ((8, False), (64, True), (10_000, True)):
        other, grads = step(lm, tokens, share)
        assert other == pytest.approx(loss, rel=1e-5)
        close(grads, whole, 2e-4)


@pytest.mark.parametrize("recompute", [1, 2, "full"])
def test_recomputation_gives_the_same_bits(recompute):
    lm = model("qwen3", Lora(r=3, lora_dropout=0.2))
    loss, kept = step(lm, 64, True)
    lm.recompute = recompute
    again, grads = step(lm, 64, True)
    assert again == loss
    assert all(torch.equal(grads[n], kept[n]) for n in kept)


def test_dropout_masks_follow_the_key_alone():
    lm = model("llama", Lora(r=3, lora_dropout=0.5))
    first, _ = step(lm, 64, True)
    second, _ = step(lm, 64, True)
    assert first == second
    plain, _ = step(model("llama", Lora(r=3)), 64, True)
    assert first != plain


def test_bf16_storage_keeps_fp32_arithmetic_exact_forward():
    """Weights that are bf16 anyway: the same loss to the bit, gradients within bf16's rounding of activations."""
    lm = model("llama", Lora(r=3), MIXED)
    reference = build("llama").to(torch.bfloat16).to(torch.float32)
    wide = wrap(reference, None, Lora(r=3), FP32, torch.device("cpu"))
    choose_path(wide, 64)
    with torch.no_grad():
        for name, p in wide.trainable().items():
            p.copy_(lm.trainable()[name])
    loss, exact = step(wide, 64, True)
    stored, grads = step(lm, 64, True)
    assert stored == pytest.approx(loss, rel=1e-6)
    close(grads, exact, 0.02)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mixtral"])
def test_bf16_arithmetic_is_near(name):
    loss, exact = step(model(name, Lora(r=3)), 64, True)
    near, grads = step(model(name, Lora(r=3), BF16), 64, True)
    assert near == pytest.approx(loss, rel=0.05)
    total = torch.stack([(grads[n] - g).norm() ** 2 for n, g in exact.items()]).sum().sqrt()
    assert total / torch.stack([g.norm() ** 2 for g in exact.values()]).sum().sqrt() < 0.3


def test_a_tree_scores_as_its_branches_do():
    lm = model("llama", None)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, VOCABULARY, n).tolist() for n in (20, 7)]
    prompts.append(prompts[0][:18] + [5, 6])
    answers = [[rng.integers(3, VOCABULARY, n).tolist() for n in (1, 3, 2)] for _ in prompts]
    with torch.no_grad():
        together = lm.score(pack_tree(prompts, answers))
        number = 0
        for prompt, several in zip(prompts, answers, strict=True):
            for answer in several:
                ids = np.array(prompt + answer, np.int32)
                alone = lm.score(pack([Example(ids, np.arange(len(ids)) >= len(prompt), 0)])).logp
                torch.testing.assert_close(together.logp[together.segment == number], alone, rtol=1e-4, atol=1e-5)
                number += 1
