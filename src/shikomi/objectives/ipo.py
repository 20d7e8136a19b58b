"""IPO: identity preference optimization (Azar et al. 2023, arXiv:2310.12036, eq. 17)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from shikomi.objectives._objective import Outcome, Preferences, Term
from shikomi.objectives._preference import (
    completion_means,
    completion_sums,
    reference_metrics,
    sides,
    token_log_ratios,
)


@dataclass(frozen=True)
class Ipo:
    """L = (d - 1 / (2 beta))^2, d = log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected), mean of pairs.

    beta is the paper's tau. It needs a reference, as DPO does; its margin has a target instead of no end. The paper
    writes d over whole completions (`log_ratio: sum`); its authors and current practice average each completion's
    log-ratio over its tokens (`mean`), since otherwise the target depends on length. Rewards in the log are beta times
    summed ratios.
    """

    name: ClassVar[str] = "ipo"
    data: ClassVar[str] = "pairs"
    needs: ClassVar[frozenset[str]] = frozenset({"ref_logp"})

    beta: Annotated[float, Field(gt=0, description="the paper's tau: the target of the margin is 1 / (2 beta)")] = 0.1
    log_ratio: Annotated[
        Literal["mean", "sum"], Field(description="a completion's log-ratio: mean over its tokens, or their sum")
    ] = "mean"

    def __call__(self, scored: Preferences) -> Outcome:
        ratios = token_log_ratios(scored)
        summed = completion_sums(scored, ratios)  # (S,)
        chosen, rejected = sides(scored, completion_means(scored, ratios) if self.log_ratio == "mean" else summed)
        loss = (chosen - rejected - 1 / (2 * self.beta)).square()  # (P,)
        return Outcome({"ipo": Term(loss.sum(), "pairs")}, reference_metrics(scored, summed, self.beta))
