"""LoftQ: an adapter that starts by undoing the error of quantization (Li et al. 2023, arXiv:2310.08659)."""

from typing import ClassVar, Self

import torch
from torch import Tensor

from shikomi.quant._quantized import Scheme, Stored


class Corrected:
    """A stored weight with A (r, in) and B (out, r) that undo the error of storing it; an adapter takes these."""

    def __init__(self, stored: Stored, a: Tensor, b: Tensor):
        self.stored, self.a, self.b = stored, a, b

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape

    @property
    def codes(self) -> Tensor:
        return self.stored.codes

    @property
    def options(self) -> dict[str, object]:
        return self.stored.options

    def write(self, into: Tensor) -> None:
        self.stored.write(into)

    def tensors(self) -> dict[str, Tensor]:
        return self.stored.tensors()

    def to(self, device: torch.device) -> Self:
        return type(self)(self.stored.to(device), self.a.to(device), self.b.to(device))


class Correcting:
    """A scheme that makes, with each weight that it stores, the start of an adapter of rank r."""

    name: ClassVar[str] = "loftq"

    def __init__(self, scheme: Scheme, r: int, iterations: int):
        self.scheme, self.r, self.iterations = scheme, r, iterations

    @property
    def bits(self) -> float:
        return self.scheme.bits

    def quantize(self, weight: Tensor, device: torch.device) -> Corrected:
        a, b, stored = loftq(weight, self.scheme, self.r, self.iterations)
        return Corrected(stored.to(device), a.to(device), b.to(device))


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
