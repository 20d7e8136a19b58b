"""What every component of a kind must do; new files are found by the registry and tested without a change here."""

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, build
from preference_records import loss, micro_batches
from torch import nn

from shikomi import registry
from shikomi.adapters.full import Full
from shikomi.checkpoint.merge import merge, merge_weights
from shikomi.data.packing import Example, pack
from shikomi.errors import BadInput
from shikomi.model.device import Dtypes
from shikomi.model.load import wrap
from shikomi.model.probe import choose_path
from shikomi.objectives._objective import divided
from shikomi.steps.hooks import checkpoint_tensors, restore_trained

FP32 = Dtypes(torch.float32, torch.float32)


OBJECTIVES = registry.names("objectives")


def trained(objective, scored) -> torch.Tensor:
    """The leaf of the record that the objective moves."""
    return scored.value if "value" in objective.needs else scored.logp


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_says_what_it_is_given(name):
    objective = registry.find("objectives", name)()
    assert objective.name == name
    assert objective.data in ("conversations", "pairs", "thumbs")
    assert objective.needs <= {"ref_logp", "prompt_logp", "value", "kl"}
    assert objective.data != "conversations" or not objective.needs


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_additive_over_micro_batches(name):
    objective = registry.find("objectives", name)()
    whole, parts, counts = micro_batches(objective.data)
    outcome = objective(whole)
    together = loss(outcome, counts)
    assert torch.isfinite(together)
    split = torch.stack([loss(objective(part), counts) for part in parts]).sum()
    torch.testing.assert_close(split, together)
    leaf = trained(objective, whole)
    torch.testing.assert_close(torch.autograd.grad(split, leaf), torch.autograd.grad(together, leaf))
    sums: dict[str, torch.Tensor] = {}
    for part in parts:
        for key, value in divided(objective(part).metrics, counts).items():
            sums[key] = sums.get(key, torch.zeros(())) + value
    torch.testing.assert_close(sums, divided(outcome.metrics, counts))
    assert not any(term.total.requires_grad for term in outcome.metrics.values())
    assert all(a in sums and b in sums for a, b in outcome.differences.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_minimizing_an_objective_raises_what_is_to_be_learned(name):
    objective = registry.find("objectives", name)()
    whole, _, counts = micro_batches(objective.data)
    leaf = trained(objective, whole)
    before, start = leaf.detach().clone(), loss(objective(whole), counts)
    for _ in range(20):
        (grad,) = torch.autograd.grad(loss(objective(whole), counts), leaf)
        leaf.data.sub_(0.05 * grad / grad.abs().max())
        if leaf is whole.logp:
            leaf.data.clamp_(max=-1e-3)
    assert loss(objective(whole), counts) < start
    moved = leaf.detach() - before
    if objective.data == "conversations":
        assert (moved > 0).all()
        return
    of = torch.arange(len(leaf)) if leaf is whole.value else whole.segment
    assert moved[torch.isin(of, whole.chosen)].mean() > moved[torch.isin(of, whole.rejected)].mean()


ADAPTERS = registry.names("adapters")


def model_with(options):
    """A tiny Llama with an adapter on it, the same at every call."""
    lm = wrap(build("llama"), None, options, FP32, torch.device("cpu"))
    choose_path(lm, 64)
    return lm


def row():
    ids = np.random.default_rng(0).integers(3, VOCABULARY, 20).astype(np.int32)
    return pack([Example(ids, np.arange(20) > 4, 0)])


def eight_steps(lm) -> None:
    """Trains on the row."""
    optimizer = registry.find("optim", "adamw")().build(lm.trainable(), 1e-2, 0.0)
    for _ in range(8):
        optimizer.zero_grad()
        (-lm.score(row()).logp.mean()).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_starts_as_it_says_and_trains_and_off_is_the_model_as_loaded(name):
    options = registry.find("adapters", name)()
    assert options.name == name
    lm, plain = model_with(options), model_with(None)
    first, base = lm.score(row()).logp.detach(), plain.score(row()).logp
    starts = torch.allclose(first, base, rtol=1e-5, atol=1e-5)
    assert starts is options.capabilities.starts_as_base
    context = lm.context
    assert (context is not None) is options.capabilities.context
    if context is not None:  # what the head gets stays one row a token, for all that comes before
        assert context.tokens > 0 and len(lm.hidden(row())) == 20
    eight_steps(lm)
    assert lm.score(row()).logp.mean() > first.mean() + 0.1
    if not isinstance(options, Full):
        with lm.adapter_off():
            assert lm.context is None
            torch.testing.assert_close(lm.score(row()).logp, base, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_state_of_an_adapter_goes_round(name, tmp_path):
    options = registry.find("adapters", name)()
    lm, again, third = model_with(options), model_with(options), model_with(options)
    eight_steps(lm)
    expected = lm.score(row()).logp
    restore_trained(again, {k: t.clone() for k, t in checkpoint_tensors(lm).items()}, tmp_path)
    assert torch.equal(again.score(row()).logp, expected)
    if lm.attached is not None:
        third.attached.load({k: t.clone() for k, t in lm.attached.export()[1].items()}, "a file")
        torch.testing.assert_close(third.score(row()).logp, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_merges_where_it_says_so(name, tmp_path):
    options = registry.find("adapters", name)()
    lm = model_with(options)
    eight_steps(lm)
    expected = lm.score(row()).logp
    if options.capabilities.mergeable:
        merge_weights(lm, torch.float32)
        assert not any(module.enabled for module in lm.attached.lora.values())
        torch.testing.assert_close(lm.score(row()).logp, expected, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(BadInput, match="there is no adapter to merge" if name == "full" else "cannot be merged"):
            merge(lm, tmp_path / "merged")


@pytest.mark.parametrize("name", registry.names("optim"))
def test_an_optimizer_lowers_a_quadratic_and_its_state_is_named(name):
    optim = registry.find("optim", name)()
    parameter = nn.Parameter(torch.ones(4, 4))
    if name == "paged":  # a test with the shape of its memory is in tests/optim
        with pytest.raises(BadInput, match="needs the managed memory of CUDA"):
            optim.build({"w": parameter}, 0.1, 0.0)
        return
    optimizer = optim.build({"w": parameter}, 0.1, 0.0)
    for _ in range(20):
        optimizer.zero_grad()
        parameter.square().sum().backward()
        optimizer.step()
    assert parameter.abs().max() < 0.5 and optimizer.state[parameter]
