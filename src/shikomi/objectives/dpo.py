"""DPO: direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, eq. 7)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from shikomi.errors import BadInput, Problem
from shikomi.objectives._objective import Outcome, Preferences, Term
from shikomi.objectives._preference import (
    chosen_nll,
    completion_means,
    completion_sums,
    reference_metrics,
    sides,
    smoothed_sigmoid_loss,
    token_log_ratios,
)


@dataclass(frozen=True)
class Dpo:
    """L = -log sigmoid(beta * d), d = log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected), mean of pairs.

    The log-ratios are summed over a completion's tokens. `loss_type` changes what is done with d:

    - sigmoid: eq. 7; with `label_smoothing` e, -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d) (cDPO).
    - sigmoid_norm: the same with log-ratios averaged over each completion's tokens.
    - hinge: max(0, 1 - beta d) (SLiC, arXiv:2305.10425; RSO, arXiv:2309.06657).
    - robust: (-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e), unbiased when labels are wrong with
      probability e (arXiv:2403.00409).

    `rpo_alpha` adds that much of the chosen completions' negative log-likelihood, averaged over their tokens
    (arXiv:2404.19733, which averages it over each completion first). Rewards in the log are beta times summed ratios.
    """

    name: ClassVar[str] = "dpo"
    data: ClassVar[str] = "pairs"
    needs: ClassVar[frozenset[str]] = frozenset({"ref_logp"})

    beta: Annotated[float, Field(gt=0, description="how strongly the model is held to the reference")] = 0.1
    loss_type: Annotated[
        Literal["sigmoid", "sigmoid_norm", "hinge", "robust"], Field(description="the loss of a pair's margin")
    ] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5, description="probability that a label is wrong")] = 0.0
    rpo_alpha: Annotated[float | None, Field(gt=0, description="weight of the chosen answers' likelihood (RPO)")] = None

    def __post_init__(self) -> None:
        if self.loss_type == "hinge" and self.label_smoothing:
            raise BadInput(
                [
                    Problem(
                        "`loss_type: hinge` has no `label_smoothing`",
                        found=str(self.label_smoothing),
                        allowed="0 with hinge",
                        fix="delete `label_smoothing`, or choose sigmoid, sigmoid_norm or robust",
                    )
                ]
            )

    def __call__(self, scored: Preferences) -> Outcome:
        ratios = token_log_ratios(scored)
        summed = completion_sums(scored, ratios)  # (S,)
        compared = completion_means(scored, ratios) if self.loss_type == "sigmoid_norm" else summed
        chosen, rejected = sides(scored, compared)  # (P,)
        terms = {"dpo": Term(self._loss(self.beta * (chosen - rejected)).sum(), "pairs")}
        metrics = reference_metrics(scored, summed, self.beta)
        if self.rpo_alpha is not None:
            nll = chosen_nll(scored)
            terms["nll"] = Term(nll, "chosen_tokens", self.rpo_alpha)
            metrics["nll_loss"] = Term(nll.detach(), "chosen_tokens")
        return Outcome(terms, metrics)

    def _loss(self, logits: Tensor) -> Tensor:
        e = self.label_smoothing
        if self.loss_type == "hinge":
            return F.relu(1 - logits)
        if self.loss_type == "robust":
            return (e * F.logsigmoid(-logits) - (1 - e) * F.logsigmoid(logits)) / (1 - 2 * e)
        return smoothed_sigmoid_loss(logits, e)
