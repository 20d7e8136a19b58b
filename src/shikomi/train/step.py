"""One optimizer step's gradients: weights are counted first, then every micro-batch adds its exact share."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shikomi.data.packing import Example, Packed, micro_batches, pack
from shikomi.model.language_model import LanguageModel
from shikomi.objectives._objective import Objective


class Plan(NamedTuple):
    """An optimizer step before it is computed."""

    micro: list[Packed]
    counts: dict[str, int]  # what the terms of the loss are divided by
    tokens: int  # all tokens, as the data has them
    computed: int  # tokens that are computed: shared prefixes once


def plan_step(examples: Sequence[Example], micro_batch_tokens: int, share_prefix: bool) -> Plan:
    """Packs the examples of one optimizer step and counts what its loss will be divided by."""
    micro = [pack(part, share_prefix) for part in micro_batches(examples, micro_batch_tokens)]
    counts = {"tokens": sum(len(p.targets) for p in micro), "sequences": len(examples)}
    return Plan(micro, counts, sum(p.n_tokens for p in micro), sum(len(p.ids) for p in micro))


def gradients(lm: LanguageModel, objective: Objective, plan: Plan, key: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Adds the gradients of the step's loss to the parameters; returns loss and metrics as detached scalars.

    Each term is divided by its own count over the whole step inside its micro-batch, so that micro-batches, packing
    and their order cannot change the gradient. `scale` multiplies the loss for fp16.
    """
    sums: dict[str, Tensor] = {}
    for index, packed in enumerate(plan.micro):
        lm.bind_dropout(key + index)
        outcome = objective(lm.score(packed))
        parts = {k: t.total * (t.coefficient / plan.counts[t.weight]) for k, t in outcome.terms.items()}
        loss = torch.stack(list(parts.values())).sum()
        (loss * scale).backward()
        shown = {"loss": loss, **({k: v for k, v in parts.items()} if len(parts) > 1 else {})}
        shown |= {k: t.total * (t.coefficient / plan.counts[t.weight]) for k, t in outcome.metrics.items()}
        for name, value in shown.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    lm.bind_dropout(None)
    return sums
