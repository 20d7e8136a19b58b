"""AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101)."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, in torch's fused kernel."""

    name: ClassVar[str] = "adamw"

    adam_beta1: Annotated[float, Field(ge=0, lt=1, description="decay of the mean of gradients")] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1, description="decay of the mean of squares")] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0, description="added to the root of the squares")] = 1e-8

    def build(
        self, trained: dict[str, nn.Parameter], learning_rate: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """An optimizer over `trained`; weight decay goes to matrices only, not to norms and biases."""
        matrices = [p for p in trained.values() if p.dim() > 1]
        vectors = [p for p in trained.values() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        betas = (self.adam_beta1, self.adam_beta2)
        groups = [g for g in groups if g["params"]]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=self.adam_epsilon, fused=True)
