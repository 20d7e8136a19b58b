"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353, eq. 5)."""

from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from shikomi.adapters._adapter import Reads, Shapes
from shikomi.adapters._modules import LoraEmbedding
from shikomi.adapters.lora import Lora, LoraLinear
from shikomi.errors import BadInput, Problem
from shikomi.quant._linear import Base, Gradients


@dataclass(frozen=True)
class Dora(Lora):
    """W' = m (W0 + s B A) / ||W0 + s B A||, the norm over the inputs of each output, m trained and starting at ||W0||.

    As in section 4.3 of the paper the norm is a constant in the gradient. Options are LoRA's; PEFT calls it
    `use_dora: true`.
    """

    name: ClassVar[str] = "dora"

    def trained_shapes(self, model: Shapes) -> dict[str, tuple[int, ...]]:
        """LoRA's, and m (out,) of every target."""
        found = {}
        for name, shape in super().trained_shapes(model).items():
            found[name] = shape
            if name.endswith(".lora_B.weight"):
                found[name.replace("lora_B.weight", "lora_magnitude_vector")] = shape[:1]
        return found

    def reads(self, model: Shapes) -> Reads:
        """Inputs and outputs of the targets: m's gradient is that of the output's length."""
        targets = super().reads(model).inputs
        return Reads(targets, targets)

    def wrap(self, base: Base, r: int, scaling: float, generator: torch.Generator) -> LoraLinear:
        return DoraLinear(base, r, scaling, self.lora_dropout, self.init_lora_weights, generator)

    def wrap_embedding(
        self, path: str, base: nn.Embedding, r: int, scaling: float, generator: torch.Generator
    ) -> LoraEmbedding:
        """Refuses: raises BadInput."""
        fix = "use adapter: lora, or leave it out of target_modules"
        raise BadInput([Problem(f"DoRA cannot adapt the embedding {path}", allowed="linear layers", fix=fix)])

    def peft_config(self) -> dict[str, Any]:
        return {**super().peft_config(), "use_dora": True}


class DoraLinear(LoraLinear):
    """A linear map whose rows get a trained length: y = m / ||W0 + s B A|| * (W0 + s B A) x + bias.

    The norm follows from ||W0||^2, kept, and products of rank r: ||W0 + s B A||^2 = ||W0||^2 + 2 s <B, W0 A^T> +
    s^2 <B (A A^T), B>, row by row.
    """

    def __init__(
        self, base: Base, r: int, scaling: float, dropout: float, init: bool | str, generator: torch.Generator
    ):
        super().__init__(base, r, scaling, dropout, init, generator)
        self._square: Tensor | None = None
        self._length: Tensor = torch.empty(0)
        self.lora_magnitude_vector = nn.Parameter(self.square().sqrt())
        if not init:
            self.lora_magnitude_vector.data = self.norm().clone()

    def keep(self, frozen: tuple[Tensor, Tensor]) -> None:
        super().keep(frozen)
        self.lora_magnitude_vector.data = self.norm().clone()

    @property
    def needs_output(self) -> bool:  # type: ignore[override]
        return self.enabled and self.lora_magnitude_vector.requires_grad

    def own(self) -> dict[str, nn.Parameter]:
        return {**super().own(), "lora_magnitude_vector": self.lora_magnitude_vector}

    def base_changed(self) -> None:
        self._square = None

    def square(self) -> Tensor:
        """||W0||^2 of every output row (out,) in fp32."""
        if self._square is None:
            self._square = self.inner.dequantize().float().square().sum(1)
        return self._square

    def norm(self) -> Tensor:
        """||W0 + s B A|| of every output row (out,) in fp32."""
        a, b = (t.float() for t in self.factors())
        along = (self.inner.dequantize() @ a.t().to(self.inner.dtype)).float()  # (out, r)
        square = self.square() + 2 * self.scaling * (b * along).sum(1)
        square += self.scaling**2 * ((b @ (a @ a.t())) * b).sum(1)
        return square.clamp_min(0).sqrt()

    def factor(self) -> Tensor | None:
        if not self.enabled:
            return None
        self._length = self.norm()
        return self.lora_magnitude_vector.detach() / self._length

    def own_gradients(self, of: Gradients) -> list[Tensor]:
        if not self.enabled:
            return []
        magnitude = [] if of.factor is None else [of.factor / self._length]  # as `factor` has just computed it
        return super().own_gradients(of) + magnitude

    def merged_weight(self) -> Tensor:
        factor = self.lora_magnitude_vector.detach() / self.norm()
        return super().merged_weight().mul_(factor[:, None])
