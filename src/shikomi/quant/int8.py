"""INT8: one scale per output row, the weight format of LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339)."""

from dataclasses import dataclass as plain_dataclass
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from shikomi.errors import BadInput, Problem

SLICE = 1 << 18  # elements that are converted at a time
STEP = 7.874015718698502e-3  # 1 / 127, as bitsandbytes writes it


@plain_dataclass(frozen=True, eq=False)
class RowInt8:
    """A weight (out, in) as W = code * absmax of its row / 127."""

    shape: tuple[int, int]
    weight: Tensor  # (out, in) int8
    absmax: Tensor  # (out,) fp32

    @property
    def codes(self) -> Tensor:
        return self.weight

    @property
    def options(self) -> dict[str, object]:
        return {"name": "int8"}

    def write(self, into: Tensor) -> None:
        """Dequantizes into an (out, in) buffer: the product in fp32, rounded to the buffer's dtype."""
        assert tuple(into.shape) == self.shape
        for rows in _slices(self.shape):
            into[rows] = self.weight[rows] * self.absmax[rows, None] * STEP

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "SCB": self.absmax}

    def to(self, device: torch.device) -> "RowInt8":
        return RowInt8(self.shape, self.weight.to(device), self.absmax.to(device))


@dataclass(frozen=True)
class Int8:
    """Weights in 8 bits; what they multiply is not quantized, so there are no outlier columns to set apart."""

    name: ClassVar[str] = "int8"

    @property
    def bits(self) -> float:
        return 8.0

    def quantize(self, weight: Tensor, device: torch.device) -> RowInt8:
        """round(127 W / absmax), half to even, in fp32. Raises BadInput for weights that are not finite."""
        out, width = weight.shape
        codes = torch.empty(out, width, dtype=torch.int8, device=device)
        absmax = torch.empty(out, device=device)
        for rows in _slices((out, width)):
            part = weight[rows].to(device, torch.float32)
            absmax[rows] = part.abs().amax(1)
            scale = torch.where(absmax[rows] > 0, 127.0 / absmax[rows], 0.0)  # a row of zeros stays one
            codes[rows] = part.mul(scale[:, None]).round_().to(torch.int8)
        if not bool(absmax.isfinite().all()):
            raise BadInput([Problem("quant: int8: a weight holds NaN or infinite numbers", fix="use intact weights")])
        return RowInt8((out, width), codes, absmax)


def _slices(shape: tuple[int, int]) -> list[slice]:
    rows = max(1, SLICE // max(1, shape[1]))
    return [slice(first, first + rows) for first in range(0, shape[0], rows)]
