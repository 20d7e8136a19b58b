"""Supervised fine-tuning, and plain language modelling: maximum likelihood of the trained tokens."""

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from shikomi.model.logprobs import Scored
from shikomi.objectives._objective import Outcome, Term


@dataclass(frozen=True)
class Sft:
    """L = -(1 / n_tokens) * sum over trained tokens of log p(token | before), n over the whole optimizer step.

    The mean is over tokens, not over examples: long answers weigh more, as in the usual cross-entropy.
    `dft` weighs each token by its own detached probability (arXiv:2508.05629, eq. 9).
    """

    name: ClassVar[str] = "sft"
    data: ClassVar[str] = "conversations"
    needs: ClassVar[frozenset[str]] = frozenset()

    dft: Annotated[bool, Field(description="weigh each token by its detached probability (DFT)")] = False

    def __call__(self, scored: Scored) -> Outcome:
        nll = -scored.logp
        if self.dft:
            weighted = (nll * scored.logp.detach().exp()).sum()
            return Outcome({"dft": Term(weighted, "tokens")}, {"nll": Term(nll.detach().sum(), "tokens")})
        return Outcome({"nll": Term(nll.sum(), "tokens")}, {})
