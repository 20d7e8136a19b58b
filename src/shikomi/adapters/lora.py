"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, eq. 3)."""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from shikomi.quant._dense import Dense, apply


@dataclass(frozen=True)
class Lora:
    """h = W0 x + (lora_alpha / r) B A x with A (r, in) and B (out, r); W0 stays frozen and B starts at zero.

    Field names and meanings are PEFT's `LoraConfig`.
    """

    name: ClassVar[str] = "lora"

    r: Annotated[int, Field(ge=1, le=4096, description="rank of the update")] = 16
    lora_alpha: Annotated[float, Field(gt=0, description="scale of the update: lora_alpha / r")] = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1, description="dropout on the input of A while training")] = 0.0
    target_modules: Annotated[
        str | list[str], Field(description="module names (suffixes), one regular expression, or all-linear")
    ] = "all-linear"
    exclude_modules: Annotated[str | list[str] | None, Field(description="left out of target_modules")] = None
    layers_to_transform: Annotated[list[int] | None, Field(description="only these layers, counted from 0")] = None
    bias: Annotated[Literal["none", "all", "lora_only"], Field(description="which biases are trained")] = "none"
    modules_to_save: Annotated[list[str] | None, Field(description="modules trained and saved whole")] = None
    use_rslora: Annotated[bool, Field(description="scale by lora_alpha / sqrt(r) (arXiv:2312.03732)")] = False
    rank_pattern: Annotated[dict[str, int] | None, Field(description="r for modules whose name matches")] = None
    alpha_pattern: Annotated[dict[str, float] | None, Field(description="lora_alpha for modules that match")] = None
    init_lora_weights: Annotated[
        bool | Literal["gaussian"], Field(description="true: A Kaiming-uniform, B zero; gaussian: A normal / r")
    ] = True

    def scaling(self, r: int, lora_alpha: float) -> float:
        return lora_alpha / (math.sqrt(r) if self.use_rslora else r)


class LoraLinear(nn.Module):
    """A base linear map with a low-rank update beside it; A and B are fp32 masters."""

    def __init__(
        self, base: Dense, r: int, scaling: float, dropout: float, init: bool | str, generator: torch.Generator
    ):
        super().__init__()
        self.inner = base
        self.in_features, self.out_features, self.r = base.in_features, base.out_features, r
        self.scaling, self.dropout = scaling, dropout
        self.key: int | None = None  # seeds the dropout mask of this forward and its backward; None: no dropout
        self.enabled = True
        a = torch.empty(r, base.in_features)
        if init == "gaussian":
            a.normal_(0, 1 / r, generator=generator)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        b = torch.zeros(base.out_features, r)
        if not init:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(a.to(base.weight.device))
        self.lora_B = nn.Parameter(b.to(base.weight.device))

    @property
    def base(self) -> Dense:
        return self.inner

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that reads it instead of calling the layer."""
        return self.inner.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.inner.bias

    @property
    def needs_input(self) -> bool:
        return self.enabled or self.inner.needs_input

    def trained(self) -> list[nn.Parameter]:
        own = [p for p in (self.lora_A, self.lora_B) if p.requires_grad] if self.enabled else []
        return own + self.inner.trained()

    def _dropped(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.key is None or self.dropout == 0:
            return x, None
        generator = torch.Generator(x.device).manual_seed(self.key)
        keep = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        keep.bernoulli_(1 - self.dropout, generator=generator).div_(1 - self.dropout)
        return x * keep, keep

    def add_delta(self, y: Tensor, x: Tensor) -> None:
        if self.enabled:
            x, _ = self._dropped(x)
            xa = F.linear(x, self.lora_A.detach().to(x.dtype))  # (N, r)
            y.addmm_(xa, self.lora_B.detach().to(x.dtype).t(), alpha=self.scaling)

    def delta_gradients(self, dx: Tensor | None, dy: Tensor, x: Tensor | None) -> list[Tensor]:
        grads = []
        if self.enabled:
            assert x is not None
            a, b = self.lora_A.detach().to(dy.dtype), self.lora_B.detach().to(dy.dtype)
            dropped, keep = self._dropped(x)
            dyb = dy @ b  # (N, r)
            if self.lora_A.requires_grad:
                grads.append((dyb.t() @ dropped).float().mul_(self.scaling))
            if self.lora_B.requires_grad:
                grads.append((dy.t() @ F.linear(dropped, a)).float().mul_(self.scaling))
            if dx is not None and keep is None:
                dx.addmm_(dyb, a, alpha=self.scaling)
            elif dx is not None and keep is not None:
                dx.addcmul_(dyb @ a, keep, value=self.scaling)
        return grads + self.inner.delta_gradients(dx, dy, x)

    def delta_weight(self) -> Tensor:
        """(lora_alpha / r) B A as (out, in) in fp32."""
        return (self.lora_B.detach().float() @ self.lora_A.detach().float()) * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        return apply(self, x)
