"""How long training will take: the rate of matrix products on this machine, measured, against the FLOP of a token."""

import time
from pathlib import Path

import torch

from shikomi.errors import Problem
from shikomi.model import catalog
from shikomi.model.check import weight_shapes
from shikomi.model.device import choose_device, choose_dtypes

SHARE = 0.5
"""Of the rate of large matrix products, what training reaches: attention, norms and the head take the rest."""

FLOP_ADAPTER = 4  # per parameter and token: the products of the forward, and of the gradient of the activations
FLOP_FULL = 6  # and those of the gradient of the weights

_ROWS, _WIDTH = 1024, 1024  # the shape of a micro-batch's product with a layer of a small model
_SECONDS = 0.3


def product_rate(device_name: str = "auto") -> float:
    """FLOP/s of matrix products as training would do them here, the best of some runs over 0.3 seconds."""
    device = choose_device(device_name)
    dtype = choose_dtypes("auto", device).arithmetic
    a = torch.ones(_ROWS, _WIDTH, dtype=dtype, device=device)
    b = torch.ones(_WIDTH, _WIDTH, dtype=dtype, device=device)
    torch.mm(a, b).sum().item()
    best, end = 0.0, time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)[0, 0].item()  # .item() waits for a GPU
        best = max(best, 2 * _ROWS * _WIDTH * _WIDTH / (time.perf_counter() - start))
    return best


def known_parameters(model: str) -> int | None:
    """Parameters of an alias or of a folder with weights, without loading any; None where that is not known."""
    if model in catalog.ALIASES:
        return catalog.ALIASES[model].parameters
    problems: list[Problem] = []
    if not Path(model).is_dir():
        return None
    shapes = weight_shapes(Path(model), problems)
    return sum(torch.Size(shape).numel() for shape in shapes.values()) or None


def training_seconds(tokens: float, parameters: int, rate: float, full: bool = False) -> float:
    """Seconds of training for `tokens` tokens at `rate` FLOP/s."""
    return tokens * parameters * (FLOP_FULL if full else FLOP_ADAPTER) / (rate * SHARE)
