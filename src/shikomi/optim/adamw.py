"""AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), and LoRA+ (arXiv:2402.12354) as its parameter groups."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from shikomi.errors import BadInput, Problem
from shikomi.optim import _moments
from shikomi.optim._groups import Ratio, grouped, loraplus, same_rate
from shikomi.optim._places import Places


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, in torch's fused kernel.

    `loraplus_lr_ratio` makes it LoRA+: B, not A, learns that many times faster. Names are PEFT's.
    """

    name: ClassVar[str] = "adamw"

    adam_beta1: Annotated[float, Field(ge=0, lt=1, description="decay of the mean of gradients")] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1, description="decay of the mean of squares")] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0, description="added to the root of the squares")] = 1e-8
    loraplus_lr_ratio: Annotated[
        float | None, Field(ge=1, le=1000, description="LoRA+: B learns this many times faster than A, about 16")
    ] = None
    loraplus_lr_embedding: Annotated[
        float | None, Field(gt=0, le=1, description="LoRA+: learning rate of an embedding's A and B (PEFT: 1e-6)")
    ] = None

    def __post_init__(self) -> None:
        if self.loraplus_lr_embedding is not None and self.loraplus_lr_ratio is None:
            fix = "add loraplus_lr_ratio: 16, or delete loraplus_lr_embedding"
            raise BadInput([Problem("loraplus_lr_embedding has no effect without loraplus_lr_ratio", fix=fix)])

    def build(
        self, trained: dict[str, nn.Parameter], learning_rate: float, weight_decay: float, folder: Path | None = None
    ) -> torch.optim.Optimizer:
        """An optimizer over `trained`; weight decay goes to matrices only, not to norms and biases.

        `folder` is the run's, for an optimizer that keeps state on disk. Raises BadInput for LoRA+ where no low-rank B
        is trained.
        """
        groups = self.groups(trained, learning_rate, weight_decay)
        return torch.optim.AdamW(groups, fused=True, **self.defaults(learning_rate))

    def groups(
        self, trained: dict[str, nn.Parameter], learning_rate: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Parameter groups, with the rates of LoRA+ where it is asked for."""
        ratio: Ratio = same_rate
        if self.loraplus_lr_ratio is not None:
            ratio = loraplus(trained, learning_rate, self.loraplus_lr_ratio, self.loraplus_lr_embedding)
        return grouped(trained, learning_rate, weight_decay, ratio)

    def defaults(self, learning_rate: float) -> dict[str, Any]:
        """What the groups have in common."""
        return {"lr": learning_rate, "betas": (self.adam_beta1, self.adam_beta2), "eps": self.adam_epsilon}

    def state_bytes(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Bytes of optimizer state for trained tensors of these shapes, wherever it is kept."""
        return sum(_moments.state_bytes(math.prod(shape)) for shape in shapes.values())

    def places(self, shapes: Mapping[str, Sequence[int]], device: str) -> Places:
        """Where that state is, for a model on `device`."""
        return Places(device=self.state_bytes(shapes))

    def gradient_bytes(self, shapes: Mapping[str, Sequence[int]], micro_batches: int) -> int:
        """Bytes of the gradients that exist together at most, in a step of so many micro-batches."""
        return 4 * sum(math.prod(shape) for shape in shapes.values())
