"""Starts of A and B: PiSSA and OLoRA are a part of W0, LoftQ undoes what storing W0 in few bits lost.

The papers of the first two take that part out of the base. Here the base stays as it was loaded and the start is
subtracted inside the update, s (B A - B0 A0): the same function, and "adapter off" is still the model as it was loaded.
The final file is a plain LoRA adapter of rank 2r, [A; A0] and [B, -B0], which needs no changed base.
"""

import torch
from torch import Tensor

from shikomi.errors import BadInput, Problem
from shikomi.quant._linear import Base
from shikomi.quant._loftq import Corrected
from shikomi.quant._quantized import Quantized

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


def taken_correction(base: Base, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) that loading made while it stored the base in few bits (`quant/_loftq.py`).

    The correction is taken: the base keeps only its codes. Raises BadInput where there is none.
    """
    if base.weight.device.type == "meta":
        return torch.empty(r, base.in_features), torch.empty(base.out_features, r)
    if not (isinstance(base, Quantized) and isinstance(base.stored, Corrected)):
        fix = "quant: nf4, over a model folder that is not quantized yet"
        what = "init_lora_weights: loftq undoes the error of quantization, and there is none"
        raise BadInput([Problem(what, fix=fix)])
    corrected = base.stored
    base.stored = corrected.stored
    return corrected.a[:r] / scaling**0.5, corrected.b[:, :r] / scaling**0.5
