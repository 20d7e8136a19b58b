"""A dense linear map, and what several of them do that read the same input.

`Linear` is the seam where adapters, quantization and the fused blocks meet: a linear thing computes, gives its
gradients, and says which of its parameters are trained. All of it happens outside autograd; `apply` is the thin
autograd Function for code that is not fused.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

_scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}


class Linear(Protocol):
    """Something linear: a dense or quantized base, or an adapter around one."""

    in_features: int
    out_features: int

    @property
    def base(self) -> "Dense":
        """The frozen (or fully trained) map below any adapter."""

    def trained(self) -> list[nn.Parameter]:
        """Parameters that get a gradient, in the order in which `gradients` returns them."""

    def add_delta(self, y: Tensor, x: Tensor) -> None:
        """Adds in place what the adapter contributes: y (N, out), x (N, in)."""

    def delta_gradients(self, dx: Tensor | None, dy: Tensor, x: Tensor | None) -> list[Tensor]:
        """Adds the adapter's part to dx (N, in) in place; returns gradients in the order of `trained`."""

    @property
    def needs_input(self) -> bool:
        """Whether `delta_gradients` reads x."""


def scratch(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat buffer that the next call overwrites.

    Only for use inside autograd Functions, where nothing keeps the result: autograd cannot see the overwriting.
    """
    key = (dtype, device)
    buffer = _scratch.get(key)
    if buffer is None or buffer.numel() < numel:
        buffer = _scratch[key] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel]


def upcast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`: itself, or a copy in the scratch buffer."""
    if weight.dtype == dtype:
        return weight
    return scratch(weight.numel(), dtype, weight.device).view(weight.shape).copy_(weight)


class Dense(nn.Module):
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

    @property
    def base(self) -> "Dense":
        return self

    def dequantize(self) -> Tensor:
        """W (out, in) in the arithmetic dtype; valid until the next call of any `dequantize`."""
        weight = upcast(self.weight.detach(), self.dtype)
        return weight.t() if self.transposed else weight

    def full_weight(self) -> Tensor:
        """W (out, in) in fp32, a copy of its own: what merging and saving read."""
        weight = self.weight.detach().float()
        return (weight.t() if self.transposed else weight).clone()

    def trained(self) -> list[nn.Parameter]:
        return [p for p in (self.weight, self.bias) if p is not None and p.requires_grad]

    @property
    def needs_input(self) -> bool:
        return self.weight.requires_grad

    def add_delta(self, y: Tensor, x: Tensor) -> None:
        return None

    def delta_gradients(self, dx: Tensor | None, dy: Tensor, x: Tensor | None) -> list[Tensor]:
        grads = []
        if self.weight.requires_grad:
            assert x is not None
            grads.append((x.t() @ dy if self.transposed else dy.t() @ x).to(self.weight.dtype))
        if self.bias is not None and self.bias.requires_grad:
            grads.append(dy.sum(0, dtype=self.bias.dtype))
        return grads

    def forward(self, x: Tensor) -> Tensor:
        return apply(self, x)


def stack(linears: Sequence[Linear]) -> None:
    """Lays the weights of linears that read the same input one after the other in memory, so that `compute` and
    `gradients` need one matrix product for all of them. The parameters stay what they were, as views."""
    weights = [linear.base.weight for linear in linears]
    widened = any(linear.base.dtype != linear.base.weight.dtype for linear in linears)  # copied at each use anyway
    if widened or len({w.dtype for w in weights}) > 1 or any(linear.base.transposed for linear in linears):
        return
    together = torch.cat([w.detach() for w in weights])
    for weight, part in zip(weights, together.split([w.shape[0] for w in weights]), strict=True):
        weight.data = part


def _stacked(linears: Sequence[Linear]) -> Tensor:
    """The weights of all linears as one (sum of out, in) matrix in the arithmetic dtype."""
    first = linears[0].base
    if len(linears) == 1:
        return first.dequantize()
    weights = [linear.base.weight.detach() for linear in linears]
    rows = sum(linear.out_features for linear in linears)
    start = first.weight.data_ptr()
    adjacent = not first.transposed
    for weight in weights:
        shared = weight.untyped_storage().data_ptr() == first.weight.untyped_storage().data_ptr()  # not just neighbours
        adjacent = adjacent and shared and weight.data_ptr() == start and weight.dtype == first.weight.dtype
        start += weight.numel() * weight.element_size()
    if adjacent:
        return upcast(weights[0].as_strided((rows, first.in_features), (first.in_features, 1)), first.dtype)
    together = scratch(rows * first.in_features, first.dtype, first.weight.device).view(rows, first.in_features)
    for linear, part in zip(linears, together.split([linear.out_features for linear in linears]), strict=True):
        part.copy_(linear.base.weight.detach().t() if linear.base.transposed else linear.base.weight.detach())
    return together


def compute(linears: Sequence[Linear], x: Tensor) -> Tensor:
    """Outputs of linears that read the same x (N, in), side by side: (N, sum of out)."""
    outs = [linear.out_features for linear in linears]
    y = x @ _stacked(linears).t()
    for linear, part in zip(linears, y.split(outs, dim=1), strict=True):
        if linear.base.bias is not None:
            part.add_(linear.base.bias.detach().to(x.dtype))
        linear.add_delta(part, x)
    return y


def gradients(
    linears: Sequence[Linear], dy: Tensor, x: Tensor | None, needs_dx: bool = True
) -> tuple[Tensor | None, list[Tensor]]:
    """Backward of `compute`: dx (N, in) or None, and gradients of every `trained` parameter in order.

    dy is (N, sum of out); x may be None where no linear needs its input.
    """
    dx = dy @ _stacked(linears) if needs_dx else None
    grads: list[Tensor] = []
    for linear, part in zip(linears, dy.split([linear.out_features for linear in linears], dim=1), strict=True):
        if linear.trained():
            grads += linear.delta_gradients(dx, part, x)
    return dx, grads


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, linear, *trained):  # x (N, in)
        ctx.linear = linear
        ctx.save_for_backward(x if linear.needs_input else None)
        return compute([linear], x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx, grads = gradients([ctx.linear], dy.contiguous(), x, ctx.needs_input_grad[0])
        return dx, None, *grads


def apply(linear: Linear, x: Tensor) -> Tensor:
    """`linear` on x (..., in) with autograd, in the base's arithmetic dtype: (..., out)."""
    rows = x.reshape(-1, x.shape[-1]).to(linear.base.dtype)
    y = _Apply.apply(rows, linear, *linear.trained())
    return y.view(*x.shape[:-1], linear.out_features)


def widen_embedding(embedding: nn.Embedding, dtype: torch.dtype) -> None:
    """Makes the input embedding answer in the arithmetic dtype, whatever it is stored in."""
    embedding.register_forward_hook(lambda module, args, output: output.to(dtype))
