"""Something linear: the seam where adapters, quantization and the fused blocks meet.

A linear thing names its base, its low-rank update and the parameters that it trains; `compute` and `Backward` do the
arithmetic for all that read the same input at once, outside autograd. `apply` is the thin autograd Function for code
that is not fused.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from shikomi.quant._scratch import scratch

MASK_ROWS = 512  # rows of a dropout mask that are drawn together


class LowRank(NamedTuple):
    """What an adapter adds to W: b a, with a (r, in) and b (out, r), b scaled; both in the arithmetic dtype."""

    a: Tensor
    b: Tensor
    dropout: float = 0.0
    key: int | None = None  # seeds the dropout mask of this forward and its backward; None: no dropout

    @property
    def drops(self) -> bool:
        return self.key is not None and self.dropout > 0


class Gradients(NamedTuple):
    """What `Backward` hands to a linear thing: gradients of its low-rank update and of its row factors."""

    a: Tensor | None  # (r, in)
    b: Tensor | None  # (out, r), of the scaled b
    factor: Tensor | None  # (out,)


class Base(Protocol):
    """How W and the bias of a linear map are stored: dense, or in few bits."""

    in_features: int
    out_features: int
    dtype: torch.dtype  # of the arithmetic
    bias: nn.Parameter | None

    @property
    def weight(self) -> Tensor:
        """What is stored, for code that asks a layer's weight for its device or dtype."""

    def write(self, into: Tensor) -> None:
        """W (out, in) into a contiguous buffer, in that buffer's dtype."""

    def dequantize(self) -> Tensor:
        """W (out, in) in the arithmetic dtype; valid until the next call of any `dequantize`."""

    def full_weight(self) -> Tensor:
        """W (out, in) in fp32, a copy of its own: what merging and saving read."""

    def trained(self) -> list[nn.Parameter]:
        """Weight and bias, where they are trained."""

    @property
    def needs_input(self) -> bool:
        """Whether `base_gradients` reads x."""

    def base_gradients(self, dy: Tensor, x: Tensor | None) -> list[Tensor]:
        """Gradients of `trained` from dy (N, out) and x (N, in)."""

    def joined(self, bases: "Sequence[Base]") -> Tensor | None:
        """The weights of `bases`, this one first, as one (sum of out, in) matrix in the arithmetic dtype; None where
        that needs copies."""


class Linear(Protocol):
    """y = factor * (W x + b a x) + bias."""

    in_features: int
    out_features: int

    @property
    def base(self) -> Base:
        """The frozen (or fully trained) map below any adapter."""

    def update(self) -> LowRank | None:
        """The adapter's low-rank update, where there is one."""

    def factor(self) -> Tensor | None:
        """A factor (out,) of every output, where there is one (DoRA)."""

    def trained(self) -> list[nn.Parameter]:
        """Parameters that get a gradient: the adapter's own, then the base's."""

    def own_gradients(self, of: Gradients) -> list[Tensor]:
        """Gradients of the adapter's own trained parameters, in the order of `trained`."""

    @property
    def needs_input(self) -> bool:
        """Whether its gradients need x."""

    @property
    def needs_output(self) -> bool:
        """Whether its gradients need y."""


class PlainLinear(nn.Module):
    """A base that is used as it is: something linear without an adapter."""

    in_features: int
    out_features: int
    needs_output = False

    @property
    def base(self) -> Base:
        return self  # type: ignore[return-value]

    def update(self) -> LowRank | None:
        return None

    def factor(self) -> Tensor | None:
        return None

    def own_gradients(self, of: Gradients) -> list[Tensor]:
        return []

    def forward(self, x: Tensor) -> Tensor:
        return apply(self, x)  # type: ignore[arg-type]


def _side_by_side(linears: Sequence[Linear]) -> Tensor:
    """The weights of all linears as one (sum of out, in) matrix in the arithmetic dtype, until the next such call."""
    bases = [linear.base for linear in linears]
    if len(bases) == 1:
        return bases[0].dequantize()
    together = bases[0].joined(bases)
    if together is None:
        rows, columns = sum(base.out_features for base in bases), bases[0].in_features
        together = scratch(rows * columns, bases[0].dtype, bases[0].weight.device).view(rows, columns)
        for base, part in zip(bases, together.split([base.out_features for base in bases]), strict=True):
            base.write(part)
    return together


def compute(linears: Sequence[Linear], x: Tensor, first: int = 0) -> Tensor:
    """Outputs of linears that read the same x (N, in), side by side: (N, sum of out).

    `first` is the number of x's first row among all rows, a multiple of MASK_ROWS.
    """
    y = x @ _side_by_side(linears).t()
    parts = y.split([linear.out_features for linear in linears], dim=1)
    updates = [linear.update() for linear in linears]
    for part, update, xa in zip(parts, updates, _projected(updates, x, first), strict=True):
        if update is not None:
            part.addmm_(xa, update.b.t())
    for linear, part in zip(linears, parts, strict=True):
        factor = linear.factor()
        if factor is not None:
            part.mul_(factor.to(x.dtype))
        if linear.base.bias is not None:
            part.add_(linear.base.bias.detach().to(x.dtype))
    return y


class Backward:
    """The backward of `compute` in two parts: dx (N, in) at once, and parameters' gradients when x is there.

    dy is (N, sum of out), `first` as `compute` had it. An update's products with dy, and its dropout mask, are made
    once and serve both parts.
    """

    def __init__(self, linears: Sequence[Linear], dy: Tensor, needs_dx: bool = True, first: int = 0):
        self.linears, self.first = linears, first
        outs = [linear.out_features for linear in linears]
        self.raw = dy.split(outs, dim=1)  # before the factors: what biases see
        self.factors = [linear.factor() for linear in linears]
        self.parts = self.raw
        if any(factor is not None for factor in self.factors):
            dy = dy.clone()
            self.parts = dy.split(outs, dim=1)
            for factor, part in zip(self.factors, self.parts, strict=True):
                if factor is not None:
                    part.mul_(factor.to(dy.dtype))
        self.dx = dy @ _side_by_side(linears) if needs_dx else None
        self.updates = [linear.update() for linear in linears]
        self.masks: list[Tensor | None] = [None] * len(linears)  # (N, in): made once, at their first use
        used = needs_dx or any(linear.trained() for linear in linears)
        self.dyb = [  # (N, r)
            None if update is None or not used else part @ update.b
            for update, part in zip(self.updates, self.parts, strict=True)
        ]
        self.together = self._together()
        if self.dx is not None:
            self._add_updates(self.dx)

    def _together(self) -> Tensor | None:
        """dy b of all updates that read x itself, side by side."""
        shared = _shared(self.updates)
        some = [d for i in shared if (d := self.dyb[i]) is not None]
        return None if not some else some[0] if len(some) == 1 else torch.cat(some, 1)

    def _add_updates(self, dx: Tensor) -> None:
        if self.together is not None:
            dx.addmm_(self.together, _joined_a(self.updates))
        for i, (update, d) in enumerate(zip(self.updates, self.dyb, strict=True)):
            if update is not None and d is not None and update.drops:
                dx.addcmul_(d @ update.a, self._mask(i, update, dx))

    def _mask(self, i: int, update: LowRank, like: Tensor) -> Tensor:
        """The dropout mask of update i, for x or dx (N, in)."""
        mask = self.masks[i]
        if mask is None:
            mask = self.masks[i] = _kept(update, like, self.first)
        return mask

    def gradients(self, x: Tensor | None, y: Tensor | None = None) -> list[Tensor]:
        """Gradients of every `trained` parameter in order; x (N, in), y as `compute` gave it.

        x may be None where no linear needs its input, y where none needs its output.
        """
        factor_grads = self._factor_gradients(y)
        low_rank = self._low_rank_gradients(x)
        grads: list[Tensor] = []
        for i, linear in enumerate(self.linears):
            if not linear.trained():
                continue
            if self.updates[i] is not None:
                grads += linear.own_gradients(Gradients(*low_rank[i], factor_grads[i]))
            grads += linear.base.base_gradients(self.raw[i], x)
        return grads

    def _factor_gradients(self, y: Tensor | None) -> list[Tensor | None]:
        found: list[Tensor | None] = [None] * len(self.linears)
        if y is None:
            return found
        for i, out in enumerate(y.split([linear.out_features for linear in self.linears], dim=1)):
            factor, bias = self.factors[i], self.linears[i].base.bias
            if factor is not None and self.linears[i].needs_output:
                plain = out if bias is None else out - bias.detach().to(out.dtype)
                found[i] = (self.raw[i] * plain).sum(0, dtype=torch.float32).div_(factor)
        return found

    def _low_rank_gradients(self, x: Tensor | None) -> list[tuple[Tensor | None, Tensor | None]]:
        """(da, db) of every update whose parameters are trained."""
        found: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(self.updates)
        wanted = [u if linear.trained() else None for u, linear in zip(self.updates, self.linears, strict=True)]
        if all(update is None for update in wanted):
            return found
        assert x is not None
        das: dict[int, Tensor] = {}
        if self.together is not None:
            shared = _shared(self.updates)
            sizes = [update.a.shape[0] for update in self.updates if update is not None and not update.drops]
            das |= dict(zip(shared, (self.together.t() @ x).split(sizes), strict=True))
        shared_xa = _projected([None if u is None or u.drops else u for u in wanted], x, self.first)
        for i, (update, d, xa) in enumerate(zip(wanted, self.dyb, shared_xa, strict=True)):
            if update is None or d is None:
                continue
            if update.drops:
                dropped = x * self._mask(i, update, x)
                xa, da = dropped @ update.a.t(), d.t() @ dropped
            else:
                da = das[i]
            assert xa is not None
            found[i] = (da.float(), (xa.t() @ self.parts[i]).t().float())  # thin on the left: 6 times faster
        return found


def _shared(updates: Sequence[LowRank | None]) -> list[int]:
    """Numbers of the updates that read x itself, without dropout: their products with x are one."""
    return [i for i, u in enumerate(updates) if u is not None and not u.drops]


def _joined_a(updates: Sequence[LowRank | None]) -> Tensor:
    """The a of those updates, one below the other: (sum of r, in)."""
    some = [update.a for update in updates if update is not None and not update.drops]
    return some[0] if len(some) == 1 else torch.cat(some)


def _projected(updates: Sequence[LowRank | None], x: Tensor, first: int) -> list[Tensor | None]:
    """x a^T (N, r) of every update."""
    found: list[Tensor | None] = [None] * len(updates)
    shared = _shared(updates)
    if shared:
        sizes = [update.a.shape[0] for update in updates if update is not None and not update.drops]
        for i, piece in zip(shared, (x @ _joined_a(updates).t()).split(sizes, dim=1), strict=True):
            found[i] = piece
    for i, update in enumerate(updates):
        if update is not None and update.drops:
            found[i] = (x * _kept(update, x, first)) @ update.a.t()
    return found


def _kept(update: LowRank, x: Tensor, first: int) -> Tensor:
    """The dropout mask of an update for x (N, in), scaled to keep the mean.

    It is drawn by blocks of rows, each from the key and its own number, so that rows in parts have the mask of the
    whole; `first` is the number of x's first row.
    """
    assert update.key is not None and first % MASK_ROWS == 0
    keep = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for number, block in enumerate(keep.split(MASK_ROWS), first // MASK_ROWS):
        generator = torch.Generator(x.device).manual_seed((update.key + number * 0x9E3779B97F4A7C15) % (1 << 63))
        block.bernoulli_(1 - update.dropout, generator=generator)
    return keep.div_(1 - update.dropout)


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, linear, *trained):  # x (N, in)
        y = compute([linear], x)
        ctx.linear = linear
        ctx.save_for_backward(x if linear.needs_input else None, y if linear.needs_output else None)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, y = ctx.saved_tensors
        back = Backward([ctx.linear], dy.contiguous(), ctx.needs_input_grad[0])
        return back.dx, None, *back.gradients(x, y)


def apply(linear: Linear, x: Tensor) -> Tensor:
    """`linear` on x (..., in) with autograd, in the base's arithmetic dtype: (..., out)."""
    rows = x.reshape(-1, x.shape[-1]).to(linear.base.dtype)
    y = _Apply.apply(rows, linear, *linear.trained())
    return y.view(*x.shape[:-1], linear.out_features)
