"""SimPO: simple preference optimization (Meng et al. 2024, arXiv:2405.14734, eq. 6)."""

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from shikomi.objectives._objective import Outcome, Preferences, Term
from shikomi.objectives._preference import completion_means, pair_metrics, sides, smoothed_sigmoid_loss


@dataclass(frozen=True)
class Simpo:
    """L = -log sigmoid(beta log p(chosen) / |chosen| - beta log p(rejected) / |rejected| - gamma), mean of pairs.

    log p / |y| is the mean over a completion's tokens; there is no reference. gamma = beta * gamma_beta_ratio is the
    margin to be reached (TRL's `simpo_gamma`), given by its ratio since both grow together. beta is 20 times that of
    DPO and more, because the log-probabilities are per token. Rewards and logps in the log are per token.
    """

    name: ClassVar[str] = "simpo"
    data: ClassVar[str] = "pairs"
    needs: ClassVar[frozenset[str]] = frozenset()

    beta: Annotated[float, Field(gt=0, description="scale of the mean log-probabilities")] = 2.0
    gamma_beta_ratio: Annotated[float, Field(ge=0, description="margin to be reached, gamma, divided by beta")] = 0.5
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5, description="probability that a label is wrong")] = 0.0

    def __call__(self, scored: Preferences) -> Outcome:
        mean = completion_means(scored, scored.logp)  # (S,)
        chosen, rejected = sides(scored, mean)  # (P,)
        logits = self.beta * (chosen - rejected - self.gamma_beta_ratio)
        loss = smoothed_sigmoid_loss(logits, self.label_smoothing)
        return Outcome({"simpo": Term(loss.sum(), "pairs")}, pair_metrics(scored, self.beta * mean, mean))
