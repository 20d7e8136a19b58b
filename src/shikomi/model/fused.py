"""Fused half blocks for Llama-like layers: one autograd Function for norm + attention, one for norm + MLP.

They keep little: the input h, the rotated q, k, v, and gate and up (unless recomputed). Norms, silu(gate) * up, the
attention's probabilities and output, and the adapters' inputs are computed again in the backward. What is kept is kept
in the storage dtype. Adapters' gradients go back through autograd, so that hooks on parameters see them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shikomi.adapters._modules import TrainedCopy
from shikomi.adapters.bottleneck import AfterSublayer, BottleneckLayer
from shikomi.model import attention
from shikomi.model.attention import Layout, Rules
from shikomi.quant._dense import lay_together
from shikomi.quant._linear import Backward, Linear, compute

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


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


@dataclass(frozen=True, eq=False)
class Blocks:
    """All layers of a model as half blocks."""

    halves: tuple[tuple[AttentionHalf, MlpHalf], ...]
    storage: torch.dtype

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, layout: Layout, recompute: int | str) -> Tensor:
        """Hidden states (T, H) before the final norm; cos, sin (T, D / 2).

        `recompute`: in how many layers gate and up are computed again in the backward, or "full": keep only h.
        """
        for index, (attn, mlp) in enumerate(self.halves):
            again = recompute != "full" and index < int(recompute)
            if recompute == "full" and torch.is_grad_enabled():
                h = checkpoint(self._layer, h, attn, mlp, cos, sin, layout, index, False, use_reentrant=False)
            else:
                h = self._layer(h, attn, mlp, cos, sin, layout, index, again)
        return h

    def _layer(self, h, attn: AttentionHalf, mlp: MlpHalf, cos, sin, layout, index: int, again: bool) -> Tensor:
        prefix = layout.prefix[index] if layout.prefix else None
        z = _Attend.apply(h, attn, self.storage, cos, sin, layout, prefix, *attn.trained())
        h = z if _adds_itself(attn) else attn.after.added(h, z, self.storage)  # type: ignore[union-attr]
        z = _Mlp.apply(h, mlp, self.storage, again, *mlp.trained())
        return z if _adds_itself(mlp) else mlp.after.added(h, z, self.storage)  # type: ignore[union-attr]


def _adds_itself(half: AttentionHalf | MlpHalf) -> bool:
    """Whether a half adds h to its output: no bottleneck stands between them."""
    return half.after is None or not half.after.enabled


def refusal(model: nn.Module) -> str | None:
    """Why the layers of a decoder cannot be fused; None if they can."""
    for layer in _layers(model):
        if type(layer).__name__ not in LAYERS:
            return f"layers are {type(layer).__name__}"
        if layer.mlp.act_fn.__class__.__name__ not in ("SiLUActivation", "SiLU"):
            return f"activation is {layer.mlp.act_fn.__class__.__name__}"
        rotary = layer.self_attn.config.rope_parameters
        if float(rotary.get("partial_rotary_factor", 1.0)) != 1.0:
            return "rotary embedding is partial"
    return None


def _layers(decoder: nn.Module) -> Iterator:
    yield from decoder.layers  # type: ignore[union-attr, misc]


def fuse(decoder: nn.Module, storage: torch.dtype) -> Blocks:
    """Half blocks over the modules of a Llama-like decoder, which keep working by themselves."""
    halves = []
    for layer in _layers(decoder):
        (attn, after_attn), (mlp, after_mlp) = _within(layer.self_attn), _within(layer.mlp)
        config = attn.config
        norms = dict(attn.named_children())
        q_norm, k_norm = (_norm(norms[n]) if n in norms else None for n in ("q_norm", "k_norm"))
        kind = type(layer).__name__
        if kind == "MistralDecoderLayer":
            window = config.sliding_window
        else:
            window = attn.sliding_window if kind != "LlamaDecoderLayer" else None
        qkv = (attn.q_proj, attn.k_proj, attn.v_proj)
        gate_up = (mlp.gate_proj, mlp.up_proj)
        for together in (qkv, gate_up):
            lay_together([linear.base for linear in together])
        half = AttentionHalf(
            norm=_norm(layer.input_layernorm),
            qkv=qkv,
            out=attn.o_proj,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            width=attn.head_dim,
            rules=Rules(attn.scaling, window),
            q_norm=q_norm,
            k_norm=k_norm,
            after=after_attn,
        )
        halves.append((half, MlpHalf(_norm(layer.post_attention_layernorm), gate_up, mlp.down_proj, after_mlp)))
    return Blocks(tuple(halves), storage)


def _within(sublayer: nn.Module) -> tuple[Any, BottleneckLayer | None]:
    """A sublayer, and the bottleneck on its output."""
    if isinstance(sublayer, AfterSublayer):
        return sublayer.inner, sublayer.bottleneck
    return sublayer, None


def _norm(module: nn.Module) -> Norm:
    inner = module.active if isinstance(module, TrainedCopy) else module
    return Norm(module, inner.variance_epsilon)  # type: ignore[arg-type]


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


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, half, storage, cos, sin, layout, prefix, *trained):  # h (T, H)
        x = half.norm.forward(h)
        y = compute(half.qkv, x)  # (T, (heads + 2 kv heads) * D)
        raw = y.view(h.shape[0], -1, half.width).transpose(0, 1).contiguous()  # (heads + 2 kv, T, D)
        del x, y
        kept = raw.to(storage, copy=half.q_norm is not None)
        qkv = _rotated(half, raw, cos, sin)
        if half.q_norm is None:
            kept = qkv.to(storage)
        o = _attend(half, qkv, prefix, layout)
        out = compute([half.out], o)
        z = out.to(storage, copy=True) if half.out.needs_output else None
        ctx.save_for_backward(h.to(storage), kept, cos, sin, z, prefix)
        ctx.half, ctx.layout, ctx.dtype, ctx.adds = half, layout, h.dtype, _adds_itself(half)
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


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, half, storage, again, *trained):
        gate_up = compute(half.gate_up, half.norm.forward(h))  # (T, 2 F)
        gate, up = gate_up.chunk(2, dim=-1)
        out = compute([half.down], F.silu(gate).mul_(up))
        z = out.to(storage, copy=True) if half.down.needs_output else None
        ctx.save_for_backward(h.to(storage), None if again else gate_up.to(storage), z)
        ctx.half, ctx.dtype, ctx.adds = half, h.dtype, _adds_itself(half)
        return out.add_(h) if ctx.adds else out

    @staticmethod
    def backward(ctx, dout):
        stored, kept, z = ctx.saved_tensors
        half = ctx.half
        dout = dout.contiguous()
        h = stored.to(ctx.dtype)
        x = half.norm.forward(h) if kept is None or any(n.needs_input for n in half.gate_up) else None
        if kept is None:
            assert x is not None
            gate_up = compute(half.gate_up, x)
        else:
            gate_up = kept.to(ctx.dtype)
        del kept
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        act = activated * up if half.down.needs_input else None
        down = Backward([half.down], dout)
        dact, down_grads = down.dx, down.gradients(act, None if z is None else z.to(ctx.dtype))
        assert dact is not None
        del act, down
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.chunk(2, dim=-1)
        torch.mul(dact, activated, out=dup)
        torch.ops.aten.silu_backward.grad_input(dact.mul_(up), gate, grad_input=dgate)
        del activated, dact
        into = Backward(half.gate_up, dgate_up)
        dx, gate_up_grads = into.dx, into.gradients(x, gate_up)
        dh, dweight = half.norm.backward(dx, h)
        grads = [dweight] if half.norm.trained() else []
        return dh.add_(dout) if ctx.adds else dh, None, None, None, *grads, *gate_up_grads, *down_grads
