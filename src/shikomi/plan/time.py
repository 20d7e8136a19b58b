"""How long a stage trains: the work of its steps over the rates of a machine, as a range."""

from __future__ import annotations

from dataclasses import dataclass

from shikomi.plan.estimate import Job, Range
from shikomi.plan.rates import Rates
from shikomi.plan.work import Work, rank_of, reference, step, tokens_of

UNPACK = 1.4  # a weight in few bits takes this much longer than one in bf16
ROWS = Range(0.8, 1.0, 1.3)  # tokens that were estimated from bytes are off by about this


@dataclass(frozen=True)
class TimePlan:
    """Seconds of training without loading, evaluation and saving, and what they are made of."""

    seconds: Range
    step_seconds: float  # likely
    tokens: float  # computed with a gradient in the whole stage
    tokens_per_second: float  # likely
    flop: float  # products of the whole stage
    parts: dict[str, float]  # likely seconds of the stage by kind of work


def seconds(job: Job, rates: Rates, recompute: str | int = 0) -> Range:
    """Seconds that a stage trains; `recompute` is what the memory plan made of the job's."""
    return timed(job, rates, recompute).seconds


def timed(job: Job, rates: Rates, recompute: str | int = 0) -> TimePlan:
    """The same with its parts."""
    one = step(job, recompute)
    whole = one * job.steps
    if job.reference == "precompute" and job.trained_with_reference:
        examples = min(job.batch_size, job.rows.count)
        whole += reference(job) * (job.rows.count / examples)
    parts = _parts(whole, job, rates)
    likely = sum(parts.values())
    spread = rates.spread if job.rows.measured else rates.spread * ROWS
    computed = tokens_of(job).computed * job.steps
    return TimePlan(
        seconds=spread * likely,
        step_seconds=likely / max(1, job.steps),
        tokens=computed,
        tokens_per_second=computed / likely if likely else 0.0,
        flop=whole.flop,
        parts=parts,
    )


def _parts(work: Work, job: Job, rates: Rates) -> dict[str, float]:
    """Seconds by kind of work."""
    stored = rates.weights / UNPACK if job.quant is not None else rates.weights
    found = {
        "products": _over(work.products, rates.products_at(job.architecture.hidden)),
        "low-rank updates": _over(work.thin, rates.thin_at(rank_of(job.adapter))),
        "attention": _over(work.attention, rates.attention),
        "softmax": _over(work.softmax, rates.softmax),
        "elementwise": _over(work.elementwise, rates.elementwise),
        "weights": _over(work.weights, stored),
        "optimizer": _over(work.updated, rates.update),
    }
    return {name: value for name, value in found.items() if value > 0}


def _over(amount: float, rate: float) -> float:
    return amount / rate if rate else 0.0
