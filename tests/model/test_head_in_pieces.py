"""A head whose widened weight would be large is widened in pieces: the same log-probabilities and gradients."""

import pytest
import torch
from torch import nn

from shikomi.model import logprobs
from shikomi.model.logprobs import Shape, log_probabilities, pieces
from shikomi.quant._dense import Dense


def scored(head, shape):
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(70, 16, generator=generator).requires_grad_()
    rows = torch.arange(2, 70)
    targets = torch.randint(0, 101, (68,), generator=generator)
    logp = log_probabilities(h, rows, targets, head, shape)
    (logp * torch.linspace(0.1, 1, 68)).sum().backward()
    return logp.detach(), h.grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [Shape(), Shape(2.0, 5.0)], ids=["plain", "capped"])
def test_pieces_are_the_whole(bias, shape, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(101, 16, generator=generator).bfloat16(), requires_grad=False)
    b = nn.Parameter(torch.randn(101, generator=generator).bfloat16(), requires_grad=False) if bias else None
    head = Dense(weight, b, torch.float32)
    assert pieces(head) == [slice(0, 101)]
    expected = scored(head, shape)
    monkeypatch.setattr(logprobs, "WIDENED", 40 * 16 * 4)
    assert pieces(head) == [slice(0, 40), slice(40, 80), slice(80, 101)]
    widened = []
    original = logprobs.upcast
    monkeypatch.setattr(logprobs, "upcast", lambda w, dtype: (widened.append(len(w)), original(w, dtype))[1])
    found = scored(head, shape)
    assert max(widened) == 40 and widened[:3] == [40, 40, 21]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_head_in_its_own_arithmetic_is_never_copied(monkeypatch):
    monkeypatch.setattr(logprobs, "WIDENED", 64)
    head = Dense(nn.Parameter(torch.randn(101, 16), requires_grad=False), None, torch.float32)
    assert pieces(head) == [slice(0, 101)]
