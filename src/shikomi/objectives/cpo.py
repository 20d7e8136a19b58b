"""CPO: contrastive preference optimization (Xu et al. 2024, arXiv:2401.08417, eq. 3)."""

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from shikomi.objectives._objective import Outcome, Preferences, Term
from shikomi.objectives._preference import chosen_nll, completion_sums, pair_metrics, sides, smoothed_sigmoid_loss


@dataclass(frozen=True)
class Cpo:
    """L = -log sigmoid(beta log p(chosen) - beta log p(rejected)) + cpo_alpha * NLL(chosen): DPO without a reference.

    Log-probabilities are summed over tokens. The NLL keeps the model near the data; it is averaged over the tokens of
    the chosen completions, as TRL does (the paper sums it over each completion).
    """

    name: ClassVar[str] = "cpo"
    data: ClassVar[str] = "pairs"
    needs: ClassVar[frozenset[str]] = frozenset()

    beta: Annotated[float, Field(gt=0, description="scale of the summed log-probabilities")] = 0.1
    cpo_alpha: Annotated[float, Field(ge=0, description="weight of the chosen answers' likelihood")] = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5, description="probability that a label is wrong")] = 0.0

    def __call__(self, scored: Preferences) -> Outcome:
        logps = completion_sums(scored, scored.logp)  # (S,)
        chosen, rejected = sides(scored, logps)  # (P,)
        loss = smoothed_sigmoid_loss(self.beta * (chosen - rejected), self.label_smoothing)
        nll = chosen_nll(scored)
        return Outcome(
            {"cpo": Term(loss.sum(), "pairs"), "nll": Term(nll, "chosen_tokens", self.cpo_alpha)},
            {**pair_metrics(scored, self.beta * logps, logps), "nll_loss": Term(nll.detach(), "chosen_tokens")},
        )
