"""GaLore's optimizer: what it keeps, what it frees, when it renews, and what it refuses."""

import gc

import pytest
import torch
from architectures import SPECS, VOCABULARY, build
from tiny_models import tiny_model
from torch import nn

from shikomi.adapters.full import Full
from shikomi.errors import BadInput
from shikomi.model.device import Dtypes
from shikomi.model.load import wrap
from shikomi.optim.galore import GaLore, ProjectedAdamW

CPU = torch.device("cpu")
FP32 = Dtypes(torch.float32, torch.float32)


def full(model):
    return wrap(model, None, Full(), FP32, CPU).trainable()


def gradients(trained, seed: int) -> None:
    """One backward that gives every parameter a random gradient."""
    generator = torch.Generator().manual_seed(seed)
    sum((p * torch.randn(p.shape, generator=generator)).sum() for p in trained.values()).backward()


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_state_is_as_small_as_promised_and_counted_right(proj_type, state_bits):
    """hidden 64, rank 16 = hidden / 4: at most 36% of AdamW's state on the projected matrices."""
    sizes = dict(hidden_size=64, intermediate_size=172, num_attention_heads=4, num_key_value_heads=4)
    trained = full(tiny_model("llama", **sizes))
    options = GaLore(rank=16, proj_type=proj_type, state_bits=state_bits)
    adamw = torch.optim.AdamW(trained.values())
    gradients(trained, 0)
    adamw.step()
    adamw.zero_grad()
    optimizer = options.build(trained, 1e-3, 0.0)
    gradients(trained, 0)
    optimizer.step()
    optimizer.zero_grad()

    def count(one, parameters):
        return sum(t.numel() * t.element_size() for p in parameters for t in one.state[p].values())

    projected = [p for p in trained.values() if p in optimizer.matrices]
    assert len(projected) == 2 * 7
    promised = options.state_bytes({name: p.shape for name, p in trained.items()})
    assert promised.projected == count(optimizer, projected)
    assert promised.projected_adamw == count(adamw, projected)
    assert promised.total == count(optimizer, trained.values())
    assert promised.total_adamw == count(adamw, trained.values())
    if proj_type == "std":
        assert promised.projected <= 0.36 * promised.projected_adamw
    assert promised.total < 0.72 * promised.total_adamw


def test_state_of_llama_2_7b_at_a_quarter_of_its_width():
    """The paper's 7B: without building it."""
    h, f, layers = 4096, 11008, 32
    shapes = {"model.embed_tokens.weight": (32000, h), "lm_head.weight": (32000, h), "model.norm.weight": (h,)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.self_attn.{n}_proj.weight": (h, h) for n in "qkvo"}
        shapes |= {f"model.layers.{i}.mlp.{n}_proj.weight": (f, h) for n in ("gate", "up")}
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (h, f)
        shapes |= {f"model.layers.{i}.{n}_layernorm.weight": (h,) for n in ("input", "post_attention")}
    found = GaLore(rank=1024).state_bytes(shapes)
    assert found.projected / found.projected_adamw == pytest.approx(0.323, abs=0.001)
    assert found.total_adamw == pytest.approx(8 * 6_738_415_616, rel=1e-6)
    assert found.total / found.total_adamw == pytest.approx(0.349, abs=0.001)
    eight = GaLore(rank=1024, state_bits=8).state_bytes(shapes)
    assert eight.total / eight.total_adamw == pytest.approx(0.141, abs=0.001)  # the projections stay in 32 bits


@pytest.mark.parametrize("architecture", SPECS)
def test_embeddings_and_heads_are_known_in_every_architecture(architecture):
    model = build(architecture)
    outer = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    trained = full(model)
    projected = set(GaLore(rank=2).build(trained, 1e-3, 0.0).matrices)
    assert not outer & projected
    matrices = {p for name, p in trained.items() if p.dim() == 2 and min(p.shape) > 2 and "wpe" not in name}
    assert projected == matrices - outer and len(projected) >= 2
    everything = set(GaLore(rank=2, project_embeddings=True).build(trained, 1e-3, 0.0).matrices)
    assert everything == {p for p in trained.values() if p.dim() == 2 and min(p.shape) > 2}


def start(options: GaLore, shape=(24, 16), seed: int = 0):
    parameter = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return parameter, options.build({"w": parameter}, 1e-2, 0.1)


def expect(optimizer: ProjectedAdamW, micro_batches: int) -> None:
    """What the loop says before the backward calls of a step."""
    for group in optimizer.param_groups:
        group["micro_batches"] = micro_batches


def test_a_full_gradient_is_freed_at_once_except_where_several_micro_batches_renew():
    trained = {f"layers.{i}.w.weight": nn.Parameter(torch.randn(24, 16)) for i in range(4)}
    optimizer = GaLore(rank=4, update_proj_gap=3).build(trained, 1e-2, 0.0)
    held = []
    for p in trained.values():
        p.register_post_accumulate_grad_hook(lambda _: held.append(sum(q.grad is not None for q in trained.values())))
    for step in range(5):
        micro_batches = 1 if step == 0 else 2
        expect(optimizer, micro_batches)
        held.clear()
        for index in range(micro_batches):
            gradients(trained, 10 * step + index)
        if step == 3:  # a renewal: the first micro-batch is kept in full, the second one frees it
            assert held == [1, 2, 3, 4, 3, 2, 1, 0]
        else:
            assert held == [0] * 4 * micro_batches
        low = [m.gradient.grad for m in optimizer.matrices.values()]
        assert [g.shape for g in low] == [(24, 4)] * 4
        optimizer.step()
        optimizer.zero_grad()
        assert all(m.gradient.grad is None for m in optimizer.matrices.values())
    stand_in = next(iter(optimizer.matrices.values())).gradient
    assert stand_in.untyped_storage().nbytes() == 4  # it has a shape and no memory


@pytest.mark.parametrize("gap", [1, 2, 100])
def test_micro_batches_add_up_to_one_batch(gap):
    found = []
    for parts in (1, 3):
        p, optimizer = start(GaLore(rank=4, update_proj_gap=gap))
        for step in range(4):
            expect(optimizer, parts)
            generator = torch.Generator().manual_seed(step)
            directions = torch.randn(3, *p.shape, generator=generator).split(3 // parts)
            for part in directions:
                (p * part.sum(0)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(p.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_renewals_come_every_gap_steps_and_a_step_that_is_not_made_does_not_count():
    p, optimizer = start(GaLore(rank=4, update_proj_gap=3))
    renewed = []
    for step in range(7):
        before = optimizer.state[p].get("right")
        gradients({"w": p}, step)
        if step == 3:  # thrown away, as after an out-of-memory or an overflow: the next one renews again
            optimizer.zero_grad()
            gradients({"w": p}, 100)
        renewed.append(before is None or not torch.equal(before, optimizer.state[p]["right"]))
        optimizer.step()
        optimizer.zero_grad()
    assert renewed == [True, False, False, True, False, False, True]
    assert int(optimizer.state[p]["step"]) == 7


def test_a_parameter_that_some_micro_batches_miss_still_learns():
    p, optimizer = start(GaLore(rank=4))
    expect(optimizer, 2)
    (p * torch.ones_like(p)).sum().backward()  # announced twice, seen once: the gradient waits in full
    assert p.grad is not None
    before = p.detach().clone()
    optimizer.step()
    assert p.grad is None and not torch.equal(before, p)


def test_a_tied_embedding_is_counted_once_a_backward():
    model = build("llama-tied")
    trained = full(model)
    options = GaLore(rank=4, project_embeddings=True)
    optimizer = options.build(trained, 1e-3, 0.0)
    expect(optimizer, 2)
    weight = model.get_input_embeddings().weight
    ids = torch.arange(VOCABULARY)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert optimizer.matrices[weight].seen == 1 and weight.grad is not None


def test_fp16_scaling_is_undone_and_an_overflow_makes_no_step():
    found = []
    for scale in (1.0, 1024.0):
        p, optimizer = start(GaLore(rank=4, update_proj_gap=2))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        for step in range(4):
            if step == 2 and scale > 1:
                before, state = p.detach().clone(), optimizer.state[p]["right"].clone()
                (p * torch.full_like(p, torch.inf)).sum().backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update(scale)
                optimizer.zero_grad()
                assert torch.equal(before, p) and torch.equal(state, optimizer.state[p]["right"])
            direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            scaler.scale((p * direction).sum()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grads_with_norm_([m.gradient for m in optimizer.matrices.values()], 1.0, torch.tensor(4.0))
            scaler.step(optimizer)
            scaler.update(scale)
            optimizer.zero_grad()
        found.append(p.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_hooks_go_with_the_optimizer():
    """A later stage's optimizer must find full gradients again."""
    p, optimizer = start(GaLore(rank=4))
    gradients({"w": p}, 0)
    optimizer.step()
    del optimizer
    gc.collect()
    assert not p._post_accumulate_grad_hooks
    gradients({"w": p}, 1)
    assert p.grad is not None


def test_an_adapter_is_refused_with_the_nearest_choice():
    for name in ("base_model.model.model.layers.0.q_proj.lora_A.weight", "prompt_embeddings", "transform.0.weight"):
        with pytest.raises(BadInput, match="adapter: full") as refused:
            GaLore().build({name: nn.Parameter(torch.ones(4, 8))}, 1e-3, 0.0)
        assert "optim: adamw" in str(refused.value) and name in str(refused.value)


def test_eight_bits_without_bitsandbytes_are_refused(no_bitsandbytes):
    with pytest.raises(BadInput, match=r"8-bit optimizer state needs bitsandbytes.*or use optim.state_bits: 32"):
        start(GaLore(state_bits=8))
