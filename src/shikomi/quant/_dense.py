"""A dense linear map: W as a tensor, stored in one dtype and multiplied in another."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shikomi.quant._linear import Base, PlainLinear
from shikomi.quant._scratch import scratch


def upcast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`: itself, or a copy in the scratch buffer."""
    if weight.dtype == dtype:
        return weight
    return scratch(weight.numel(), dtype, weight.device).view(weight.shape).copy_(weight)


class Dense(PlainLinear):
    """y = x W^T + b with W stored in one dtype and multiplied in another.

    Where the machine has fast bf16 units both are bf16. Elsewhere weights stay bf16 in memory and are widened, a
    layer at a time, into one reused buffer: exact, since every bf16 number is an fp32 number.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, dtype: torch.dtype, transposed: bool = False):
        super().__init__()
        self.weight = weight  # (out, in), or (in, out) when transposed (GPT-2's Conv1D)
        self.bias = bias
        self.dtype = dtype
        self.transposed = transposed
        shape = tuple(weight.shape)
        self.out_features, self.in_features = shape[::-1] if transposed else shape

    def dequantize(self) -> Tensor:
        """W (out, in) in the arithmetic dtype; valid until the next call of any `dequantize`."""
        weight = upcast(self.weight.detach(), self.dtype)
        return weight.t() if self.transposed else weight

    def write(self, into: Tensor) -> None:
        """W (out, in) into a contiguous buffer, in that buffer's dtype."""
        weight = self.weight.detach()
        into.copy_(weight.t() if self.transposed else weight)

    def full_weight(self) -> Tensor:
        """W (out, in) in fp32, a copy of its own: what merging and saving read."""
        weight = self.weight.detach().float()
        return (weight.t() if self.transposed else weight).clone()

    def trained(self) -> list[nn.Parameter]:
        return [p for p in (self.weight, self.bias) if p is not None and p.requires_grad]

    @property
    def needs_input(self) -> bool:
        return self.weight.requires_grad

    def base_gradients(self, dy: Tensor, x: Tensor | None) -> list[Tensor]:
        grads = []
        if self.weight.requires_grad:
            assert x is not None
            grads.append((x.t() @ dy if self.transposed else dy.t() @ x).to(self.weight.dtype))
        if self.bias is not None and self.bias.requires_grad:
            grads.append(dy.sum(0, dtype=self.bias.dtype))
        return grads

    def joined(self, bases: Sequence[Base]) -> Tensor | None:
        """The weights of dense maps, this one first, as one matrix where they lie one after the other."""
        dense = [base for base in bases if isinstance(base, Dense) and not base.transposed]
        if len(dense) != len(bases):
            return None
        first = self.weight.detach()
        start = first.data_ptr()
        for base in dense:
            weight = base.weight.detach()
            shared = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()  # not just neighbours
            if not shared or weight.data_ptr() != start or weight.dtype != first.dtype:
                return None
            start += weight.numel() * weight.element_size()
        rows = sum(base.out_features for base in dense)
        return upcast(first.as_strided((rows, first.shape[1]), (first.shape[1], 1)), self.dtype)


def lay_together(bases: Sequence[Base]) -> None:
    """Lays dense weights that multiply the same input one after the other in memory: one product without a copy.

    The parameters stay what they were, as views. Weights that are widened at each use are copied anyway, and left.
    """
    dense = [base for base in bases if isinstance(base, Dense) and not base.transposed]
    weights = [base.weight for base in dense]
    widened = any(base.dtype != base.weight.dtype for base in dense)
    if widened or len(dense) < len(bases) or len({w.dtype for w in weights}) > 1:
        return
    together = torch.cat([w.detach() for w in weights])
    for weight, part in zip(weights, together.split([w.shape[0] for w in weights]), strict=True):
        weight.data = part


def widen_embedding(embedding: nn.Embedding, dtype: torch.dtype) -> None:
    """Makes the input embedding answer in the arithmetic dtype, whatever it is stored in."""
    embedding.register_forward_hook(lambda module, args, output: output.to(dtype))
