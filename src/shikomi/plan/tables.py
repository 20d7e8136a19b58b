"""Tables of what fits where: methods by model sizes and by machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from shikomi.plan.architecture import Architecture, known
from shikomi.plan.estimate import Job, Machine, MemoryPlan, Rows
from shikomi.plan.hardware import Hardware, hardware, table
from shikomi.plan.memory import memory
from shikomi.plan.prices import hourly
from shikomi.recipe import ComponentSpec, build

GB = 1e9
LENGTH = 1024  # tokens of a row of the tables, one row at a time
SIZES = {"3B": "llama-3.2-3b", "7B": "llama-2-7b", "13B": "llama-2-13b", "70B": "llama-2-70b"}
SMALL = {
    "135M": "smollm2-135m",
    "360M": "smollm2-360m",
    "0.5B": "qwen2.5-0.5b",
    "1B": "llama-3.2-1b",
    "1.7B": "smollm2-1.7b",
}
SOME = {"0.5B": SMALL["0.5B"], "1B": SMALL["1B"], **SIZES}  # of the table of machines
MACHINES = ("rtx-3060", "rtx-4060-ti-16gb", "rtx-3090", "rtx-4090", "l4", "a100-40gb", "a100-80gb", "h100-80gb",
            "cpu-8gb", "cpu-16gb", "cpu-32gb")  # fmt: skip
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class Table:
    """Rows of text under a head, for a terminal or a page."""

    name: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        rows = [dict(zip(self.head, row, strict=True)) for row in self.rows]
        return {"name": self.name, "title": self.title, "rows": rows, "notes": self.notes}


@dataclass(frozen=True)
class Method:
    """A way to train, as people name it."""

    name: str
    adapter: ComponentSpec
    quant: str = "none"
    optim: str = "adamw"


METHODS = (
    Method("full, AdamW", ComponentSpec(name="full")),
    Method("full, 8-bit AdamW", ComponentSpec(name="full"), optim="adamw_8bit"),
    Method("full, GaLore", ComponentSpec(name="full"), optim="galore"),
    Method("LoRA r=16", ComponentSpec(name="lora")),
    Method("QLoRA r=16", ComponentSpec(name="lora"), quant="nf4"),
)
BY_NAME = {method.name: method for method in METHODS}
FULL, LORA, QLORA = METHODS[0], METHODS[3], METHODS[4]
QV = ["q_proj", "v_proj"]


def job_of(arch: Architecture, method: Method, length: int = LENGTH, batch: int = 1, recompute: str = "full") -> Job:
    """One stage of supervised fine-tuning: rows of `length` tokens, half of them trained, `batch` at a time."""
    quant: Any = None if method.quant == "none" else built("quant", method.quant)
    adapter: Any = build("adapters", method.adapter)
    tokens = length * batch
    return Job(
        architecture=arch,
        adapter=adapter,
        quant=quant,
        optim=built("optim", method.optim),
        objective=built("objectives", "sft"),
        rows=Rows(count=10_000, tokens=length, longest=length, measured=True),
        steps=1000,
        max_length=length,
        batch_size=16,
        micro_batch_tokens=tokens,
        recompute=recompute,
    )


@cache
def built(kind: str, name: str) -> Any:
    return build(kind, ComponentSpec(name=name))


def gb(value: float) -> str:
    return f"{value / GB:,.1f}" if value < 99.5 * GB else f"{value / GB:,.0f}"


def large(device: str = "cuda") -> Machine:
    """A machine without a limit, for what a method takes by itself."""
    storage, arithmetic = ("bf16", "bf16") if device == "cuda" else ("bf16", "fp32")
    return Machine("no limit", device, 1 << 50, 1 << 50, storage, arithmetic)


def peak(arch: Architecture, method: Method, machine: Machine | None = None, length: int = LENGTH) -> MemoryPlan:
    """The memory of one row of `length` tokens at a time, activations computed again."""
    return memory(job_of(arch, method, length), machine or large())


def by_size(sizes: dict[str, str], name: str) -> Table:
    """Peak memory of each method on each model size."""
    rows = []
    for method in METHODS:
        plans = [peak(known(model), method) for model in sizes.values()]
        cells = (f"{gb(p.peak.likely)} ({gb(p.peak.low)} to {gb(p.peak.high)})" for p in plans)
        rows.append((method.name, *cells))
    return Table(
        name,
        "Memory of a GPU in GB (10^9 bytes), likely (low to high)",
        ("method", *(f"{size}: {model}" for size, model in sizes.items())),
        tuple(rows),
        (f"One row of {LENGTH:,} tokens at a time, bf16, activations computed again (recompute: full).",),
    )


@cache
def needed(model: str, method: str, length: int, device: str, storage: str, arithmetic: str) -> float:
    """High estimate of the bytes of one row of `length` tokens; machines of one kind share it."""
    machine = Machine("no limit", device, 1 << 50, 1 << 50, storage, arithmetic)
    return memory(job_of(known(model), BY_NAME[method], length), machine).peak.high


def most_tokens(model: str, method: Method, machine: Hardware) -> int:
    """The longest row that fits, in steps of two; 0 where none does. The same tokens fit as several shorter rows."""
    found, own = 0, machine.machine()
    for length in LENGTHS:
        if needed(model, method.name, length, own.device, own.storage, own.arithmetic) > machine.usable_bytes:
            break
        found = length
    return found


def by_machine(sizes: dict[str, str] = SOME, machines: Sequence[str] = MACHINES) -> Table:
    """The longest row that each method can train on each machine."""
    rows = []
    for name in machines:
        machine = hardware(name)
        for size, model in sizes.items():
            cells = [most_tokens(model, method, machine) for method in METHODS]
            if any(cells):
                rows.append((f"{name} ({machine.usable_bytes / GB:.1f} GB)", size, *(count(c) for c in cells)))
            else:
                rows.append((f"{name} ({machine.usable_bytes / GB:.1f} GB)", size, *("-" for _ in cells)))
                break  # nor will a larger one
    return Table(
        "machines",
        "The longest row in tokens that fits, one at a time; - where none does",
        ("machine", "size", *(method.name for method in METHODS)),
        tuple(rows),
        (
            "As many tokens fit as several shorter rows: 8,192 is one row of 8,192, or 8 of 1,024 at a time.",
            f"Tried up to {LENGTHS[-1]:,} tokens; fits means that the high estimate does.",
        ),
    )


def count(tokens: int) -> str:
    """Tokens for a cell; a dash for none."""
    if not tokens:
        return "-"
    return f"{tokens:,}" if tokens < LENGTHS[-1] else f"{tokens:,} or more"


def machines() -> Table:
    """The machines that `--machine` takes, with what they have and cost."""
    rows = []
    for one in table().values():
        peaks = ", ".join(f"{value / 1e12:g} {dtype}" for dtype, value in one.flops.items())
        hour = hourly(one).usd
        memory_of = f"{one.usable_bytes / GB:.1f}"
        price = f"${hour.likely:.2f} ({hour.low:.2f} to {hour.high:.2f})"
        rows.append((one.name, memory_of, f"{one.bandwidth / 1e9:,.0f}", peaks, f"{one.watts:g}", price, one.source))
    return Table(
        "hardware",
        "Machines of the table",
        ("--machine", "GB to use", "GB/s", "peak TFLOP/s", "watts", "an hour", "peak and bandwidth from"),
        tuple(rows),
        ("An hour is rent where there are offers, else electricity.",),
    )


def of_job(job: Job, machines: Sequence[str] = MACHINES) -> Table:
    """Where one job fits, at its own length and batch."""
    rows = []
    for name in machines:
        machine = hardware(name)
        plan = memory(replace(job), machine.machine())
        room = machine.usable_bytes
        verdict = "yes" if plan.peak.high <= room else "just" if plan.peak.likely <= room else "no"
        rows.append((machine.title, verdict, gb(plan.peak.likely), gb(room)))
    return Table("this", "Where this recipe fits", ("machine", "fits", "takes GB", "has GB"), tuple(rows))
