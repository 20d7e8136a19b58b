"""What every component of a kind must do; new files are found by the registry and tested without a change here."""

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, build
from torch import nn

from shikomi import registry
from shikomi.adapters.full import Full
from shikomi.data.packing import Example, pack
from shikomi.model.device import Dtypes
from shikomi.model.load import wrap
from shikomi.model.logprobs import Scored
from shikomi.model.probe import choose_path

FP32 = Dtypes(torch.float32, torch.float32)


def scored(segments: list[int], seed: int = 0) -> Scored:
    """Random log-probabilities of so many tokens per segment."""
    generator = torch.Generator().manual_seed(seed)
    logp = -torch.rand(sum(segments), generator=generator) * 3 - 0.1
    ids = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments))
    return Scored(logp.requires_grad_(), ids)


def loss(outcome, counts: dict[str, int]) -> torch.Tensor:
    parts = [t.total * (t.coefficient / counts[t.weight]) for t in outcome.terms.values()]
    return torch.stack(parts).sum()


@pytest.mark.parametrize("name", registry.names("objectives"))
def test_an_objective_is_additive_and_lowers_when_probabilities_rise(name):
    objective = registry.find("objectives", name)()
    whole = scored([3, 5, 2])
    counts = {"tokens": 10, "sequences": 3}
    together = loss(objective(whole), counts)
    assert torch.isfinite(together)
    parts = [Scored(whole.logp[whole.segment == i], whole.segment[whole.segment == i] * 0) for i in range(3)]
    split = torch.stack([loss(objective(part), counts) for part in parts]).sum()
    torch.testing.assert_close(split, together)
    (grad,) = torch.autograd.grad(together, whole.logp)
    assert (grad < 0).all()


@pytest.mark.parametrize("name", registry.names("adapters"))
def test_an_adapter_starts_as_the_model_itself_and_trains(name):
    options = registry.find("adapters", name)()
    lm = wrap(build("llama"), None, options, FP32, torch.device("cpu"))
    choose_path(lm, 64)
    plain = wrap(build("llama"), None, None, FP32, torch.device("cpu"))
    choose_path(plain, 64)
    ids = np.random.default_rng(0).integers(3, VOCABULARY, 20).astype(np.int32)
    packed = pack([Example(ids, np.arange(20) > 4, 0)])
    first = lm.score(packed).logp
    torch.testing.assert_close(first.detach(), plain.score(packed).logp, rtol=1e-5, atol=1e-5)
    optimizer = registry.find("optim", "adamw")().build(lm.trainable(), 1e-2, 0.0)
    for _ in range(8):
        optimizer.zero_grad()
        (-lm.score(packed).logp.mean()).backward()
        optimizer.step()
    assert lm.score(packed).logp.mean() > first.mean() + 0.1
    if not isinstance(options, Full):
        with lm.adapter_off():
            torch.testing.assert_close(lm.score(packed).logp, plain.score(packed).logp, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", registry.names("optim"))
def test_an_optimizer_lowers_a_quadratic_and_its_state_is_named(name):
    optim = registry.find("optim", name)()
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = optim.build({"w": parameter}, 0.1, 0.0)
    for _ in range(20):
        optimizer.zero_grad()
        parameter.square().sum().backward()
        optimizer.step()
    assert parameter.abs().max() < 0.5 and optimizer.state[parameter]
