"""Starts of A and B that are a part of W0: PiSSA and OLoRA.

The papers take that part out of the base. Here the base stays as it was loaded and the start is subtracted inside the
update, s (B A - B0 A0): the same function, and "adapter off" is still the model as it was loaded. The final file is a
plain LoRA adapter of rank 2r, [A; A0] and [B, -B0], which needs no changed base.
"""

import torch
from torch import Tensor

from shikomi.quant._linear import Base

START = ("pissa", "olora")


def start_factors(kind: str, base: Base, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) in fp32 that stand for a part of W0.

    pissa (Meng et al. 2024, arXiv:2404.02948, eq. 3-4): the r principal singular vectors, each side times the root of
    the singular values. olora (Buyukakyuz 2024, arXiv:2406.01775): the first r columns of Q and rows of R, W0 = Q R,
    which like in PEFT the scaling multiplies.
    """
    if base.weight.device.type == "meta":
        return torch.empty(r, base.in_features), torch.empty(base.out_features, r)
    weight = base.full_weight().cpu()
    if kind == "pissa":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        root = (s[:r] / scaling).sqrt()
        return root[:, None] * v[:r], u[:, :r] * root
    q, rest = torch.linalg.qr(weight)
    return rest[:r].clone(), q[:, :r].clone()
