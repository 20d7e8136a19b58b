"""The MLP half in parts: where gate and up are not kept they exist for some rows at a time; nothing else changes."""

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, build

from shikomi.adapters.bottleneck import Bottleneck
from shikomi.adapters.dora import Dora
from shikomi.adapters.full import Full
from shikomi.adapters.lora import Lora
from shikomi.data.packing import Example, pack
from shikomi.model import fused_mlp
from shikomi.model.device import Dtypes
from shikomi.model.load import wrap
from shikomi.model.probe import choose_path
from shikomi.quant import _linear
from shikomi.quant._streaming import quantize_linears
from shikomi.quant.nf4 import Nf4

CPU, FP32 = torch.device("cpu"), torch.float32
ADAPTERS = {
    "lora": Lora(r=3, lora_dropout=0.3),
    "dora": Dora(r=3),
    "bottleneck": Bottleneck(reduction_factor=4),
    "full": Full(),
    "norms": Lora(r=3, target_modules=["down_proj"], modules_to_save=["post_attention_layernorm"]),
}


def row(tokens: int = 53):
    ids = np.random.default_rng(0).integers(3, VOCABULARY, tokens).astype(np.int32)
    return pack([Example(ids, np.arange(tokens) > 4, 0)])


def gradients(adapter, recompute, nf4: bool = False, begin=lambda: None) -> dict[str, torch.Tensor]:
    """Of every trained parameter, and the log-probabilities, of one row; `begin` is called before it is computed."""
    model = build("llama")
    if nf4:
        quantize_linears(model, Nf4(), FP32, CPU)
    lm = wrap(model, None, adapter, Dtypes(FP32, FP32), CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in lm.trainable().items():
            if not isinstance(adapter, Full) and "magnitude" not in name:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    choose_path(lm, 64)
    assert lm.path == "fused", lm.path_reason
    lm.recompute = recompute
    lm.bind_dropout(7)
    begin()
    logp = lm.score(row()).logp
    (-logp.mean()).backward()
    return {"logp": logp.detach()} | {name: p.grad.clone() for name, p in lm.trainable().items()}


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_parts_are_the_whole(name, nf4, monkeypatch):
    if nf4 and name == "full":
        pytest.skip("nothing is trained over few bits")
    monkeypatch.setattr(_linear, "MASK_ROWS", 8)
    whole = gradients(ADAPTERS[name], 0, nf4)
    monkeypatch.setattr(fused_mlp, "ROWS", 16)  # 53 rows: three parts and a rest of 5
    for recompute in (2, 1, "full"):
        parts = gradients(ADAPTERS[name], recompute, nf4)
        assert parts.keys() == whole.keys()
        for key, expected in whole.items():
            torch.testing.assert_close(parts[key], expected, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("recompute, wide", [(0, 53), (2, 16), ("full", 16)])
def test_no_more_rows_than_a_part_are_wide(recompute, wide, monkeypatch):
    """And a checkpointed layer multiplies with down once: its output is not needed a second time."""
    monkeypatch.setattr(_linear, "MASK_ROWS", 8)
    monkeypatch.setattr(fused_mlp, "ROWS", 16)
    seen: list[tuple[int, int]] = []
    original = fused_mlp.compute

    def spy(linears, x, first=0):
        seen.append((len(linears), len(x)))
        return original(linears, x, first)

    monkeypatch.setattr(fused_mlp, "compute", spy)
    gradients(Lora(r=3), recompute, begin=seen.clear)
    assert max(rows for _, rows in seen) == wide
    tokens = {count: sum(rows for linears, rows in seen if linears == count) for count in (1, 2)}
    assert tokens == {1: 2 * 53, 2: 2 * 53 * (1 if recompute == 0 else 2)}


def test_a_mask_in_parts_is_that_of_the_whole_and_is_made_once(monkeypatch):
    monkeypatch.setattr(_linear, "MASK_ROWS", 8)
    update = _linear.LowRank(torch.ones(2, 5), torch.ones(3, 2), 0.5, 11)
    x = torch.ones(20, 5)
    whole = _linear._kept(update, x, 0)
    assert torch.equal(torch.cat([_linear._kept(update, x[:16], 0), _linear._kept(update, x[16:], 16)]), whole)
    assert not torch.equal(whole[:8], whole[8:16]) and set(whole.unique().tolist()) == {0.0, 2.0}
    made = []
    original = _linear._kept
    monkeypatch.setattr(_linear, "_kept", lambda *args: (made.append(args), original(*args))[1])
    gradients(Lora(r=3, lora_dropout=0.5, target_modules=["down_proj"]), 0, begin=made.clear)
    assert len(made) == 4  # two layers, forward and backward
