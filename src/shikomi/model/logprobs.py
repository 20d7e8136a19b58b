"""The only place where hidden states become log-probabilities.

Only scored (row, target) pairs are multiplied with the head, in tiles sized in bytes; the logits of all positions
never exist. With a frozen head the forward already computes

    J = d logp / d h = ((onehot(target) - softmax(z)) * dz/dz0) W        (N, H),

so that the backward of any objective is grad_logp[:, None] * J: nothing of vocabulary size is kept and nothing is
recomputed. With a trained head the tile is computed again in the backward and the head's own gradients accumulate in
fp32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from shikomi.quant._dense import Dense, upcast
from shikomi.quant._linear import Backward, Linear, compute

TILE_BYTES = 48 << 20  # logits of one tile, in fp32 bytes
WIDENED = 128 << 20  # bytes of a narrow head that are widened at a time; a tile's too where that is not all of it
STRIP = 32  # rows whose softmax stays in cache


class Scored(NamedTuple):
    """What an objective sees of a micro-batch: one ragged record of its scored tokens."""

    logp: Tensor  # (N,) fp32, log-probability of each scored token
    segment: Tensor  # (N,) int64, number of the example in the micro-batch, ascending


class Shape(NamedTuple):
    """How an architecture turns the head's output z0 into logits: softcap * tanh(scale * z0 / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


def log_probabilities(h: Tensor, scored: Tensor, targets: Tensor, head: Linear, shape: Shape) -> Tensor:
    """log p(targets) (N,) in fp32 from hidden states h (T, H) after the final norm.

    scored (N,) are rows of h, targets (N,) token ids; rows may repeat.
    """
    rows = h.index_select(0, scored).to(head.base.dtype)  # a trained final norm of transformers answers in fp32
    trained = head.trained()
    if trained:
        return _TrainedHead.apply(rows, targets, head, shape, *trained)
    return _FrozenHead.apply(rows, targets, head, shape)


def _tiles(n: int, vocabulary: int, size_bytes: int = TILE_BYTES) -> list[slice]:
    size = max(STRIP, size_bytes // (4 * vocabulary) // STRIP * STRIP)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _normalize(z: Tensor, targets: Tensor, shape: Shape, logp: Tensor, jacobian: bool) -> None:
    """logp (n,) of targets from z (n, V); with `jacobian`, z becomes (onehot - softmax) * dlogit/dz0 in place."""
    for a in range(0, z.shape[0], STRIP):
        strip, goal = z[a : a + STRIP], targets[a : a + STRIP]
        x = strip if strip.dtype == torch.float32 else strip.float()
        if shape.scale != 1.0:
            x.mul_(shape.scale)
        slope = None
        if shape.softcap is not None:
            x.div_(shape.softcap).tanh_()
            slope = 1 - x.square() if jacobian else None
            x.mul_(shape.softcap)
        chosen = x.gather(1, goal[:, None])[:, 0]
        top = x.amax(-1, keepdim=True)
        total = x.sub_(top).exp_().sum(-1, keepdim=True)
        logp[a : a + STRIP] = chosen - top[:, 0] - total[:, 0].log()
        if jacobian:
            x.div_(total).neg_()
            x.scatter_add_(1, goal[:, None], torch.ones_like(total))  # the one-hot, before any cast to bf16
            if slope is not None:
                x.mul_(slope)
            if shape.scale != 1.0:
                x.mul_(shape.scale)
            if x is not strip:
                strip.copy_(x)


def _exact_targets(rows: Tensor, targets: Tensor, head: Dense, rounded: Tensor, logp: Tensor, shape: Shape) -> None:
    """Replaces the target's rounded bf16 logit in logp by the exact one: an H-long dot product in fp32.

    Without it bf16 logits leave 0.03 of noise per token.
    """
    weight = head.weight.detach()
    chosen = weight.t()[targets] if head.transposed else weight[targets]
    exact = (rows.float() * chosen.float()).sum(-1)
    if head.bias is not None:
        exact += head.bias.detach().float()[targets]
    logp += _shaped(exact, shape) - _shaped(rounded.float(), shape)


def _shaped(z: Tensor, shape: Shape) -> Tensor:
    z = z * shape.scale
    return z if shape.softcap is None else shape.softcap * torch.tanh(z / shape.softcap)


def pieces(head: Dense) -> list[slice]:
    """Rows of W that are in the arithmetic dtype together: all, unless widening them took more than WIDENED bytes."""
    width = head.in_features * head.dtype.itemsize
    if head.weight.dtype == head.dtype or head.transposed or head.out_features * width <= WIDENED:
        return [slice(0, head.out_features)]
    rows = WIDENED // width
    return [slice(first, min(first + rows, head.out_features)) for first in range(0, head.out_features, rows)]


class _Weight:
    """W (V, H) of a dense head in the arithmetic dtype, in pieces; one piece is widened once, several at each use."""

    def __init__(self, head: Dense):
        self.head, self.parts = head, pieces(head)
        self.whole = head.dequantize() if len(self.parts) == 1 else None

    def _piece(self, part: slice) -> Tensor:
        return upcast(self.head.weight.detach()[part], self.head.dtype) if self.whole is None else self.whole

    def logits(self, x: Tensor, into: Tensor) -> None:
        """Fills `into` (n, V) with x W^T + b."""
        for part in self.parts:
            torch.mm(x, self._piece(part).t(), out=into[:, part])
        if self.head.bias is not None:
            into += self.head.bias.to(into.dtype)

    def back(self, z: Tensor, into: Tensor) -> None:
        """Fills `into` (n, H) with z W."""
        for number, part in enumerate(self.parts):
            torch.addmm(into, z[:, part], self._piece(part), beta=min(number, 1), out=into)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, targets, head, shape):
        n, width = rows.shape
        logp = torch.empty(n, dtype=torch.float32, device=rows.device)
        needs_j = ctx.needs_input_grad[0]
        j = torch.empty(n, width, dtype=rows.dtype, device=rows.device) if needs_j else None
        weight = _Weight(head) if type(head) is Dense else None
        buffer = None
        for tile in _tiles(n, head.out_features, TILE_BYTES if weight is None or weight.whole is not None else WIDENED):
            x = rows[tile]
            if weight is not None:
                if buffer is None:
                    buffer = torch.empty(x.shape[0], head.out_features, dtype=x.dtype, device=x.device)
                z = buffer[: x.shape[0]]
                weight.logits(x, z)
            else:
                z = compute([head], x)
            rounded = z.gather(1, targets[tile, None])[:, 0] if z.dtype != torch.float32 else None
            _normalize(z, targets[tile], shape, logp[tile], needs_j)
            if rounded is not None and weight is not None:
                _exact_targets(x, targets[tile], head, rounded, logp[tile], shape)
            if j is not None and weight is not None:
                weight.back(z, j[tile])
            elif j is not None:
                dx = Backward([head], z).dx
                assert dx is not None
                j[tile] = dx
        if j is not None:
            ctx.save_for_backward(j)
        return logp

    @staticmethod
    def backward(ctx, grad):
        (j,) = ctx.saved_tensors
        return (j * grad[:, None]).to(j.dtype), None, None, None


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, targets, head, shape, *trained):
        logp = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
        for tile in _tiles(rows.shape[0], head.out_features):
            _normalize(compute([head], rows[tile]), targets[tile], shape, logp[tile], jacobian=False)
        ctx.save_for_backward(rows, targets)
        ctx.head, ctx.shape = head, shape
        return logp

    @staticmethod
    def backward(ctx, grad):
        rows, targets = ctx.saved_tensors
        drows = torch.empty_like(rows)
        sums = [torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in ctx.head.trained()]
        ignored = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
        for tile in _tiles(rows.shape[0], ctx.head.out_features):
            z = compute([ctx.head], rows[tile])
            y = z.clone() if ctx.head.needs_output else None
            _normalize(z, targets[tile], ctx.shape, ignored[tile], jacobian=True)
            z.mul_(grad[tile, None])
            back = Backward([ctx.head], z)
            assert back.dx is not None
            drows[tile] = back.dx
            for total, part in zip(sums, back.gradients(rows[tile], y), strict=True):
                total += part
        dtypes = [p.dtype for p in ctx.head.trained()]
        return drows, None, None, None, *[s.to(d) for s, d in zip(sums, dtypes, strict=True)]
