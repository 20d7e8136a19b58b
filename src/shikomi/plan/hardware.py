"""Machines that a plan can be made for: the table in hardware.yaml, and the one that this runs on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from shikomi.errors import BadInput, Problem, nearest
from shikomi.plan.estimate import Machine, Range

TABLE = Path(__file__).with_name("hardware.yaml")
HERE = "this machine"
DEVICES = {"gpu": "cuda", "mac": "mps", "cpu": "cpu", "phone": "cpu"}
GIB, MIB = 1 << 30, 1 << 20
HOST_BYTES = 64 * GIB  # beside a GPU of the table, whose host is not known


@dataclass(frozen=True)
class Hardware:
    """A machine of the table. Peaks are those of data sheets: dense, accumulated in fp32."""

    name: str
    title: str
    kind: str  # "gpu", "mac", "cpu" or "phone"
    memory_bytes: int
    reserved_bytes: int  # of it, what the system and other programs keep
    bandwidth: float  # bytes/s
    flops: dict[str, float]  # FLOP/s of each dtype that is multiplied in hardware
    watts: float
    share: Range  # of the peak, what training reaches
    source: str

    @property
    def usable_bytes(self) -> int:
        """What a run may take."""
        return self.memory_bytes - self.reserved_bytes

    @property
    def rented(self) -> bool:
        """Whether an hour of it is usually paid for; the others cost electricity."""
        return self.kind == "gpu"

    def machine(self, dtype: str = "auto") -> Machine:
        """The machine as a plan sees it, with the dtypes that `model/device.py` would choose there for `dtype`.

        Raises BadInput for fp16 where only CUDA has it.
        """
        device = DEVICES[self.kind]
        if dtype == "auto":
            dtype = "fp16" if device == "cuda" and "bf16" not in self.flops else "bf16"
        if dtype == "fp16" and device != "cuda":
            raise BadInput([Problem("dtype: fp16 needs a CUDA device", found=self.name, allowed="auto, bf16, fp32")])
        arithmetic = "fp32" if dtype == "bf16" and device != "cuda" else dtype
        if arithmetic not in self.flops:
            allowed = ", ".join(("auto", *self.flops))
            raise BadInput([Problem(f"{self.title} does not multiply {arithmetic}", found=dtype, allowed=allowed)])
        host = HOST_BYTES if device == "cuda" else self.usable_bytes
        return Machine(self.name, device, self.usable_bytes, host, dtype, arithmetic)


@cache
def table() -> dict[str, Hardware]:
    """All machines by name, in the order of the file."""
    content = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {name: _read(name, entry, content["share"]) for name, entry in content["machines"].items()}


def _read(name: str, entry: dict[str, Any], shares: dict[str, list[float]]) -> Hardware:
    return Hardware(
        name=name,
        title=entry["title"],
        kind=entry["kind"],
        memory_bytes=entry["memory_mib"] * MIB,
        reserved_bytes=entry["reserved_mib"] * MIB,
        bandwidth=entry["bandwidth_gbs"] * 1e9,
        flops={dtype: value * 1e12 for dtype, value in entry["tflops"].items()},
        watts=float(entry["watts"]),
        share=Range(*shares[entry["kind"]]),
        source=entry["source"],
    )


def hardware(name: str) -> Hardware:
    """A machine of the table by name. Raises BadInput with the nearest name."""
    known = table()
    folded = name.lower().replace(" ", "-").replace("_", "-")
    if folded not in known:
        close = nearest(folded, known)
        fix = f"did you mean {close}?" if close else "leave --machine out for this machine"
        raise BadInput([Problem("unknown machine", found=name, allowed=", ".join(known), fix=fix)])
    return known[folded]
