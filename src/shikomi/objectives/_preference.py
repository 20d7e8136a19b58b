"""What the preference objectives share: sums over completions, the two sides of pairs, smoothed losses, metrics."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from shikomi.objectives._objective import Preferences, Term

NEAREST_ZERO = -(2.0**-20)
"""The log-probability that stands for those nearer to zero: in fp32 a softmax cannot tell them from zero."""


def given(value: Tensor | None, name: str) -> Tensor:
    """A field of the record that the objective needs; raises ValueError where the engine left it out."""
    if value is None:
        raise ValueError(f"the record holds no `{name}`, which this objective's `needs` name")
    return value


def completion_sums(scored: Preferences, values: Tensor) -> Tensor:
    """Sums (S,) of values (N,) over each completion's tokens.

    A sum over a masked row is deterministic on every device, where a scatter is not; N times S is small.
    """
    numbers = torch.arange(len(scored.chosen) + len(scored.rejected), device=values.device)
    own = scored.segment == numbers[:, None]  # (S, N)
    return torch.where(own, values, 0.0).sum(1)  # (S,)


def completion_lengths(scored: Preferences) -> Tensor:
    """Scored tokens (S,) of each completion, as floats."""
    return completion_sums(scored, torch.ones_like(scored.logp))


def completion_means(scored: Preferences, values: Tensor) -> Tensor:
    """Means (S,) of values (N,) over each completion's tokens; 0 for a completion without any."""
    return completion_sums(scored, values) / completion_lengths(scored).clamp(min=1)


def token_log_ratios(scored: Preferences) -> Tensor:
    """log p(token) - log p_ref(token), (N,): subtracted before they are summed, so that rounding stays small."""
    return scored.logp - given(scored.ref_logp, "ref_logp").detach()


def sides(scored: Preferences, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values (S,) of the chosen completions and of the rejected ones."""
    return values.index_select(0, scored.chosen), values.index_select(0, scored.rejected)


def chosen_nll(scored: Preferences) -> Tensor:
    """-log p summed over all tokens of all chosen completions, a scalar; its weight is "chosen_tokens"."""
    return -completion_sums(scored, scored.logp).index_select(0, scored.chosen).sum()


def smoothed_sigmoid_loss(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x), elementwise: pairs whose label is wrong with probability e."""
    loss = -F.logsigmoid(logits) * (1 - label_smoothing)
    return loss - F.logsigmoid(-logits) * label_smoothing if label_smoothing else loss


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, by the branch that keeps its digits (Maechler 2012, eq. 7)."""
    near = x > -math.log(2)
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))  # values near 0 would give it a gradient of 0 * inf
    return torch.where(near, torch.log(-torch.expm1(x)), far)


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of log-probabilities; finite with a finite, non-zero gradient also where p is rounded to 1."""
    below_one = logp - (logp - NEAREST_ZERO).clamp(min=0).detach()  # the value is clamped, the gradient is not
    return below_one - log1mexp(below_one)


def side_metrics(scored: Preferences, rewards: Tensor, logps: Tensor, weights: tuple[str, str]) -> dict[str, Term]:
    """TRL's rewards/* and logps/*, and lengths/* in tokens, of both sides; rewards and logps are (S,)."""
    metrics = {}
    for name, values in (("rewards", rewards), ("logps", logps), ("lengths", completion_lengths(scored))):
        for side, of_side, weight in zip(("chosen", "rejected"), sides(scored, values.detach()), weights, strict=True):
            metrics[f"{name}/{side}"] = Term(of_side.sum(), weight)
    return metrics


def pair_metrics(scored: Preferences, rewards: Tensor, logps: Tensor) -> dict[str, Term]:
    """`side_metrics` of pairs, with TRL's rewards/margins and rewards/accuracies; rewards and logps are (S,)."""
    chosen, rejected = sides(scored, rewards.detach())
    return {
        **side_metrics(scored, rewards, logps, ("pairs", "pairs")),
        "rewards/margins": Term((chosen - rejected).sum(), "pairs"),
        "rewards/accuracies": Term((chosen > rejected).float().sum(), "pairs"),
    }


def reference_metrics(scored: Preferences, log_ratios: Tensor, beta: float) -> dict[str, Term]:
    """`pair_metrics` of a method with a reference, whose reward is beta * log_ratios (S,).

    `chosen_below_reference` is the share of pairs whose chosen completion has become less likely than under the
    reference: the margin can grow while both fall.
    """
    below = sides(scored, log_ratios.detach())[0] < 0
    return {
        **pair_metrics(scored, beta * log_ratios, completion_sums(scored, scored.logp)),
        "chosen_below_reference": Term(below.float().sum(), "pairs"),
    }
