"""LoftQ: an adapter that starts by undoing the error of quantization (Li et al. 2023, arXiv:2310.08659)."""

import torch
from torch import Tensor

from shikomi.quant._quantized import Scheme, Stored


def loftq(weight: Tensor, scheme: Scheme, r: int, iterations: int = 1) -> tuple[Tensor, Tensor, Stored]:
    """A (r, in), B (out, r) in fp32 and Q so that Q + BA is near `weight` (out, in); algorithm 1.

    Alternates Q = q(W - BA) and BA = the r largest singular directions of W - Q. The adapter's own scale is 1 here: for
    a layer that computes Q x + s BA x, divide both A and B by sqrt(s).
    """
    wanted = weight.detach().float()
    rest, approximate = wanted, torch.empty_like(wanted)
    for _ in range(iterations):
        stored = scheme.quantize(rest, wanted.device)
        stored.write(approximate)
        left, values, right = torch.linalg.svd(wanted - approximate, full_matrices=False)
        root = values[:r].sqrt()
        a, b = root[:, None] * right[:r], left[:, :r] * root
        rest = wanted - b @ a
    return a, b.contiguous(), stored
