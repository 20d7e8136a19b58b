"""What to change so that a stage fits a memory: the changes that cost the least time and quality, in that order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shikomi import registry
from shikomi.plan.estimate import Job, Machine
from shikomi.plan.memory import memory
from shikomi.recipe import ComponentSpec, build
from shikomi.recipe.schema import LEARNING_RATE_ADAPTER, LEARNING_RATE_PREFERENCES

SMALLEST = 256
"""Tokens. Products of fewer rows leave most of a machine idle."""

LARGEST = 16_384
"""Tokens. Nothing gets faster beyond."""

SHORTEST = 128
"""Tokens. Rows are not proposed to be cut to fewer."""

LEAST_RANK = 4
EIGHT_BIT = "adamw_8bit"


@dataclass(frozen=True)
class Change:
    """One change of a recipe."""

    override: str  # as it is written behind `shikomi train RECIPE`
    saves: float  # bytes of the likely peak, after the changes before it
    costs: str  # a sentence: time, quality, or nothing

    def as_dict(self) -> dict[str, Any]:
        return {"override": self.override, "saves_bytes": self.saves, "costs": self.costs}


@dataclass(frozen=True)
class Fitted:
    """A job after changes, with its likely and high peak in bytes."""

    job: Job
    changes: tuple[Change, ...]
    fits: bool
    peak: float
    peak_high: float


Move = tuple[str, str, Callable[[Job], Job]]  # override, costs, the job after it


def cheapest(job: Job, machine: Machine, limit_bytes: float) -> list[Change]:
    """The cheapest changes after which even the high estimate of the peak is within `limit_bytes`.

    Empty where it fits as it is. Where nothing helps, all that saves memory, and the plan says what is still missing.
    """
    return list(fit(job, machine, limit_bytes).changes)


def fit(job: Job, machine: Machine, limit_bytes: float) -> Fitted:
    """The same with the job that they make."""
    before = memory(job, machine).peak
    if before.high <= limit_bytes:
        return Fitted(job, (), True, before.likely, before.high)
    taken: list[Move] = []
    for group in _groups(job, machine):
        found, used = _first_that_fits(_after(job, taken), group, machine, limit_bytes)
        taken += used
        if found:
            taken = _needed(job, taken, machine, limit_bytes)
            break
    changes = _told(job, taken, machine)
    final = _after(job, taken)
    peak = memory(final, machine).peak
    return Fitted(final, tuple(changes), peak.high <= limit_bytes, peak.likely, peak.high)


def _first_that_fits(job: Job, group: Sequence[Move], machine: Machine, limit: float) -> tuple[bool, list[Move]]:
    """Of moves of one kind, each stronger than the one before, the first that fits; else the last that saves."""
    best: list[Move] = []
    least = memory(job, machine).peak.likely
    for move in group:
        peak = memory(move[2](job), machine).peak
        if peak.high <= limit:
            return True, [move]
        if peak.likely < least:
            best, least = [move], peak.likely
    return False, best


def _needed(job: Job, moves: list[Move], machine: Machine, limit: float) -> list[Move]:
    """Without the moves that the later ones have made unnecessary, the costlier first."""
    kept = list(moves)
    for move in reversed(moves[:-1]):
        fewer = [other for other in kept if other is not move]
        if memory(_after(job, fewer), machine).peak.high <= limit:
            kept = fewer
    return kept


def _after(job: Job, moves: Sequence[Move]) -> Job:
    for _, _, change in moves:
        job = change(job)
    return job


def _told(job: Job, moves: Sequence[Move], machine: Machine) -> list[Change]:
    """Each move with what it saves after those before it."""
    changes, last = [], memory(job, machine).peak.likely
    for override, costs, change in moves:
        job = change(job)
        now = memory(job, machine).peak.likely
        changes.append(Change(override, last - now, costs))
        last = now
    return changes


def _groups(job: Job, machine: Machine) -> Iterator[list[Move]]:
    """Kinds of changes, by how much quality and time they cost."""
    full = job.adapter.name == "full"
    yield _smaller_micro_batches(job)
    yield _recompute(job)
    if job.optim.name == "adamw" and EIGHT_BIT in registry.names("optim"):
        costs = "no time worth naming; the optimizer's moments are rounded to 8 bits, in blocks"
        eight: Any = build("optim", ComponentSpec(name=EIGHT_BIT))
        yield [(f"optim={EIGHT_BIT}", costs, lambda j: replace(j, optim=eight))]
    if full:
        yield [_as_lora(job)]
    if job.quant is None and not job.quantized and machine.device in ("cpu", "cuda"):
        costs = "some percent more time; the frozen weights are rounded to 4 bits"
        if full:
            costs += " (the adapter makes them frozen)"
        nf4: Any = build("quant", ComponentSpec(name="nf4"))
        yield [("quant=nf4", costs, lambda j: replace(j, quant=nf4))]
    if job.adapter.name in ("lora", "dora") and job.adapter.r > LEAST_RANK:
        costs = "a smaller update: enough for a format or a label set, less for new knowledge"
        yield [(f"adapter.r={LEAST_RANK}", costs, lambda j: replace(j, adapter=replace(j.adapter, r=LEAST_RANK)))]
    yield _shorter(job)


def _smaller_micro_batches(job: Job) -> list[Move]:
    """Fewer tokens at a time; a row is never cut, so the longest is the least."""
    least = max(SMALLEST, job.rows.longest)
    sizes, size = [], job.micro_batch_tokens // 2
    while size >= least:
        sizes.append(size)
        size //= 2
    if job.micro_batch_tokens > least and least not in sizes:
        sizes.append(least)
    costs = "the same result; a little more time, since smaller products leave more of the machine idle"
    return [(f"micro_batch_tokens={size}", costs, _with_tokens(size)) for size in sizes]


def _with_tokens(size: int) -> Callable[[Job], Job]:
    def change(job: Job) -> Job:
        fullest = job.rows.fullest
        share = min(1.0, size / job.micro_batch_tokens)
        scored = job.rows.fullest_scored
        rows = replace(
            job.rows,
            fullest=None if fullest is None else (fullest * share).at_least(min(job.rows.longest, fullest.likely)),
            fullest_scored=None if scored is None else scored * share,
        )
        return replace(job, micro_batch_tokens=size, rows=rows)

    return change


def _recompute(job: Job) -> list[Move]:
    """More of the activations computed again in the backward."""
    if job.recompute == "full":
        return []
    arch, moves = job.architecture, []
    if arch.path_at(job.max_length) == "fused":
        for layers, costs in ((arch.layers // 2, "some 5% more time"), (arch.layers, "some 10% more time")):
            if layers and (not isinstance(job.recompute, int) or job.recompute < layers):
                moves.append((f"recompute={layers}", f"the same result; {costs}", _with_recompute(layers)))
    return [*moves, ("recompute=full", "the same result; a third more time", _with_recompute("full"))]


def _with_recompute(value: str | int) -> Callable[[Job], Job]:
    return lambda job: replace(job, recompute=value)


def _as_lora(job: Job) -> Move:
    """An adapter instead of the whole model, at the learning rate that adapters take."""
    rate = LEARNING_RATE_PREFERENCES if job.preferences else LEARNING_RATE_ADAPTER
    lora: Any = build("adapters", ComponentSpec(name="lora"))
    adamw: Any = build("optim", ComponentSpec(name="adamw"))
    override, projected = f"adapter=lora learning_rate={rate:g}", job.optim.name == "galore"

    def change(before: Job) -> Job:
        return replace(before, adapter=lora, optim=adamw if projected else before.optim)

    costs = "often about a point of quality (docs/results.md); training is faster, and what is saved is small"
    return (f"{override} optim=adamw" if projected else override, costs, change)


def _shorter(job: Job) -> list[Move]:
    """Shorter rows: the one change that takes something away from the data."""
    moves: list[Move] = []
    length = min(job.max_length, job.rows.longest) // 2
    while length >= SHORTEST:
        override = f"max_length={length} micro_batch_tokens={length}"
        moves.append((override, f"rows of more than {length:,} tokens are cut", _with_length(length)))
        length //= 2
    return moves


def _with_length(length: int) -> Callable[[Job], Job]:
    def change(job: Job) -> Job:
        rows = replace(job.rows, longest=min(job.rows.longest, length), tokens=min(job.rows.tokens, float(length)))
        return _with_tokens(length)(replace(job, max_length=length, rows=rows))

    return change


def micro_batch_for(job: Job, machine: Machine, limit_bytes: float) -> int:
    """The `micro_batch_tokens` for this memory: all of a step at a time where that fits, at most 16,384 tokens.

    A smaller one changes no result, it only costs time; the longest row is the least. The recipe's own is returned
    where not even that fits.
    """
    step = min(LARGEST, int(min(job.batch_size, job.rows.count) * job.rows.tokens))
    size, least = SMALLEST, max(SMALLEST, job.rows.longest)
    best = None
    while True:
        tokens = max(size, least)
        if memory(_with_tokens(tokens)(job), machine).peak.high > limit_bytes:
            break
        best = tokens
        if size >= step:
            break
        size *= 2
    return job.micro_batch_tokens if best is None else best
