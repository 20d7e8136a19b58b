"""Schedules, groups of parameters, devices: the small parts of the loop."""

import math

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from shikomi.errors import BadInput
from shikomi.model.device import choose_device, choose_dtypes
from shikomi.optim._schedule import factor, warmup
from shikomi.optim.adamw import AdamW
from shikomi.train.state import better


@pytest.mark.parametrize(
    "kind, reference", [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
def test_schedules_are_those_of_transformers(kind, reference):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = reference(optimizer, num_warmup_steps=0, num_training_steps=10)
    for step in range(10):
        assert factor(kind, step, 10, 0) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


def test_warm_up_rises_and_wsd_stays_then_falls():
    assert [warmup(w, 200) for w in (0, 0.03, 5)] == [0, 6, 5]
    rising = [factor("constant", s, 100, 4) for s in range(5)]
    assert rising == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    wsd = [factor("wsd", s, 100, 0) for s in range(100)]
    assert (
        wsd[:80] == [1.0] * 80 and wsd[80] == 1.0 and wsd[90] == pytest.approx(0.5) and wsd[99] == pytest.approx(0.05)
    )
    with pytest.raises(ValueError, match="unknown schedule"):
        factor("cosin", 5, 10, 0)


def test_weight_decay_goes_to_matrices_only():
    matrix, vector = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW().build({"m": matrix, "v": vector}, 0.1, 0.5)
    for p in (matrix, vector):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((3, 3), 0.95)) and torch.equal(vector, torch.ones(3))


def test_devices_and_dtypes():
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    cpu = torch.device("cpu")
    assert choose_dtypes("fp32", cpu) == (torch.float32, torch.float32)
    assert choose_dtypes("auto", cpu).storage == torch.bfloat16
    with pytest.raises(BadInput, match="fp16"):
        choose_dtypes("fp16", cpu)
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="cuda"):
            choose_device("cuda")


def test_losses_are_better_when_small_and_scores_when_large():
    assert better("eval_loss", 1.0, 2.0) and not better("eval_loss", 2.0, 1.0)
    assert better("eval_accuracy", 0.9, 0.5) and better("eval_loss", math.inf, None)
