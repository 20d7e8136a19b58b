"""FP4: 4-bit floating point with double quantization, as bitsandbytes has it; NF4 loses less (arXiv:2305.14314)."""

from typing import ClassVar

from pydantic.dataclasses import dataclass

from shikomi.quant import _bnb
from shikomi.quant.nf4 import Nf4


@dataclass(frozen=True)
class Fp4(Nf4):
    """W = table[code] * absmax of its block; a code is a sign, two bits of exponent and one of mantissa."""

    name: ClassVar[str] = "fp4"
    kind: ClassVar[_bnb.Kind] = "fp4"
