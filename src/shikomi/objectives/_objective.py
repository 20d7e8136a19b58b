"""What every objective gives and gets."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from shikomi.data.pairs import PackedPreferences
from shikomi.model.logprobs import Scored


class Preferences(NamedTuple):
    """What an objective sees of a micro-batch of preferences: S completions, each of them chosen or rejected.

    With `data = "pairs"` chosen[i] and rejected[i] answer the same prompt and lie in the same micro-batch; with
    `data = "thumbs"` the two are the desirable and the undesirable completions, in any number. What an objective's
    `needs` do not name may be None.
    """

    logp: Tensor  # (N,) fp32, of each scored token of the completions; empty where the objective needs values alone
    segment: Tensor  # (N,) int64, number of the completion in the micro-batch, 0 to S - 1, ascending
    chosen: Tensor  # (P,) int64, numbers of the chosen completions
    rejected: Tensor  # (P,) or (S - P,) int64, numbers of the rejected completions
    ref_logp: Tensor | None = None  # (N,) fp32, the same tokens under the reference; no gradient
    prompt_logp: Tensor | None = None  # (M,) fp32, tokens of each pair's prompt after its first, once a pair; any order
    value: Tensor | None = None  # (S,) fp32, what a reward model gives each completion
    margin: Tensor | None = None  # (P,) fp32, by how much the chosen one is said to be better, in units of value
    kl: Tensor | None = None  # scalar, KTO's baseline of the whole optimizer step, at least 0; no gradient


class Term(NamedTuple):
    """One summand of the loss: coefficient * total / weight, the weight counted over the whole optimizer step."""

    total: Tensor  # scalar, a sum over this micro-batch, to be minimized
    weight: str  # which count of the step divides it: "tokens", "sequences", or another of `preference_counts`
    coefficient: float = 1.0


class Outcome(NamedTuple):
    """Terms of the loss of one micro-batch, and detached sums for the log, divided by the same weights.

    `differences` are further numbers for the log: name -> (a, b) is metric a minus metric b, where both have a count.
    """

    terms: dict[str, Term]
    metrics: dict[str, Term]
    differences: Mapping[str, tuple[str, str]] = {}


RecordT = TypeVar("RecordT", contravariant=True)


class Objective(Protocol[RecordT]):
    """A frozen class whose fields are the method's options; its record is Scored, or Preferences for preferences."""

    @property
    def name(self) -> str:
        """The stem of the method's file."""

    @property
    def data(self) -> str:
        """Which rows it trains on: "conversations" (Scored), "pairs" or "thumbs" (Preferences)."""

    @property
    def needs(self) -> frozenset[str]:
        """Which optional fields of the record it reads: ref_logp, prompt_logp, value, kl; {value}: it reads no logp."""

    def __call__(self, scored: RecordT, /) -> Outcome:
        """The method's equation on one micro-batch; additive over micro-batches."""


def preferences(
    scored: Scored,
    batch: PackedPreferences,
    ref_logp: Tensor | None = None,
    value: Tensor | None = None,
    kl: Tensor | None = None,
) -> Preferences:
    """The record of a micro-batch from what the model gave for `batch.packed`.

    `ref_logp` is the reference's logp of the same micro-batch, (N + M,) as in `scored`; value (S,) is read at
    `batch.ends`; kl is that of the whole optimizer step.
    """
    answers = len(scored.logp) - batch.prompt_tokens  # N; the prompts' tokens come last
    device = scored.logp.device
    return Preferences(
        logp=scored.logp[:answers],
        segment=scored.segment[:answers],
        chosen=torch.tensor(batch.chosen, dtype=torch.int64, device=device),
        rejected=torch.tensor(batch.rejected, dtype=torch.int64, device=device),
        ref_logp=None if ref_logp is None else ref_logp[:answers],
        prompt_logp=scored.logp[answers:],
        value=value,
        margin=torch.tensor(batch.margin, dtype=torch.float32, device=device) if batch.margin else None,
        kl=kl,
    )


def preference_counts(batches: Sequence[PackedPreferences]) -> dict[str, int]:
    """What the terms of preference objectives are divided by, from all micro-batches of a step; ranks add up.

    `tokens` are those of the completions; `pairs` equals `chosen`, and means nothing for judged answers.
    """
    chosen = sum(len(batch.chosen) for batch in batches)
    chosen_tokens = sum(batch.lengths[number] for batch in batches for number in batch.chosen)
    return {
        "tokens": sum(sum(batch.lengths) for batch in batches),
        "sequences": sum(len(batch.lengths) for batch in batches),
        "pairs": chosen,
        "chosen": chosen,
        "rejected": sum(len(batch.rejected) for batch in batches),
        "chosen_tokens": chosen_tokens,
        "prompt_and_chosen_tokens": chosen_tokens + sum(batch.prompt_tokens for batch in batches),
    }


def divided(terms: Mapping[str, Term], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Each term's share of the whole step; a term of which the step has none (no rejected completion) is left out."""
    return {k: t.total * (t.coefficient / counts[t.weight]) for k, t in terms.items() if counts[t.weight]}
