"""What a run remembers between steps, and what a stage asks of the loop."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Values of a stage that the loop reads."""

    total_steps: int
    learning_rate: float
    schedule: str
    warmup_steps: int
    max_grad_norm: float | None
    micro_batch_tokens: int
    share_prefix: bool
    max_length: int
    seed: int
    eval_steps: int
    save_steps: int | None
    early_stopping_patience: int | None
    metric: str
    keep_best: bool


@dataclass
class State:
    """Everything that a checkpoint must hold besides tensors; plain numbers, so that it is JSON."""

    step: int = 0  # of this stage
    global_step: int = 0  # over all stages
    stage: int = 0
    micro_batch_tokens: int = 0  # effective: halved once by an out-of-memory
    trained_tokens: int = 0
    total_tokens: int = 0
    training_seconds: float = 0.0
    last_loss: float | None = None
    loss_scale: dict[str, Any] = field(default_factory=dict)  # fp16: state of the gradient scaler; empty elsewhere
    best: float | None = None
    best_step: int | None = None
    worse_evaluations: int = 0
    stopped_early: bool = False
    finished_stages: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def better(metric: str, value: float, best: float | None) -> bool:
    """Whether `value` beats `best`: losses and perplexities are better when small, scores when large."""
    if best is None:
        return True
    return value < best if metric.endswith(("loss", "perplexity")) else value > best
