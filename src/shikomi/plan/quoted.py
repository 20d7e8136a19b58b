"""Figures that people quote and statements that they make, beside those of the plan, with reasons for a difference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from shikomi.plan.architecture import Architecture, known
from shikomi.plan.estimate import MemoryPlan
from shikomi.plan.hardware import hardware
from shikomi.plan.memory import memory
from shikomi.plan.rates import of_hardware
from shikomi.plan.tables import (
    FULL,
    GB,
    LENGTH,
    LORA,
    QLORA,
    QV,
    SIZES,
    SMALL,
    Method,
    Table,
    built,
    by_machine,
    by_size,
    count,
    gb,
    job_of,
    large,
    machines,
    most_tokens,
    peak,
)
from shikomi.plan.time import timed
from shikomi.recipe import ComponentSpec, build

# What people quote, in GB, by size and method.
QUOTED = {
    "full, AdamW": {"7B": "80", "13B": "160", "70B": "800+"},
    "LoRA r=16": {"7B": "40", "13B": "80", "70B": "400"},
    "QLoRA r=16": {"7B": "24", "13B": "40", "70B": "200"},
}


def quoted() -> Table:
    """Figures that people quote beside those of the plan, with the reason of each difference."""
    rows = []
    for method in (FULL, LORA, QLORA):
        for size, figure in QUOTED[method.name].items():
            arch = known(SIZES[size])
            plan = peak(arch, method)
            rows.append((method.name, size, figure, gb(plan.peak.likely), _reason(method, arch, figure, plan)))
    return Table("quoted", "Figures that people quote, in GB", ("method", "size", "quoted", "plan", "why"), tuple(rows))


def _reason(method: Method, arch: Architecture, figure: str, plan: MemoryPlan) -> str:
    """Where a quoted figure comes from, and what it counts that the plan does not, or the other way round."""
    number, parameters = float(figure.rstrip("+")) * GB, arch.parameters
    per = number / parameters
    ours = plan.peak.likely / parameters
    if method is FULL:
        return (
            f"quoted is {per:.0f} bytes a parameter: weights and gradients in 2 each, two moments in 4. Here masters "
            f"and gradients are fp32, {ours:.0f} bytes in all: updates below bf16's precision are not lost"
        )
    if method is LORA:
        weights = plan.of("weights").likely
        return (
            f"quoted is half of full, a rule of thumb, {per:.1f} bytes a parameter. The frozen weights take "
            f"{weights / GB:.0f} GB in bf16; the adapter with gradients and moments {_adapter(plan) / GB:.1f} GB; the "
            "rest are activations, which long rows and many at a time multiply"
        )
    weights = plan.of("weights").likely
    fits = f"the size of the card that it is known to run on ({figure} GB)" if figure != "200" else "more than one card"
    return (
        f"quoted is {fits}, not what it takes: {weights / GB:.1f} GB of weights at 4.13 bits with embeddings in bf16, "
        f"{_adapter(plan) / GB:.1f} GB of adapter, gradients and moments"
    )


def _adapter(plan: MemoryPlan) -> float:
    return plan.of("adapter").likely + plan.of("gradients").likely + plan.of("optimizer").likely


@dataclass(frozen=True)
class Statement:
    """A common statement: a method on a size fits a machine."""

    machine: str
    size: str
    method: Method


STATEMENTS = (
    Statement("rtx-4090", "7B", QLORA),
    Statement("rtx-4090", "3B", LORA),
    Statement("rtx-3090", "7B", QLORA),
    Statement("rtx-4060-ti-16gb", "3B", QLORA),
    Statement("phone-4gb", "1B", QLORA),
    Statement("phone-6gb", "1B", QLORA),
    Statement("phone-8gb", "3B", QLORA),
)


def verdicts() -> Table:
    """Whether the common statements hold, with the room that is left."""
    rows = []
    models = SMALL | SIZES
    for said in STATEMENTS:
        machine = hardware(said.machine)
        arch, room = known(models[said.size]), machine.usable_bytes
        plan = memory(job_of(arch, said.method), machine.machine())
        verdict = "yes" if plan.peak.high <= room else "just" if plan.peak.likely <= room else "no"
        most = most_tokens(models[said.size], said.method, machine)
        rest = f"up to {count(most)} tokens at a time" if most else f"{gb(plan.peak.likely - room)} GB too much"
        if verdict == "no" and most:
            rest = f"not at {LENGTH:,} tokens; {rest}"
        sizes = (f"{value / GB:,.2f}" for value in (plan.peak.likely, room))  # some are close
        rows.append((machine.title, f"{said.size} {said.method.name}", verdict, *sizes, rest))
    return Table(
        "verdicts",
        f"Common statements, at one row of {LENGTH:,} tokens",
        ("machine", "what is said to fit", "fits", "takes GB", "has GB", "how far"),
        tuple(rows),
        (
            "just: the likely estimate fits, the high one does not. A phone leaves about half of its memory to an app; "
            "its rows say what the arithmetic takes, since nothing here runs on a phone.",
        ),
    )


def disk() -> Table:
    """What one more task takes on disk: a whole model, or an adapter."""
    arch = known("llama-2-7b")
    spec = ComponentSpec(name="lora", options={"r": 8, "target_modules": QV})
    adapter: Any = build("adapters", spec)
    trained = sum(prod(shape) for shape in adapter.trained_shapes(arch).values())
    total = arch.parameters
    rows = (
        ("full model, fp32", f"{total:,}", "100%", f"{4 * total / GB:.2f} GB"),
        ("full model, bf16", f"{total:,}", "100%", f"{2 * total / GB:.2f} GB"),
        ("LoRA r=8 on q and v, fp32", f"{trained:,}", f"{trained / total:.2%}", f"{4 * trained / 1e6:.1f} MB"),
        ("LoRA r=8 on q and v, bf16", f"{trained:,}", f"{trained / total:.2%}", f"{2 * trained / 1e6:.1f} MB"),
    )
    return Table("disk", "On disk for every task, Llama-2-7B", ("what", "parameters", "of all", "bytes"), rows)


def weights() -> Table:
    """The popular table of weights alone, 7B: every parameter in so many bits, and as they are really stored."""
    arch = known("llama-2-7b")
    total = arch.parameters
    few = arch.body_parameters
    rows = []
    for name, bits, said in (("16-bit (bf16)", 16.0, 14.0), ("8-bit (int8)", None, 7.0), ("4-bit (nf4)", None, 3.5)):
        real = bits if bits is not None else float(built("quant", "int8" if "int8" in name else "nf4").bits)
        stored = (few * real + (total - few) * 16) / 8
        rows.append((name, f"{said:g} GB", f"{stored / GB:.2f} GB", f"{real:.2f} bits a weight of a linear map"))
    return Table(
        "weights",
        "Weights alone, 7B (Llama-2-7B has 6,738,415,616 parameters)",
        ("stored as", "popular", "plan", "why"),
        tuple(rows),
        ("Embeddings, head and norms stay in bf16; scales of blocks are counted. Training takes more than weights.",),
    )


@dataclass(frozen=True)
class Published:
    """A measurement of another program."""

    what: str
    model: str
    method: Method
    tokens: int  # of a row
    batch: int
    recompute: str
    gib: float
    source: str
    why: str  # of the difference


PUBLISHED = (
    Published("torchtune LoRA 8B, RTX 4090", "llama-3.1-8b", LORA, 2048, 2, "full", 16.2,
              "torchtune README, batch 2 x 2,048, torch.compile", "bf16 adapters there, fp32 here; logits in chunks"),
    Published("torchtune LoRA 8B, A6000", "llama-3.1-8b", LORA, 2048, 2, "none", 30.3,
              "torchtune README, batch 2 x 2,048", "autograd keeps more for each layer than the fused halves here"),
    Published("torchtune QLoRA 8B, RTX 4090", "llama-3.1-8b", QLORA, 2048, 2, "full", 7.4,
              "torchtune README, batch 2 x 2,048", "bf16 adapters there, fp32 here"),
    Published("PEFT LoRA r=32 3B, average", "llama-3.2-3b",
              Method("LoRA r=32", ComponentSpec(name="lora", options={"r": 32, "target_modules": QV})),
              768, 4, "none", 13.4, "PEFT's method comparison, MetaMathQA, batch 4, up to 768 tokens",
              "padded rows and all logits there; an average over steps whose rows are mostly shorter"),
)  # fmt: skip


def published() -> Table:
    """Measurements of other programs beside the plan of the same run here."""
    rows = []
    for one in PUBLISHED:
        job = job_of(known(one.model), one.method, one.tokens, one.batch, one.recompute)
        plan = memory(job, large())
        gib = [value / (1 << 30) for value in (plan.peak.low, plan.peak.likely, plan.peak.high)]
        rows.append((one.what, f"{one.gib:.1f}", f"{gib[1]:.1f} ({gib[0]:.1f} to {gib[2]:.1f})", one.why, one.source))
    return Table(
        "published",
        "Published measurements of other programs, in GiB",
        ("run", "measured there", "plan for here", "difference", "source"),
        tuple(rows),
    )


# Published tokens/s of one RTX 4090: torchtune's README, batch 2 x 2,048 packed tokens, torch.compile.
SPEEDS = ((LORA, "llama-3.1-8b", 3083), (QLORA, "llama-3.1-8b", 2413))


def speeds() -> Table:
    """Published speeds of another program beside the plan of the same run here."""
    card, rows = hardware("rtx-4090"), []
    for method, model, measured in SPEEDS:
        job = job_of(known(model), method, 2048, 2)
        job = replace(job, rows=replace(job.rows, scored_share=1.0))
        plan = timed(job, of_hardware(card, "bf16"), "full")
        low, high = plan.tokens / plan.seconds.high, plan.tokens / plan.seconds.low
        told = f"{plan.tokens_per_second:,.0f} ({low:,.0f} to {high:,.0f})"
        rows.append((f"torchtune {method.name}, {model}, {card.title}", f"{measured:,}", told))
    notes = ("torchtune compiles its kernels; the plan's shares of the peak are an assumption, on the careful side.",)
    return Table(
        "speeds", "Published speeds, in tokens/s", ("run", "measured there", "plan for here"), tuple(rows), notes
    )


def all_tables() -> Iterator[Table]:
    """Every table, in the order of the guide."""
    yield by_size(SIZES, "sizes")
    yield by_size(SMALL, "small")
    yield by_machine()
    yield quoted()
    yield verdicts()
    yield disk()
    yield weights()
    yield published()
    yield speeds()
    yield machines()
