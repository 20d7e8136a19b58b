"""The prepare phase of an optimizer step: what its objective needs that has no gradient, over all micro-batches."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from shikomi.data.pairs import PackedPreferences
from shikomi.model.language_model import LanguageModel
from shikomi.objectives._objective import preferences
from shikomi.objectives._preference import completion_sums, token_log_ratios
from shikomi.objectives.kto import kl_baseline


class Reference(Protocol):
    """Where log-probabilities under the reference come from; an objective cannot tell."""

    def __call__(self, batches: Sequence[PackedPreferences]) -> list[Tensor]:
        """log p_ref of each micro-batch's scored tokens: at least those of the completions, which come first."""


class Given(NamedTuple):
    """What is known of a step before its gradients."""

    ref_logp: list[Tensor] | None = None  # of each micro-batch
    kl: Tensor | None = None  # scalar, of the whole step


class Live:
    """The reference as a mode of the model that is trained: the same packing, the same kernels, without dropout."""

    def __init__(self, lm: LanguageModel):
        self.lm = lm

    def __call__(self, batches: Sequence[PackedPreferences]) -> list[Tensor]:
        self.lm.bind_dropout(None)
        with torch.no_grad(), self.lm.reference():
            return [self.lm.score(batch.packed).logp for batch in batches]


def prepare(
    lm: LanguageModel,
    needs: frozenset[str],
    batches: Sequence[PackedPreferences],
    mismatched: Sequence[PackedPreferences],
    reference: Reference | None,
) -> Given:
    """What the objective's `needs` name, for all micro-batches of a step; raises ValueError without a reference."""
    if not needs & {"ref_logp", "kl"}:
        return Given()
    if reference is None:
        raise ValueError("this objective compares with a reference, and none is given")
    kl = _baseline(lm, mismatched, reference) if "kl" in needs else None
    return Given(reference(batches), kl)


def _baseline(lm: LanguageModel, mismatched: Sequence[PackedPreferences], reference: Reference) -> Tensor:
    """KTO's reference point from prompts with answers to others; 0 for a step that has none."""
    if not mismatched:
        return torch.zeros((), device=lm.device)
    lm.bind_dropout(None)
    with torch.no_grad():
        scored = [lm.score(batch.packed) for batch in mismatched]
        pieces = zip(scored, mismatched, reference(mismatched), strict=True)
        records = [preferences(policy, batch, under) for policy, batch, under in pieces]
        return kl_baseline(torch.cat([completion_sums(r, token_log_ratios(r)) for r in records]))
