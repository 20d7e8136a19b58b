"""KTO: Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7)."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from shikomi.objectives._objective import Outcome, Preferences, Term
from shikomi.objectives._preference import completion_sums, given, side_metrics, token_log_ratios


@dataclass(frozen=True)
class Kto:
    """L = w (1 - sigmoid(+-beta (r - kl))), + for desirable completions, - for undesirable, mean of completions.

    r = log p(completion) / p_ref(completion), summed over its tokens; w is `desirable_weight` or `undesirable_weight`.
    `kl` is the reference point: one number of the whole optimizer step, without gradient (`kl_baseline`). Rows need no
    partner: a step or a micro-batch may hold any number of either kind. With unequal numbers the paper asks for
    desirable_weight * n_desirable / (undesirable_weight * n_undesirable) between 1 and 4/3 (eq. 8).
    """

    name: ClassVar[str] = "kto"
    data: ClassVar[str] = "thumbs"
    needs: ClassVar[frozenset[str]] = frozenset({"ref_logp", "kl"})

    beta: Annotated[float, Field(gt=0, description="how strongly the model is held to the reference")] = 0.1
    desirable_weight: Annotated[float, Field(ge=0, description="weight of desirable completions")] = 1.0
    undesirable_weight: Annotated[float, Field(ge=0, description="weight of undesirable completions")] = 1.0

    def __call__(self, scored: Preferences) -> Outcome:
        kl = given(scored.kl, "kl").detach()
        ratios = completion_sums(scored, token_log_ratios(scored))  # (S,)
        gain = self.beta * (ratios - kl)
        desirable = self.desirable_weight * torch.sigmoid(-gain.index_select(0, scored.chosen))
        undesirable = self.undesirable_weight * torch.sigmoid(gain.index_select(0, scored.rejected))
        logps = completion_sums(scored, scored.logp)
        return Outcome(
            {"kto": Term(desirable.sum() + undesirable.sum(), "sequences")},
            {
                **side_metrics(scored, self.beta * ratios, logps, ("chosen", "rejected")),
                "kl": Term(kl * len(ratios), "sequences"),
            },
            {"rewards/margins": ("rewards/chosen", "rewards/rejected")},
        )


def kl_baseline(log_ratios: Tensor) -> Tensor:
    """max(0, mean log p(y') / p_ref(y')) over the mismatched pairs (x, y') of a whole optimizer step, (n,) -> scalar.

    The estimate of KL(p || p_ref) in section 4.1, biased but without sampling (`shikomi.data.pairs.mismatched` makes
    the pairs); 0 for a step that has none.
    """
    if not len(log_ratios):
        return log_ratios.new_zeros(())
    return log_ratios.detach().mean().clamp(min=0)
