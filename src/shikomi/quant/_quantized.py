"""A frozen linear map whose weight is stored in few bits; it becomes a matrix only inside an autograd Function."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from shikomi.quant._linear import Base, PlainLinear
from shikomi.quant._scratch import scratch


class Stored(Protocol):
    """A weight (out, in) in few bits: what a scheme makes of a matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def codes(self) -> Tensor:
        """The codes, of an integer dtype."""

    @property
    def options(self) -> dict[str, object]:
        """The name and the options of the scheme that stores it like this."""

    def write(self, into: Tensor) -> None:
        """Dequantizes into a contiguous (out, in) buffer, in that buffer's dtype."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are kept, by the names that bitsandbytes gives them in a file."""

    def to(self, device: torch.device) -> Self:
        """The same weight on another device."""


class Scheme(Protocol):
    """A way to store weights: one file of this folder each."""

    name: ClassVar[str]

    @property
    def bits(self) -> float:
        """Bits per parameter of a large weight, scales included."""

    def quantize(self, weight: Tensor, device: torch.device) -> Stored:
        """Stores a weight (out, in) of any strides on `device`; extra memory is a few MB, whatever its size."""


class Quantized(PlainLinear):
    """y = x W^T + b with W dequantized at each use into a buffer that the next use overwrites.

    W is never trained. Its storage is neither a parameter nor a buffer, so that no change of dtype reaches the scales.
    """

    def __init__(self, stored: Stored, bias: nn.Parameter | None, dtype: torch.dtype):
        super().__init__()
        self.stored = stored
        self.bias = bias
        self.dtype = dtype
        self.out_features, self.in_features = stored.shape

    @property
    def weight(self) -> Tensor:
        """The codes, for code that asks a layer's weight for its device; nothing can multiply them."""
        return self.stored.codes

    def write(self, into: Tensor) -> None:
        """W into a contiguous (out, in) buffer, in that buffer's dtype."""
        self.stored.write(into)

    def dequantize(self) -> Tensor:
        """W (out, in) in the arithmetic dtype; valid until the next call of any `dequantize`."""
        numel = self.out_features * self.in_features
        into = scratch(numel, self.dtype, self.weight.device).view(self.out_features, self.in_features)
        self.stored.write(into)
        return into

    def full_weight(self) -> Tensor:
        """W (out, in) in fp32, a copy of its own: what merging and saving read."""
        into = torch.empty(self.out_features, self.in_features, device=self.weight.device)
        self.stored.write(into)
        return into

    def trained(self) -> list[nn.Parameter]:
        return [self.bias] if self.bias is not None and self.bias.requires_grad else []

    @property
    def needs_input(self) -> bool:
        return False

    def base_gradients(self, dy: Tensor, x: Tensor | None) -> list[Tensor]:
        return [dy.sum(0, dtype=bias.dtype) for bias in self.trained()]

    def joined(self, bases: Sequence[Base]) -> None:
        """Nothing lies side by side: each weight is written into its place."""
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        device = fn(self.stored.codes[:0]).device  # an integer tensor: only moves reach it
        if device != self.stored.codes.device:
            self.stored = self.stored.to(device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {type(self.stored).__name__}"


def resident_bytes(module: nn.Module) -> int:
    """Bytes that the stored weights below a module take; tables that many weights share are counted once."""
    found = {}
    for part in module.modules():
        if isinstance(part, Quantized):
            for tensor in part.stored.tensors().values():
                found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(found.values())


def logical_parameters(module: nn.Module) -> int:
    """How many numbers the stored weights below a module stand for."""
    return sum(p.in_features * p.out_features for p in module.modules() if isinstance(p, Quantized))
