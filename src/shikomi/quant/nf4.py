"""NF4: 4-bit NormalFloat with double quantization (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3)."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from shikomi.quant import _bnb


@dataclass(frozen=True)
class Nf4:
    """W = table[code] * absmax of its block; the table holds quantiles of a normal distribution.

    Codes, scales and files are those of bitsandbytes.
    """

    name: ClassVar[str] = "nf4"
    kind: ClassVar[_bnb.Kind] = "nf4"

    double_quant: Annotated[bool, Field(description="scales are stored in 8 bits: 4.13 bits per weight, not 4.5")] = (
        True
    )
    block_size: Annotated[
        Literal[32, 64, 128, 256, 512, 1024, 2048, 4096], Field(description="weights that share one scale")
    ] = 64

    @property
    def bits(self) -> float:
        return _bnb.bits(self.block_size, self.double_quant)

    def quantize(self, weight: Tensor, device: torch.device) -> _bnb.FourBit:
        """Raises BadInput where bitsandbytes is missing or does not serve the device."""
        return _bnb.quantize(weight, self.kind, self.block_size, self.double_quant, device)
