"""Fused half blocks for Llama-like layers: one autograd Function for norm + attention, one for norm + MLP.

They keep little, in the storage dtype: what it is says each of them (fused_attention.py, fused_mlp.py). Adapters'
gradients go back through autograd, so that hooks on parameters see them.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shikomi.adapters._modules import TrainedCopy
from shikomi.adapters.bottleneck import AfterSublayer, BottleneckLayer
from shikomi.model.attention import Layout, Rules
from shikomi.model.fused_attention import Attend, AttentionHalf, Norm
from shikomi.model.fused_mlp import Mlp, MlpHalf
from shikomi.model.keep import Keep
from shikomi.quant._dense import lay_together

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


@dataclass(frozen=True, eq=False)
class Blocks:
    """All layers of a model as half blocks."""

    halves: tuple[tuple[AttentionHalf, MlpHalf], ...]
    storage: torch.dtype

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, layout: Layout, recompute: int | str) -> Tensor:
        """Hidden states (T, H) before the final norm; cos, sin (T, D / 2).

        `recompute`: in how many layers gate and up are computed again in the backward, or "full": keep only h.
        """
        learns = torch.is_grad_enabled()
        keep = Keep(self.storage, apart=learns and recompute != "full")
        for index, (attn, mlp) in enumerate(self.halves):
            if recompute == "full" and learns:
                turn = _Turn()
                parts = (h, attn, mlp, keep, cos, sin, layout, index, True, turn)
                h = checkpoint(self._layer, *parts, use_reentrant=False, context_fn=turn.contexts)
            else:
                again = recompute == "full" or index < int(recompute)
                h = self._layer(h, attn, mlp, keep, cos, sin, layout, index, again, _Turn())
        return h

    def _layer(
        self, h, attn: AttentionHalf, mlp: MlpHalf, keep: Keep, cos, sin, layout, index: int, again: bool, turn
    ) -> Tensor:
        prefix = layout.prefix[index] if layout.prefix else None
        z = Attend.apply(h, attn, keep, cos, sin, layout, prefix, *attn.trained())
        h = z if attn.adds_itself else attn.after.added(h, z, self.storage)  # type: ignore[union-attr]
        skips = turn.second and mlp.adds_itself and not mlp.down.needs_output
        z = Mlp.apply(h, mlp, keep, again, skips, *mlp.trained())
        return z if mlp.adds_itself else mlp.after.added(h, z, self.storage)  # type: ignore[union-attr]


@dataclass(eq=False)
class _Turn:
    """Whether a checkpointed layer is computed for its backward: then its output is not read."""

    second: bool = False

    def contexts(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext(), self._again()

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        self.second = True
        yield


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
