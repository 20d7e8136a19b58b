"""How fast a machine computes each kind of work: measured here and cached, or a share of the peak of a data sheet."""

from __future__ import annotations

from dataclasses import dataclass

from shikomi.errors import BadInput, Problem
from shikomi.plan.estimate import BYTES, Machine, Range
from shikomi.plan.hardware import Hardware

NARROW, WIDE = 256, 1024  # widths at which the probe multiplies
UNKNOWN = Range(0.8, 1.0, 1.35)
"""What a measured time is multiplied with: the error of the plan on real runs (docs/guide/plan.md), and other load."""


@dataclass(frozen=True)
class Rates:
    """Work a second of each kind (plan/work.py). A kind that is part of `products`' share is 0: it is not added."""

    name: str
    products: float  # FLOP/s
    thin: float  # FLOP/s of low-rank products: of rank 16
    attention: float  # FLOP/s
    softmax: float  # numbers/s
    elementwise: float  # numbers/s
    weights: float  # weights/s: read, and widened where arithmetic is wider than storage
    update: float  # parameters/s
    spread: Range  # seconds are multiplied with it
    measured: bool
    thin_8: float = 0.0  # of rank 8 and below, which kernels serve worst; 0: as `thin`
    thin_64: float = 0.0  # of rank 64 and above; 0: as `thin`
    narrow: float = 0.0  # FLOP/s where a model is 256 wide; 0: as `products`, which is 1,024 wide

    def thin_at(self, rank: int) -> float:
        """FLOP/s of products of this rank."""
        nearest = self.thin_8 if rank < 12 else self.thin_64 if rank >= 32 else self.thin
        return nearest or self.thin

    def products_at(self, width: int) -> float:
        """FLOP/s of products in a model of this width: time for a number goes with 1 / width."""
        if not self.narrow:
            return self.products
        slope = (1 / self.narrow - 1 / self.products) / (1 / NARROW - 1 / WIDE)
        return 1 / max(1 / self.products + slope * (1 / width - 1 / WIDE), 0.5 / self.products)


def of_hardware(machine: Hardware, dtype: str) -> Rates:
    """Rates of a machine of the table: its peak for `dtype`, of which training reaches `machine.share`.

    Raises BadInput for a dtype that it does not multiply.
    """
    if dtype not in machine.flops:
        raise BadInput([Problem(f"{machine.title} does not multiply {dtype}", allowed=", ".join(machine.flops))])
    peak = machine.flops[dtype] * machine.share.likely
    share = machine.share
    spread = Range(share.likely / share.high, 1.0, share.likely / share.low)
    update = machine.bandwidth / 28  # AdamW reads and writes 28 bytes for a parameter
    weights = machine.bandwidth / BYTES[dtype]
    return Rates(machine.name, peak, peak, peak, 0, 0, weights, update, spread, measured=False)


def here(machine: Machine, found: dict[str, float]) -> Rates:
    """Rates that `plan/speed.py` measured on this machine."""
    return Rates(name=machine.name, spread=UNKNOWN, measured=True, **found)
