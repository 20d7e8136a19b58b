"""ORPO: odds ratio preference optimization (Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch.nn import functional as F

from shikomi.objectives._objective import Outcome, Preferences, Term
from shikomi.objectives._preference import chosen_nll, completion_means, given, log_odds, pair_metrics, sides


@dataclass(frozen=True)
class Orpo:
    """L = NLL(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p), no reference.

    log p of a completion is the mean over its tokens (eq. 3); beta is the paper's lambda. The NLL is over the tokens of
    the chosen completions, as in the paper, or over those of their prompts too, as TRL has it; it is averaged over all
    these tokens of the step, the odds ratio over pairs. Rewards and logps in the log are per token.
    """

    name: ClassVar[str] = "orpo"
    data: ClassVar[str] = "pairs"

    beta: Annotated[float, Field(gt=0, description="weight of the odds ratio, the paper's lambda")] = 0.1
    nll: Annotated[
        Literal["answer", "prompt_and_answer"], Field(description="which tokens are learned by likelihood")
    ] = "answer"

    @property
    def needs(self) -> frozenset[str]:
        """The prompts' own tokens only where they are learned."""
        return frozenset({"prompt_logp"} if self.nll == "prompt_and_answer" else ())

    def __call__(self, scored: Preferences) -> Outcome:
        mean = completion_means(scored, scored.logp)  # (S,)
        chosen, rejected = sides(scored, log_odds(mean))  # (P,)
        ratio = F.logsigmoid(chosen - rejected)
        nll, weight = chosen_nll(scored), "chosen_tokens"
        if self.nll == "prompt_and_answer":
            nll, weight = nll - given(scored.prompt_logp, "prompt_logp").sum(), "prompt_and_chosen_tokens"
        return Outcome(
            {"nll": Term(nll, weight), "odds_ratio": Term(-ratio.sum(), "pairs", self.beta)},
            {
                **pair_metrics(scored, self.beta * mean, mean),
                "nll_loss": Term(nll.detach(), weight),
                "log_odds_ratio": Term(ratio.detach().sum(), "pairs"),
                "log_odds_chosen": Term((chosen - rejected).detach().sum(), "pairs"),
            },
        )
