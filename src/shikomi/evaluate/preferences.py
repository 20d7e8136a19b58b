"""Held-back preferences: the objective's own loss and metrics on them, without gradients."""

from dataclasses import dataclass
from typing import Any

from shikomi.data.store import Store
from shikomi.model.language_model import LanguageModel
from shikomi.objectives._objective import Objective
from shikomi.train.prepare import Reference
from shikomi.train.step import losses, plan_step


@dataclass(frozen=True)
class PreferenceTask:
    """Held-back pairs or judged answers and how they are scored: all of them as if they were one optimizer step."""

    rows: Store[Any]
    objective: Objective[Any]
    reference: Reference | None
    micro_batch_tokens: int
    share_prefix: bool
    max_length: int


def evaluate_preferences(lm: LanguageModel, task: PreferenceTask) -> dict[str, float]:
    """`loss` and the objective's metrics, means over all rows; KTO's baseline is that of all rows too."""
    plan = plan_step(
        list(task.rows),
        task.micro_batch_tokens,
        task.share_prefix,
        task.objective.data,
        task.objective.needs,
        task.max_length,
    )
    return {name: float(value) for name, value in losses(lm, task.objective, plan, task.reference).items()}
