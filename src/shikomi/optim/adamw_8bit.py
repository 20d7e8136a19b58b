"""AdamW whose moments take 8 bits (Dettmers et al. 2021, arXiv:2110.02861), by bitsandbytes, on CPU and CUDA."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from shikomi.optim import _moments
from shikomi.optim._by_tensor import TensorAdamW
from shikomi.optim._groups import is_embedding
from shikomi.optim.adamw import AdamW


@dataclass(frozen=True)
class AdamW8bit(AdamW):
    """AdamW with 2.03 bytes of state for a trained number instead of 8.

    Tensors below 4,096 elements keep 32 bits, and so do embeddings (unless `embedding_bits` says otherwise), as in
    transformers' Trainer: their gradients are too uneven for shared scales (section 2.3 of the paper).
    """

    name: ClassVar[str] = "adamw_8bit"

    embedding_bits: Annotated[Literal[32, 8], Field(description="bits of a moment of an embedding's weight")] = 32

    def build(
        self, trained: dict[str, nn.Parameter], learning_rate: float, weight_decay: float, folder: Path | None = None
    ) -> torch.optim.Optimizer:
        """An optimizer over `trained`; raises BadInput where bitsandbytes is missing, and as AdamW does."""
        groups = self.groups(trained, learning_rate, weight_decay)
        eight_bit = _moments.EightBit(next(iter(trained.values())).device, "optim: adamw")
        small = {p for name, p in trained.items() if self.bits(name, p.shape) == 8}
        return EightBitAdamW(groups, self.defaults(learning_rate), eight_bit, small)

    def bits(self, name: str, shape: Sequence[int]) -> int:
        """Bits of a moment of a trained tensor."""
        if math.prod(shape) < _moments.SMALLEST:
            return 32
        return self.embedding_bits if is_embedding(name) else 8

    def state_bytes(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Bytes of optimizer state for trained tensors of these shapes."""
        return sum(_moments.state_bytes(math.prod(shape), self.bits(name, shape)) for name, shape in shapes.items())


class EightBitAdamW(TensorAdamW):
    """AdamW with the moments of the tensors in `small` in 8 bits."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        defaults: dict[str, Any],
        eight_bit: _moments.EightBit,
        small: set[nn.Parameter],
    ):
        super().__init__(groups, defaults)
        self.eight_bit, self.small = eight_bit, small

    def start(self, parameter: Tensor) -> dict[str, Tensor]:
        return self.eight_bit.start(parameter) if parameter in self.small else _moments.start(parameter)

    def update(self, parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        update = self.eight_bit.update if parameter in self.small else _moments.update
        update(parameter, grad, state, group, group["weight_decay"])
