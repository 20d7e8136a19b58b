"""The plan of a run before it starts: what its stages take, whether that is there, and what would make it fit."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from shikomi.errors import BadInput, Problem
from shikomi.model.device import choose_device, choose_dtypes
from shikomi.model.files import ModelFiles
from shikomi.plan.estimate import Job, Machine, MemoryPlan, Range, Rows
from shikomi.plan.fit import cheapest
from shikomi.plan.jobs import Model, job_of
from shikomi.plan.memory import memory
from shikomi.plan.speed import free_bytes
from shikomi.recipe import build
from shikomi.recipe.schema import Recipe, Stage
from shikomi.steps.memory import own_memory_bytes
from shikomi.train.step import plan_step

SHOWN = 3  # changes that a refusal proposes
STEPS_LOOKED_AT = 4  # optimizer steps that are packed to see how full micro-batches get
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FEWEST = Rows(count=1, tokens=8, longest=8)  # before the rows are known: what the model alone needs


@dataclass(frozen=True)
class Planned:
    """Memory of every stage; none where the architecture has no plan, and `note` says so."""

    machine: Machine
    jobs: tuple[Job, ...] = ()
    plans: tuple[MemoryPlan, ...] = ()
    note: str | None = None

    @property
    def hungriest(self) -> MemoryPlan | None:
        """The plan of the stage that takes the most."""
        return max(self.plans, key=lambda plan: plan.peak.likely, default=None)

    @property
    def memory_bound(self) -> int:
        """Bytes that the run needs at least."""
        return 0 if self.hungriest is None else int(self.hungriest.peak.low)

    def as_dict(self) -> dict[str, Any]:
        """What result.json says, by the names of what is measured; empty where there is no plan."""
        plan = self.hungriest
        if plan is None:
            return {}
        if self.machine.device != "cuda":
            return plan.as_dict()
        on_device = {"peak_device_memory_bytes": plan.peak.as_dict()}
        return plan.as_dict() | on_device | {"peak_memory_bytes": plan.host_peak.as_dict()}

    def lines(self) -> list[str]:
        """What the user should know before the first step."""
        if self.hungriest is None:
            return [self.note] if self.note else []
        peak = self.hungriest.peak
        return [
            f"planned peak memory {_gb(peak.likely)} ({_gb(peak.low)} to {_gb(peak.high)}): {parts(self.hungriest)}"
        ]


def parts(plan: MemoryPlan, shown: int = 4) -> str:
    """The largest components of a plan in words."""
    largest = sorted(plan.components, key=lambda part: -part.bytes.likely)[:shown]
    return ", ".join(f"{part.name} {_gb(part.bytes.likely)}" for part in largest)


def this_machine(recipe: Recipe) -> Machine:
    """This machine with what is free on it now, this process included. Raises BadInput for a device that is absent."""
    device = choose_device(recipe.device)
    dtypes = choose_dtypes(recipe.dtype, device)
    free, host = free_bytes(device)
    own = own_memory_bytes()
    free += own if device.type != "cuda" else 0
    names = (DTYPES[dtypes.storage], DTYPES[dtypes.arithmetic])
    return Machine("this machine", device.type, free, host + own, *names)


def plan_of(recipe: Recipe, files: ModelFiles, adapter: Any, rows: Sequence[Rows] | None = None) -> Planned:
    """The plan of every stage; without `rows` what the model alone needs."""
    machine = this_machine(recipe)
    try:
        model = replace(Model.of(files.folder), continued=files.adapter is not None)
    except BadInput as error:
        return Planned(machine, note=f"no plan of memory: {error.problems[0]}")
    jobs = []
    for number, stage in enumerate(recipe.stages):
        objective = build("objectives", stage.objective)
        job = job_of(recipe, stage, model, FEWEST if rows is None else rows[number], objective)
        own = stage.adapter is None and stage.previous_adapter == "continue"
        jobs.append(replace(job, adapter=adapter) if own else job)
    return Planned(machine, tuple(jobs), tuple(memory(job, machine) for job in jobs))


def check_room(recipe: Recipe, planned: Planned) -> None:
    """Raises BadInput where even the low estimate of memory or disk is not there, with what would make it fit."""
    problems = []
    for job, plan in zip(planned.jobs, planned.plans, strict=True):
        if plan.peak.low > planned.machine.memory_bytes:
            problems.append(_short(job, plan, planned.machine))
    place = next(p for p in (recipe.output_dir, *recipe.output_dir.parents) if p.exists())
    room, needed = shutil.disk_usage(place).free, sum(plan.disk.low for plan in planned.plans)
    if needed > room:
        found = f"{_gb(needed)} needed for checkpoints and the result, {_gb(room)} free"
        problems.append(Problem("not enough disk", str(place), found=found, fix="choose another output_dir"))
    if problems:
        raise BadInput(problems)


def check_lengths(recipe: Recipe, planned: Planned) -> None:
    """Raises BadInput where rows could be longer than a model's learned table of positions."""
    for job in planned.jobs:
        context = job.adapter.capabilities.context
        virtual = job.adapter.num_virtual_tokens if context else 0
        table = job.architecture.positions
        if table is not None and job.max_length + virtual > table:
            found = f"max_length {job.max_length:,}" + (f" and {virtual} virtual tokens" if virtual else "")
            what = f"{recipe.model} has learned {table:,} positions, and rows may be longer"
            raise BadInput(
                [Problem(what, found=found, allowed=f"{table:,} in all", fix=f"max_length: {table - virtual}")]
            )


def _short(job: Job, plan: MemoryPlan, machine: Machine) -> Problem:
    changes = cheapest(job, machine, machine.memory_bytes)[:SHOWN]
    told = ", then ".join(f"{change.override} (saves {_gb(change.saves)})" for change in changes)
    found = f"{_gb(plan.peak.low)} to {_gb(plan.peak.high)} needed ({parts(plan)}), {_gb(machine.memory_bytes)} free"
    fix = told or "choose a smaller model, or free memory"
    return Problem(f"not enough memory for stage {job.stage}", found=found, fix=fix)


def measured_rows(store: Any, examples: Any, stage: Stage, kind: str, steps: int, max_length: int) -> Rows:
    """The rows of a stage as they were tokenized; `examples` gives those of an optimizer step."""
    report, lengths = store.report, store.lengths
    needs = build("objectives", stage.objective).needs
    tokens = scored = saved = others = 0
    for step in sorted({int(i) for i in np.linspace(0, steps - 1, STEPS_LOOKED_AT)}):
        plan = plan_step(examples(step), stage.micro_batch_tokens, stage.share_prefix, kind, needs, max_length)
        tokens = max([tokens, *(len(packed.ids) for packed in plan.micro)])
        scored = max([scored, *(len(packed.targets) for packed in plan.micro)])
        saved, others = saved + plan.tokens - plan.computed, others + sum(len(p.rows) - 1 for p in plan.micro)
    first = examples(0) if kind != "conversations" else []
    longest = int(lengths.max())
    most = max(longest, tokens, min(stage.micro_batch_tokens, stage.batch_size * longest))
    return Rows(
        count=len(store),
        tokens=float(lengths.mean()),
        longest=longest,
        scored_share=report.trained_tokens / max(1, report.tokens),
        prompt_share=sum(len(e.prompt) for e in first) / max(1, sum(map(len, first))),
        measured=True,
        fullest=Range(tokens, tokens, most),
        fullest_scored=Range(scored, scored, max(scored, scored * most / max(1, tokens))),
        shared=saved / max(1, others) if kind == "conversations" else 0.0,
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"
