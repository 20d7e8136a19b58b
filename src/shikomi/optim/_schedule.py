"""Learning-rate schedules: the factor of the peak rate at each step."""

import math

SCHEDULES = ("constant", "linear", "cosine", "wsd")
DECAY_SHARE = 0.2  # of all steps, the final decay of wsd


def warmup(warmup_steps: float, total: int) -> int:
    """Warm-up in steps: a number below 1 is a share of all steps."""
    return math.ceil(warmup_steps * total) if warmup_steps < 1 else int(warmup_steps)


def factor(kind: str, step: int, total: int, warm: int) -> float:
    """Share of the peak learning rate at `step` (from 0) of `total`, after `warm` steps of linear warm-up.

    constant; linear to 0; cosine to 0 (half a period); wsd: warm-up, stable, then linear to 0 over the last fifth
    (arXiv:2404.06395). The first step of a warm-up already learns.
    """
    if step < warm:
        return (step + 1) / (warm + 1)
    if kind == "constant":
        return 1.0
    if kind == "wsd":
        decay = max(1, math.ceil(DECAY_SHARE * total))
        return min(1.0, max(0.0, (total - step) / decay))
    done = (step - warm) / max(1, total - warm)
    if kind == "linear":
        return max(0.0, 1 - done)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    raise ValueError(f"unknown schedule {kind!r}: one of {', '.join(SCHEDULES)}")
