"""Norm + MLP of a Llama-like layer as one autograd Function that keeps the input h, and gate and up unless told not to.

Where gate and up are computed again in the backward, they exist for some rows at a time, however many there are. The
norm, silu(gate) * up and the adapters' inputs are always computed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shikomi.adapters.bottleneck import BottleneckLayer
from shikomi.model.fused_attention import Norm
from shikomi.quant._linear import MASK_ROWS, Backward, Linear, compute

ROWS = MASK_ROWS  # rows of gate and up that exist at a time where they are not kept


@dataclass(frozen=True, eq=False)
class MlpHalf:
    """h + down(silu(gate(x)) * up(x)), x = norm(h)."""

    norm: Norm
    gate_up: tuple[Linear, Linear]
    down: Linear
    after: BottleneckLayer | None = None

    def trained(self) -> list[nn.Parameter]:
        linears: Sequence[Linear] = (*self.gate_up, self.down)
        return self.norm.trained() + [p for part in linears for p in part.trained()]

    @property
    def adds_itself(self) -> bool:
        """Whether h is added here: no bottleneck stands between."""
        return self.after is None or not self.after.enabled


class Mlp(torch.autograd.Function):
    """An MlpHalf on h (T, H).

    With `again` neither gate nor up is kept; they exist for ROWS rows at a time. With `skips` nothing is computed: only
    what the backward reads is saved, and the output is not to be read.
    """

    @staticmethod
    def forward(ctx, h, half, keep, again, skips, *trained):
        kept, out, z = None, torch.empty_like(h), None
        if not again:
            kept = compute(half.gate_up, half.norm.forward(h))  # (T, 2 F)
        for first, rows in _parts(h, kept) if not skips else ():
            gate_up = compute(half.gate_up, half.norm.forward(h[rows]), first) if kept is None else kept
            gate, up = gate_up.chunk(2, dim=-1)
            out[rows] = compute([half.down], F.silu(gate).mul_(up), first)
        if half.down.needs_output:
            z = keep(out, copy=True)
        ctx.save_for_backward(keep(h), None if kept is None else keep(kept), z)
        ctx.half, ctx.dtype, ctx.adds = half, h.dtype, half.adds_itself
        return out.add_(h) if ctx.adds and not skips else out

    @staticmethod
    def backward(ctx, dout):
        stored, kept, z = ctx.saved_tensors
        half = ctx.half
        dout = dout.contiguous()
        dh, sums = torch.empty_like(dout), None
        for first, rows in _parts(dout, kept):
            grads = _mlp_backward(half, dout[rows], stored[rows].to(ctx.dtype), kept, z, first, dh[rows])
            sums = grads if sums is None else [a.add_(b) for a, b in zip(sums, grads, strict=True)]
        return dh.add_(dout) if ctx.adds else dh, None, None, None, None, *(sums or ())


def _parts(h: Tensor, kept: Tensor | None) -> list[tuple[int, slice]]:
    """Rows that are computed together, each with the number of the first: all where gate and up are kept."""
    rows = h.shape[0] if kept is not None else ROWS
    return [(first, slice(first, first + rows)) for first in range(0, h.shape[0], rows)]


def _mlp_backward(half: MlpHalf, dout: Tensor, h: Tensor, kept, z, first: int, dh: Tensor) -> list[Tensor]:
    """Fills dh for these rows, without what h itself adds; returns the gradients of what is trained."""
    x = half.norm.forward(h) if kept is None or any(n.needs_input for n in half.gate_up) else None
    if kept is None:
        assert x is not None
        gate_up = compute(half.gate_up, x, first)
    else:
        gate_up = kept.to(h.dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    activated = F.silu(gate)
    act = activated * up if half.down.needs_input else None
    down = Backward([half.down], dout, first=first)
    y = None if z is None else z[first : first + len(h)].to(h.dtype)
    dact, down_grads = down.dx, down.gradients(act, y)
    assert dact is not None
    del act, down
    dgate_up = torch.empty_like(gate_up)
    dgate, dup = dgate_up.chunk(2, dim=-1)
    torch.mul(dact, activated, out=dup)
    torch.ops.aten.silu_backward.grad_input(dact.mul_(up), gate, grad_input=dgate)
    del activated, dact
    into = Backward(half.gate_up, dgate_up, first=first)
    dx, gate_up_grads = into.dx, into.gradients(x, gate_up)
    assert dx is not None
    dnormed, dweight = half.norm.backward(dx, h)
    dh.copy_(dnormed)
    norm_grads = [dweight] if dweight is not None and half.norm.trained() else []
    return [*norm_grads, *gate_up_grads, *down_grads]
