"""Norm + attention of a Llama-like layer as one autograd Function that keeps little.

Kept are the input h and the rotated q, k, v, in the storage dtype. The norm, the attention's probabilities and output,
and the adapters' inputs are computed again in the backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shikomi.adapters.bottleneck import BottleneckLayer
from shikomi.model import attention
from shikomi.model.attention import Layout, Rules
from shikomi.quant._linear import Backward, Linear, compute


@dataclass(frozen=True, eq=False)
class Norm:
    """RMS norm: x / rms(x) * weight."""

    module: nn.Module  # may be a TrainedCopy, which gives the weight that is in force
    eps: float

    @property
    def weight(self) -> Tensor:
        return self.module.weight  # type: ignore[return-value]

    def forward(self, h: Tensor) -> Tensor:
        return F.rms_norm(h, (h.shape[-1],), self.weight.detach().to(h.dtype), self.eps)

    def backward(self, dy: Tensor, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """dh, and the weight's gradient where it is trained; dy is overwritten."""
        rstd = torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=torch.float32)
        rstd = rstd.pow_(2).div_(h.shape[-1]).add_(self.eps).rsqrt_().to(h.dtype)
        normed = h * rstd
        dweight = None
        if self.weight.requires_grad:
            dweight = (dy * normed).sum(tuple(range(dy.dim() - 1)), dtype=torch.float32).to(self.weight.dtype)
        dy.mul_(self.weight.detach().to(dy.dtype))
        along = torch.linalg.vecdot(dy, normed).unsqueeze(-1).div_(h.shape[-1])
        return dy.addcmul_(normed, along, value=-1).mul_(rstd), dweight

    def trained(self) -> list[nn.Parameter]:
        weight = self.weight
        return [weight] if isinstance(weight, nn.Parameter) and weight.requires_grad else []


@dataclass(frozen=True, eq=False)
class AttentionHalf:
    """h + o(attention(rope(q), rope(k), v)), q, k, v = qkv(norm(h))."""

    norm: Norm
    qkv: tuple[Linear, Linear, Linear]
    out: Linear
    heads: int
    kv_heads: int
    width: int  # of a head
    rules: Rules
    q_norm: Norm | None
    k_norm: Norm | None
    after: BottleneckLayer | None = None  # then h is not added here

    def trained(self) -> list[nn.Parameter]:
        norms = [n for n in (self.norm, self.q_norm, self.k_norm) if n is not None]
        linears: Sequence[Linear] = (*self.qkv, self.out)
        return [p for n in norms for p in n.trained()] + [p for part in linears for p in part.trained()]

    @property
    def adds_itself(self) -> bool:
        """Whether h is added here: no bottleneck stands between."""
        return self.after is None or not self.after.enabled


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> None:
    """Rotary embedding in place, x (heads, T, D), cos and sin (T, D / 2); sign -1 turns back (the gradient)."""
    a, b = x.chunk(2, dim=-1)
    turned = a * cos
    turned.addcmul_(b, sin, value=-sign)
    b.mul_(cos).addcmul_(a, sin, value=sign)
    a.copy_(turned)


def _rotated(half: AttentionHalf, raw: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q, k normed and rotated in place, beside v: (heads + 2 kv heads, T, D)."""
    q, k, _ = raw.split([half.heads, half.kv_heads, half.kv_heads])
    if half.q_norm is not None and half.k_norm is not None:
        q.copy_(half.q_norm.forward(q))
        k.copy_(half.k_norm.forward(k))
    _rotate(raw[: half.heads + half.kv_heads], cos, sin)
    return raw


def _before_rotation(half: AttentionHalf, raw: Tensor | None, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q, k, v as their projections gave them: (T, (heads + 2 kv heads) * D)."""
    if raw is None:
        raw = qkv.clone()
        _rotate(raw[: half.heads + half.kv_heads], cos, sin, sign=-1)
    return raw.transpose(0, 1).reshape(qkv.shape[1], -1)


class Attend(torch.autograd.Function):
    """An AttentionHalf on h (T, H)."""

    @staticmethod
    def forward(ctx, h, half, keep, cos, sin, layout, prefix, *trained):  # h (T, H)
        x = half.norm.forward(h)
        y = compute(half.qkv, x)  # (T, (heads + 2 kv heads) * D)
        raw = y.view(h.shape[0], -1, half.width).transpose(0, 1).contiguous()  # (heads + 2 kv, T, D)
        del x, y
        kept = keep(raw, copy=True) if half.q_norm is not None else None
        qkv = _rotated(half, raw, cos, sin)
        if kept is None:
            kept = keep(qkv)
        o = _attend(half, qkv, prefix, layout)
        out = compute([half.out], o)
        z = keep(out, copy=True) if half.out.needs_output else None
        ctx.save_for_backward(keep(h), kept, cos, sin, z, prefix)
        ctx.half, ctx.layout, ctx.dtype, ctx.adds = half, layout, h.dtype, half.adds_itself
        return out.add_(h) if ctx.adds else out

    @staticmethod
    def backward(ctx, dout):
        stored, kept, cos, sin, z, prefix = ctx.saved_tensors
        half, layout = ctx.half, ctx.layout
        heads, kv = half.heads, half.kv_heads
        raw = None
        qkv = kept.to(ctx.dtype)
        if half.q_norm is not None:
            raw, qkv = qkv, _rotated(half, qkv.clone(), cos, sin)
        q, k, v = qkv.split([heads, kv, kv])
        dout = dout.contiguous()
        out = Backward([half.out], dout)
        do = out.dx
        assert do is not None
        o = torch.empty_like(do) if half.out.needs_input else None
        y = _before_rotation(half, raw, qkv, cos, sin) if any(n.needs_output for n in half.qkv) else None
        dqkv = torch.empty_like(qkv)
        dq, dk, dv = dqkv.split([heads, kv, kv])
        dprefix = _attend_backward(half, do.view(-1, heads, half.width), q, k, v, prefix, layout, dq, dk, dv, o)
        out_grads = out.gradients(o, None if z is None else z.to(ctx.dtype))
        _rotate(dqkv[: heads + kv], cos, sin, sign=-1)
        norm_grads = []
        if raw is not None:
            for norm, dx, x in ((half.q_norm, dq, raw[:heads]), (half.k_norm, dk, raw[heads : heads + kv])):
                _, dweight = norm.backward(dx, x)
                norm_grads += [dweight] if norm.trained() else []
        del qkv, q, k, v, do, o, raw
        dy = dqkv.transpose(0, 1).reshape(dout.shape[0], -1)
        del dqkv, dq, dk, dv
        h = stored.to(ctx.dtype)
        x = half.norm.forward(h) if any(linear.needs_input for linear in half.qkv) else None
        into = Backward(half.qkv, dy)
        dx, qkv_grads = into.dx, into.gradients(x, y)
        dh, dweight = half.norm.backward(dx, h)
        grads = [dweight] if half.norm.trained() else []
        grads += norm_grads + qkv_grads + out_grads
        return dh.add_(dout) if ctx.adds else dh, None, None, None, None, None, dprefix, *grads


def _attend(half: AttentionHalf, qkv: Tensor, prefix: Tensor | None, layout: Layout) -> Tensor:
    q, k, v = qkv.split([half.heads, half.kv_heads, half.kv_heads])
    if prefix is not None:
        k, v = attention.after_prefix(prefix, k, v)
    if qkv.is_cuda:
        o = attention.attention(q, k, v, layout, half.rules)
    else:
        o = attention.forward(q, k, v, layout, half.rules)
    return o.reshape(qkv.shape[1], -1)  # (T, heads * D)


def _attend_backward(half: AttentionHalf, do, q, k, v, prefix, layout, dq, dk, dv, out: Tensor | None) -> Tensor | None:
    """Fills dq, dk, dv, and where it is asked for the attention's output (T, heads * D); the prefix's gradient."""
    if prefix is not None:
        all_k, all_v = attention.after_prefix(prefix, k, v)
        into_k, into_v = torch.empty_like(all_k), torch.empty_like(all_v)
        _attend_backward(half, do, q, all_k, all_v, None, layout, dq, into_k, into_v, out)
        tokens = prefix.shape[2]
        dk.copy_(into_k[:, tokens:])
        dv.copy_(into_v[:, tokens:])
        return torch.stack([into_k[:, :tokens], into_v[:, :tokens]])
    if not q.is_cuda:
        attention.backward(do, q, k, v, layout, half.rules, dq, dk, dv, None if out is None else out.view(do.shape))
        return None
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        o = attention.attention(q, k, v, layout, half.rules)
        for into, grad in zip((dq, dk, dv), torch.autograd.grad(o, (q, k, v), do), strict=True):
            into.copy_(grad)
    if out is not None:
        out.view(do.shape).copy_(o.detach())
    return None
