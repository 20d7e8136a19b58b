"""Random micro-batches of preferences, parts of them, and the loss of a step made of such parts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shikomi.model.logprobs import Scored
from shikomi.objectives._objective import Outcome, Preferences, divided

PROMPT = 4  # scored prompt tokens of each pair


def record(chosen: Sequence[int], rejected: Sequence[int], seed: int = 0, scale: float = 3.0) -> Preferences:
    """Completions of so many tokens, numbered in random order, with every field filled; logp and value are leaves."""
    generator = torch.Generator().manual_seed(seed)
    total = len(chosen) + len(rejected)
    numbers = torch.randperm(total, generator=generator)
    lengths = torch.empty(total, dtype=torch.long)
    lengths[numbers] = torch.tensor([*chosen, *rejected])

    def negative(n: int) -> Tensor:
        return -torch.rand(n, generator=generator) * scale - 0.05

    n = int(lengths.sum())
    return Preferences(
        logp=negative(n).requires_grad_(),
        segment=torch.repeat_interleave(torch.arange(total), lengths),
        chosen=numbers[: len(chosen)],
        rejected=numbers[len(chosen) :],
        ref_logp=negative(n),
        prompt_logp=negative(PROMPT * len(chosen)),
        value=torch.randn(total, generator=generator).requires_grad_(),
        margin=torch.rand(len(chosen), generator=generator),
        kl=torch.tensor(0.3),
    )


def by_hand(chosen: Sequence[Sequence[float]], rejected: Sequence[Sequence[float]], **more: Tensor) -> Preferences:
    """A record of the given log-probabilities, all chosen completions first."""
    tokens = [torch.tensor(list(completion)) for completion in (*chosen, *rejected)]
    lengths = torch.tensor([len(t) for t in tokens])
    numbers = torch.arange(len(tokens))
    return Preferences(
        torch.cat(tokens).requires_grad_(),
        torch.repeat_interleave(numbers, lengths),
        numbers[: len(chosen)],
        numbers[len(chosen) :],
        **more,
    )


def part(whole: Preferences, chosen: Sequence[int], rejected: Sequence[int]) -> Preferences:
    """The micro-batch of only these entries of `whole.chosen` and `whole.rejected`."""
    kept = sorted([*whole.chosen[list(chosen)].tolist(), *whole.rejected[list(rejected)].tolist()])
    tokens = torch.isin(whole.segment, torch.tensor(kept, dtype=torch.long))
    new = {number: i for i, number in enumerate(kept)}
    assert whole.ref_logp is not None and whole.prompt_logp is not None
    assert whole.value is not None and whole.margin is not None
    return Preferences(
        logp=whole.logp[tokens],
        segment=torch.tensor([new[int(s)] for s in whole.segment[tokens]], dtype=torch.long),
        chosen=torch.tensor([new[int(whole.chosen[i])] for i in chosen], dtype=torch.long),
        rejected=torch.tensor([new[int(whole.rejected[i])] for i in rejected], dtype=torch.long),
        ref_logp=whole.ref_logp[tokens],
        prompt_logp=whole.prompt_logp.reshape(-1, PROMPT)[list(chosen)].flatten(),
        value=whole.value[kept],
        margin=whole.margin[list(chosen)],
        kl=whole.kl,
    )


def counts(scored: Preferences) -> dict[str, int]:
    """What a step of this one micro-batch divides by, counted from the record itself."""
    lengths = torch.bincount(scored.segment, minlength=len(scored.chosen) + len(scored.rejected))
    chosen_tokens = int(lengths[scored.chosen].sum())
    return {
        "tokens": len(scored.logp),
        "sequences": len(lengths),
        "pairs": len(scored.chosen),
        "chosen": len(scored.chosen),
        "rejected": len(scored.rejected),
        "chosen_tokens": chosen_tokens,
        "prompt_and_chosen_tokens": chosen_tokens + (0 if scored.prompt_logp is None else len(scored.prompt_logp)),
    }


def loss(outcome: Outcome, divide: dict[str, int]) -> Tensor:
    """The loss of a micro-batch in a step with these counts."""
    return torch.stack(list(divided(outcome.terms, divide).values())).sum()


def metrics(outcome: Outcome, divide: dict[str, int]) -> dict[str, float]:
    """What the log shows of a step of one micro-batch."""
    shown = {name: float(value) for name, value in divided(outcome.metrics, divide).items()}
    for name, (a, b) in outcome.differences.items():
        if a in shown and b in shown:
            shown[name] = shown[a] - shown[b]
    return shown


def micro_batches(name: str, seed: int = 0) -> tuple[Scored | Preferences, list[Scored | Preferences], dict[str, int]]:
    """A step in one piece and split as finely as objectives of data `name` allow, and its counts."""
    if name == "conversations":
        ids = torch.repeat_interleave(torch.arange(3), torch.tensor([3, 5, 2]))
        logp = -torch.rand(10, generator=torch.Generator().manual_seed(seed)) * 3 - 0.1
        whole = Scored(logp.requires_grad_(), ids)
        pieces = [Scored(whole.logp[ids == i], ids[ids == i] * 0) for i in range(3)]
        return whole, [*pieces], {"tokens": 10, "sequences": 3}
    if name == "pairs":
        pairs = record([3, 5, 2], [4, 1, 6], seed)
        return pairs, [part(pairs, [i], [i]) for i in range(3)], counts(pairs)
    thumbs = record([3, 5], [4, 1, 6], seed)
    parts = [*(part(thumbs, [i], []) for i in range(2)), *(part(thumbs, [], [i]) for i in range(3))]
    return thumbs, [*parts], counts(thumbs)
