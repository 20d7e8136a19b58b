"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, eq. 3)."""

import dataclasses
import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from shikomi.adapters import _attach
from shikomi.adapters._adapter import Attached, Capabilities, Declares, Reads, Shapes
from shikomi.adapters._modules import LoraEmbedding
from shikomi.adapters._shapes import lora_shapes, lora_targets
from shikomi.adapters._start import START, start_factors, taken_correction
from shikomi.quant._linear import Base, Gradients, LowRank, PlainLinear, apply


@dataclass(frozen=True)
class Lora(Declares):
    """h = W0 x + (lora_alpha / r) B A x with A (r, in) and B (out, r); W0 stays frozen and B starts at zero.

    Field names and meanings are PEFT's `LoraConfig`.
    """

    name: ClassVar[str] = "lora"
    capabilities: ClassVar[Capabilities] = Capabilities(mergeable=True, starts_as_base=True, context=False)

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
        bool | Literal["gaussian", "pissa", "olora", "loftq"],
        Field(
            description="true: A Kaiming-uniform, B zero; gaussian: A normal / r; pissa (arXiv:2404.02948): principal "
            "singular vectors of W0; olora (arXiv:2406.01775): its QR factors; loftq (arXiv:2310.08659): undoes the "
            "error of quant"
        ),
    ] = True
    loftq_iter: Annotated[int, Field(ge=1, le=100, description="loftq: how often storing and undoing alternate")] = 1

    def scaling(self, r: int, lora_alpha: float) -> float:
        return lora_alpha / (math.sqrt(r) if self.use_rslora else r)

    def attach(self, model: nn.Module, output_name: str | None, seed: int, tokenizer: Any) -> Attached:
        """Wraps the modules that `target_modules` names. Raises BadInput when nothing matches."""
        return _attach.attach(model, self, output_name, seed)

    def trained_shapes(self, model: Shapes) -> dict[str, tuple[int, ...]]:
        """A and B of every target, trained biases, and modules that are trained whole. Raises BadInput as `attach`."""
        return lora_shapes(model, self)

    def frozen_numbers(self, model: Shapes) -> int:
        """A start that is a part of the base is kept, to be subtracted."""
        if self.init_lora_weights not in START:
            return 0
        return sum(math.prod(shape) for name, shape in self.trained_shapes(model).items() if ".lora_" in name)

    @property
    def off_is_start(self) -> bool:
        """B starts at zero, and nothing of the base is trained beside it."""
        zero = self.init_lora_weights in (True, "gaussian")
        return zero and self.bias == "none" and not self.modules_to_save

    def reads(self, model: Shapes) -> Reads:
        """Inputs of the targets."""
        return Reads(frozenset(lora_targets(model, self)[0]))

    def wrap(self, base: Base, r: int, scaling: float, generator: torch.Generator) -> "LoraLinear":
        """The update of one linear map."""
        return LoraLinear(base, r, scaling, self.lora_dropout, self.init_lora_weights, generator)

    def wrap_embedding(
        self, path: str, base: nn.Embedding, r: int, scaling: float, generator: torch.Generator
    ) -> LoraEmbedding:
        """The update of an embedding."""
        return LoraEmbedding(base, r, scaling, generator)

    def wrap_frozen(self, module: nn.Module, a: Tensor, b: Tensor) -> "LoraLinear":
        """A linear layer with a scaled A (k, in) and B (out, k) that is not trained."""
        assert isinstance(module, PlainLinear)
        wrapped = LoraLinear(module.base, a.shape[0], 1.0, 0.0, True, torch.Generator())
        wrapped.lora_A.data, wrapped.lora_B.data = a, b
        return wrapped.requires_grad_(False)

    def peft_config(self) -> dict[str, Any]:
        """The options as fields of PEFT's LoraConfig."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Lora) if f.name != "loftq_iter"}
        if self.init_lora_weights == "loftq":  # PEFT would make A and B anew
            fields["init_lora_weights"] = True
        return {"peft_type": "LORA", "task_type": "CAUSAL_LM", **fields}


class LoraLinear(nn.Module):
    """A base linear map with a low-rank update beside it; A and B are fp32 masters.

    Where A and B start as a part of W0 (`start_A`, `start_B`), the update is B A - start_B start_A: the base stays as
    it was loaded. `frozen` is the scaled A and B of an earlier adapter, which is a part of the reference.
    """

    needs_output = False

    def __init__(
        self, base: Base, r: int, scaling: float, dropout: float, init: bool | str, generator: torch.Generator
    ):
        super().__init__()
        self.inner = base
        self.in_features, self.out_features, self.r = base.in_features, base.out_features, r
        self.scaling, self.dropout = scaling, dropout
        self.key: int | None = None  # seeds the dropout mask of this forward and its backward; None: no dropout
        self.enabled = True
        self.start: tuple[Tensor, Tensor] | None = None
        self.frozen: tuple[Tensor, Tensor] | None = None
        self.frozen_enabled = True
        a, b = torch.empty(r, base.in_features), torch.zeros(base.out_features, r)
        if init == "gaussian":
            a.normal_(0, 1 / r, generator=generator)
        elif init == "loftq":
            a, b = taken_correction(base, r, scaling)
        elif init in START:
            a, b = start_factors(str(init), base, r, scaling)
            self.start = (a.clone(), b.clone())
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        if not init:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(a.to(base.weight.device))
        self.lora_B = nn.Parameter(b.to(base.weight.device))

    @property
    def base(self) -> Base:
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
        return bool(self.trained())

    def own(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by PEFT's names."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def trained(self) -> list[nn.Parameter]:
        own = [p for p in self.own().values() if p.requires_grad] if self.enabled else []
        return own + self.inner.trained()

    def keep(self, frozen: tuple[Tensor, Tensor]) -> None:
        """Keeps an earlier adapter, scaled A (k, in) and B (out, k), frozen beside this one."""
        self.frozen = (frozen[0].to(self.lora_A.device), frozen[1].to(self.lora_B.device))

    def base_changed(self) -> None:
        """Told when the base's weight has been replaced."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole update in fp32: own, start and frozen, one below and beside the other."""
        a, b = [self.lora_A.detach()], [self.lora_B.detach()]
        if self.start is not None:
            a, b = [*a, self.start[0].to(a[0].device)], [*b, -self.start[1].to(b[0].device)]
        if self.frozen is not None:
            a, b = [*a, self.frozen[0]], [*b, self.frozen[1] / self.scaling]
        return (a[0], b[0]) if len(a) == 1 else (torch.cat(a), torch.cat(b, 1))

    def update(self) -> LowRank | None:
        dtype = self.inner.dtype
        if self.enabled:
            a, b = self.factors()
            return LowRank(a.to(dtype), (b * self.scaling).to(dtype), self.dropout, self.key)
        if self.frozen is not None and self.frozen_enabled:
            return LowRank(self.frozen[0].to(dtype), self.frozen[1].to(dtype))
        return None

    def factor(self) -> Tensor | None:
        return None

    def own_gradients(self, of: Gradients) -> list[Tensor]:
        if not self.enabled:
            return []
        assert of.a is not None and of.b is not None
        a, b = of.a[: self.r], of.b[:, : self.r].mul(self.scaling)
        return [g for g, p in ((a, self.lora_A), (b, self.lora_B)) if p.requires_grad]

    def merged_weight(self) -> Tensor:
        """W0 + (lora_alpha / r) B A as (out, in) in fp32."""
        a, b = self.factors()
        return self.inner.full_weight().addmm_(b.float(), a.float(), alpha=self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        return apply(self, x)
