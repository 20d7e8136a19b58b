"""A whole plan: memory, time and cost of all stages of a recipe on a machine, and what to change where it is short."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shikomi.errors import BadInput, Problem
from shikomi.plan.estimate import Job, Machine, MemoryPlan, Range, Rows
from shikomi.plan.fit import Change, fit, micro_batch_for
from shikomi.plan.hardware import HERE, Hardware, hardware
from shikomi.plan.jobs import jobs
from shikomi.plan.memory import memory
from shikomi.plan.prices import Cost, check_currency, check_price, cost, hourly
from shikomi.plan.rates import Rates, here, of_hardware
from shikomi.plan.time import TimePlan, timed
from shikomi.recipe.schema import Recipe

UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True)
class StagePlan:
    """One stage."""

    job: Job
    memory: MemoryPlan
    time: TimePlan
    micro_batch_tokens: int  # what this memory has room for


@dataclass(frozen=True)
class Plan:
    """All stages. `changes` make the hungriest one fit into `limit` bytes; empty where it fits as it is."""

    machine: Machine
    title: str
    limit: int
    stages: tuple[StagePlan, ...]
    cost: Cost
    changes: tuple[Change, ...]
    fits_after: bool
    peak_after: float  # likely bytes
    measured: bool  # whether the machine's speed was measured
    notes: tuple[str, ...] = ()

    @property
    def hungriest(self) -> StagePlan:
        """The stage that takes the most memory."""
        return max(self.stages, key=lambda stage: stage.memory.peak.likely)

    @property
    def peak(self) -> Range:
        """Bytes of memory of the device."""
        return self.hungriest.memory.peak

    @property
    def seconds(self) -> Range:
        """Of training, all stages; without loading, evaluation and saving."""
        return sum((stage.time.seconds for stage in self.stages), Range.exact(0))

    @property
    def disk(self) -> Range:
        """Bytes of checkpoints and results."""
        return sum((stage.memory.disk for stage in self.stages), Range.exact(0))

    @property
    def fits(self) -> str:
        """yes: the high estimate fits; just: the likely one does; no."""
        return "yes" if self.peak.high <= self.limit else "just" if self.peak.likely <= self.limit else "no"

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints, and what `shikomi.estimate` is asked for by programs."""
        stage = self.hungriest
        return {
            "machine": self.machine.name,
            "limit_bytes": self.limit,
            "fits": self.fits,
            **stage.memory.as_dict(),
            "disk_bytes": self.disk.as_dict(),
            "seconds": self.seconds.as_dict(),
            "cost": self.cost.amount.as_dict(),
            "currency": self.cost.currency,
            "cost_basis": self.cost.basis,
            "speed_measured": self.measured,
            "micro_batch_tokens": stage.micro_batch_tokens,
            "changes": [change.as_dict() for change in self.changes],
            "fits_after_changes": self.fits_after,
            "stages": [
                {
                    "name": one.job.stage,
                    "steps": one.job.steps,
                    "tokens": one.time.tokens,
                    "tokens_per_second": one.time.tokens_per_second,
                    "tokens_measured": one.job.rows.measured,
                    "peak_memory_bytes": one.memory.peak.as_dict(),
                    "seconds": one.time.seconds.as_dict(),
                }
                for one in self.stages
            ],
            "notes": [*self.notes, *self.cost.warnings],
        }


def estimate(
    recipe: Recipe,
    machine: str | None = None,
    *,
    memory_limit: str | float | None = None,
    price: float | None = None,
    currency: str = "USD",
    rows: Sequence[Rows | None] | None = None,
) -> Plan:
    """Memory, time and cost of a recipe, before anything is loaded: from the model's config.json and the rows.

    `machine` is a name of `plan/hardware.yaml`, else this machine, whose speed is measured once. `memory_limit` is
    bytes, or text such as "24GB"; absent: what the machine has. `price` is US dollars an hour. `rows` stand for those
    of stages whose files are not there yet. Raises BadInput for an unknown model type, machine, currency or price,
    and for rows that cannot be read.
    """
    code = check_currency(currency)
    if price is not None:
        price = check_price(str(price), "price")
    limit = None if memory_limit is None else bytes_of(memory_limit)
    dtype = recipe.dtype
    if machine is None:
        found, rates = this_machine(recipe.device, dtype)
        title, per_hour, notes = "this machine", hourly(found.device, price), []
    else:
        listed = hardware(machine)
        found, rates = listed.machine(dtype), of_listed(listed, dtype)
        title, per_hour = listed.title, hourly(listed, price)
        notes = [f"the speed is a share of {listed.title}'s peak, computed and not measured"]
        if listed.kind == "phone":
            notes.append("nothing here runs on a phone: the plan says what the arithmetic takes")
    room = found.memory_bytes if limit is None else int(limit)
    if limit is not None:
        found = Machine(found.name, found.device, room, found.host_memory_bytes, found.storage, found.arithmetic)
    stages = tuple(_stage(job, found, rates, room) for job in jobs(recipe, rows))
    whole = sum((stage.time.seconds for stage in stages), Range.exact(0))
    hungriest = max(stages, key=lambda stage: stage.memory.peak.likely)
    fitted = fit(hungriest.job, found, room)
    notes += [note for stage in stages for note in stage.memory.notes]
    if not all(stage.job.rows.measured for stage in stages):
        notes.append("tokens are estimated from the size of the text: the model's folder has no tokenizer")
    return Plan(
        machine=found,
        title=title,
        limit=room,
        stages=stages,
        cost=cost(whole, per_hour, code),
        changes=fitted.changes,
        fits_after=fitted.fits,
        peak_after=fitted.peak,
        measured=rates.measured,
        notes=tuple(dict.fromkeys(notes)),
    )


def _stage(job: Job, machine: Machine, rates: Rates, room: int) -> StagePlan:
    plan = memory(job, machine)
    return StagePlan(job, plan, timed(job, rates, plan.recompute), micro_batch_for(job, machine, room))


def of_listed(machine: Hardware, dtype: str) -> Rates:
    """Rates of a machine of the table for a recipe's `dtype`."""
    return of_hardware(machine, machine.machine(dtype).arithmetic)


def this_machine(device: str = "auto", dtype: str = "auto") -> tuple[Machine, Rates]:
    """This machine with what is free of its memory now, and its measured rates."""
    from shikomi.model.device import choose_device, choose_dtypes
    from shikomi.plan.speed import free_bytes, measured

    where = choose_device(device)
    dtypes = choose_dtypes(dtype, where)
    device_bytes, host_bytes = free_bytes(where)
    names = [str(one).removeprefix("torch.") for one in dtypes]
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    found = Machine(HERE, where.type, device_bytes, host_bytes, short[names[0]], short[names[1]])
    return found, here(found, measured(device, dtype))


def bytes_of(text: str | float) -> float:
    """24GB, 16 GiB, 800MB or a number of bytes. Raises BadInput."""
    if isinstance(text, int | float):
        text = f"{text:.0f}"
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b)?\s*", text, re.IGNORECASE)
    value = float(found[1]) * UNITS.get((found[2] or "").lower(), 1.0) if found else 0.0
    if not value or value < 1e6:
        allowed = "a size of at least 1 MB, such as 24GB, 16GiB or 800MB"
        raise BadInput([Problem("not a size of memory", found=repr(text), allowed=allowed, fix="--fit 24GB")])
    return value
