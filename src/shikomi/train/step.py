"""One optimizer step's gradients: weights are counted first, then every micro-batch adds its exact share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shikomi.data.packing import Packed, micro_batches, pack
from shikomi.data.pairs import PackedPreferences, mismatched, pack_pairs, pack_thumbs, unshared_length
from shikomi.model.language_model import LanguageModel
from shikomi.model.logprobs import Scored
from shikomi.objectives._objective import Objective, Preferences, divided, preference_counts, preferences
from shikomi.train.prepare import Given, Reference, prepare


class Plan(NamedTuple):
    """An optimizer step before it is computed."""

    micro: list[Packed]
    counts: dict[str, int]  # what the terms of the loss are divided by
    tokens: int  # all tokens, as the data has them
    computed: int  # tokens that are computed with a gradient: shared prefixes once
    preferences: Sequence[PackedPreferences] = ()  # which completions each of `micro` holds; none for conversations
    mismatched: Sequence[PackedPreferences] = ()  # prompts with answers to others, where the objective needs `kl`


def plan_step(
    examples: Sequence[Any],
    micro_batch_tokens: int,
    share_prefix: bool,
    data: str = "conversations",
    needs: frozenset[str] = frozenset(),
    max_length: int | None = None,
) -> Plan:
    """Packs the examples of one optimizer step and counts what its loss will be divided by.

    `data` and `needs` are the objective's; examples are Example, Pair or Thumb, as `data` says. `max_length` cuts the
    answers that `kl` puts after other prompts.
    """
    if data == "conversations":
        micro = [pack(part, share_prefix) for part in micro_batches(examples, micro_batch_tokens)]
        return _plan(micro, {"tokens": sum(len(p.targets) for p in micro), "sequences": len(examples)})
    tokens = len if share_prefix else unshared_length
    parts = micro_batches(examples, micro_batch_tokens, tokens)
    if data == "pairs":
        batches = [pack_pairs(part, share_prefix, "prompt_logp" in needs) for part in parts]
    else:
        batches = [pack_thumbs(part, share_prefix) for part in parts]
    others = mismatched(examples, max_length) if "kl" in needs else []
    other_batches = [pack_thumbs(part, share_prefix) for part in micro_batches(others, micro_batch_tokens)]
    plan = _plan([batch.packed for batch in batches], preference_counts(batches))
    return plan._replace(preferences=batches, mismatched=other_batches)


def _plan(micro: list[Packed], counts: dict[str, int]) -> Plan:
    return Plan(micro, counts, sum(p.n_tokens for p in micro), sum(len(p.ids) for p in micro))


def gradients(
    lm: LanguageModel,
    objective: Objective[Any],
    plan: Plan,
    key: int,
    scale: float = 1.0,
    reference: Reference | None = None,
) -> dict[str, Tensor]:
    """Adds the gradients of the step's loss to the parameters; returns loss and metrics as detached scalars.

    Each term is divided by its own count over the whole step inside its micro-batch, so that micro-batches, packing
    and their order cannot change the gradient. `scale` multiplies the loss for fp16; `key` seeds dropout.
    """
    given = prepare(lm, objective.needs, plan.preferences, plan.mismatched, reference)
    total = _Total()
    for index in range(len(plan.micro)):
        lm.bind_dropout(key + index)
        loss = total.add(lm, objective, plan, given, index)
        (loss * scale).backward()
    lm.bind_dropout(None)
    return total.shown()


def losses(
    lm: LanguageModel, objective: Objective[Any], plan: Plan, reference: Reference | None = None
) -> dict[str, Tensor]:
    """What `gradients` returns, without any: the loss and metrics of held-back rows."""
    given = prepare(lm, objective.needs, plan.preferences, plan.mismatched, reference)
    total = _Total()
    lm.bind_dropout(None)
    with torch.no_grad():
        for index in range(len(plan.micro)):
            total.add(lm, objective, plan, given, index)
    return total.shown()


class _Total:
    """Loss and metrics of a step, summed over its micro-batches."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.differences: dict[str, tuple[str, str]] = {}

    def add(self, lm: LanguageModel, objective: Objective[Any], plan: Plan, given: Given, index: int) -> Tensor:
        """The loss of one micro-batch, with autograd where it is enabled."""
        outcome = objective(_record(lm, objective.needs, plan, given, index))
        parts = divided(outcome.terms, plan.counts)
        loss = torch.stack(list(parts.values())).sum()
        shown = {"loss": loss, **(parts if len(parts) > 1 else {}), **divided(outcome.metrics, plan.counts)}
        for name, value in shown.items():
            self.sums[name] = self.sums[name] + value.detach() if name in self.sums else value.detach()
        self.differences.update(outcome.differences)
        return loss

    def shown(self) -> dict[str, Tensor]:
        """The sums, the loss first, and the differences of those that are there."""
        there = {name: ab for name, ab in self.differences.items() if ab[0] in self.sums and ab[1] in self.sums}
        return self.sums | {name: self.sums[a] - self.sums[b] for name, (a, b) in there.items()}


def _record(lm: LanguageModel, needs: frozenset[str], plan: Plan, given: Given, index: int) -> Any:
    """What the objective sees of a micro-batch: Scored, or Preferences.

    One that needs values alone costs no log-probabilities.
    """
    if not plan.preferences:
        return lm.score(plan.micro[index])
    batch = plan.preferences[index]
    if needs == {"value"}:
        scored = Scored(torch.empty(0, device=lm.device), torch.empty(0, dtype=torch.int64, device=lm.device))
    else:
        scored = lm.score(batch.packed)
    value = lm.values(batch.packed, batch.ends) if "value" in needs else None
    ref_logp = None if given.ref_logp is None else given.ref_logp[index]
    record: Preferences = preferences(scored, batch, ref_logp, value, given.kl)
    return record
