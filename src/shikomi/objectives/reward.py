"""Reward model: Bradley-Terry likelihood of the chosen completion (Ouyang et al. 2022, arXiv:2203.02155, eq. 1)."""

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch.nn import functional as F

from shikomi.objectives._objective import Outcome, Preferences, Term
from shikomi.objectives._preference import given, sides


@dataclass(frozen=True)
class Reward:
    """L = -log sigmoid(r(chosen) - r(rejected) - margin), mean of pairs; margin is 0 where the rows have none.

    The margin is Llama 2's (arXiv:2307.09288, eq. 2). Only differences are learned, so `center_rewards_coefficient` c
    adds c (r(chosen) + r(rejected))^2 to keep rewards near zero (arXiv:2312.09244, eq. 2).
    """

    name: ClassVar[str] = "reward"
    data: ClassVar[str] = "pairs"
    needs: ClassVar[frozenset[str]] = frozenset({"value"})

    center_rewards_coefficient: Annotated[
        float | None, Field(gt=0, description="weight of the term that keeps rewards near zero; 0.01 is usual")
    ] = None

    def __call__(self, scored: Preferences) -> Outcome:
        value = given(scored.value, "value")  # (S,)
        chosen, rejected = sides(scored, value)  # (P,)
        difference = chosen - rejected
        margin = 0.0 if scored.margin is None else scored.margin
        terms = {"bradley_terry": Term(-F.logsigmoid(difference - margin).sum(), "pairs")}
        if self.center_rewards_coefficient is not None:
            terms["center"] = Term((chosen + rejected).square().sum(), "pairs", self.center_rewards_coefficient)
        return Outcome(
            terms,
            {
                "accuracy": Term((chosen > rejected).float().sum(), "pairs"),
                "margin": Term(difference.detach().sum(), "pairs"),
                "mean_reward": Term(value.detach().sum(), "sequences"),
            },
        )
