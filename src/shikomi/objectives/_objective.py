"""What every objective gives and gets."""

from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from shikomi.model.logprobs import Scored


class Term(NamedTuple):
    """One summand of the loss: coefficient * total / weight, the weight counted over the whole optimizer step."""

    total: Tensor  # scalar, a sum over this micro-batch, to be minimized
    weight: str  # which count of the step divides it: "tokens" or "sequences"
    coefficient: float = 1.0


class Outcome(NamedTuple):
    """Terms of the loss of one micro-batch, and detached sums for the log, divided by the same weights."""

    terms: dict[str, Term]
    metrics: dict[str, Term]


class Objective(Protocol):
    """A frozen class whose fields are the method's options."""

    name: ClassVar[str]

    def __call__(self, scored: Scored) -> Outcome:
        """The method's equation on the scored tokens of one micro-batch; additive over micro-batches."""
