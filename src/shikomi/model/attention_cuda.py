"""Packed attention on CUDA through torch's own kernels; chosen per call by what the layout and the model ask for."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from shikomi.model.attention import Layout, Rules


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rules: Rules) -> Tensor | None:
    """(T, heads, D) from q (heads, T, D) and k, v (kv heads, P + T, D); None where no kernel serves (fp32)."""
    if q.dtype == torch.float32:
        return None
    if layout.plain and rules.softcap is None:
        return _varlen(q, k, v, layout, rules)
    return _flex(q, k, v, layout, rules)


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rules: Rules) -> Tensor:
    if "cu_seq" not in layout.masks:
        ends = torch.tensor([0, *layout.lengths]).cumsum(0, dtype=torch.int32)
        layout.masks["cu_seq"] = ends.pin_memory().to(q.device, non_blocking=True)
    cu_seq = layout.masks["cu_seq"]
    window = (-1 if rules.window is None else rules.window - 1, 0)
    out = varlen_attn(
        q.transpose(0, 1),
        k.transpose(0, 1),
        v.transpose(0, 1),
        cu_seq,
        cu_seq,
        layout.longest,
        layout.longest,
        scale=rules.scaling,
        window_size=window,
        enable_gqa=q.shape[0] != k.shape[0],
    )
    assert isinstance(out, Tensor)
    return out


def visible(layout: Layout, window: int | None):
    """The mask of a layout as flex_attention's mask_mod: row q sees key row k."""
    ahead = layout.key_positions.shape[0] - layout.positions.shape[0]

    def mask_mod(batch, head, q, k):
        seen = layout.ancestors[layout.segment_of[q], layout.segment_of[(k - ahead).clamp(min=0)]]
        behind = layout.positions[q] - layout.key_positions[k]
        seen = (seen | (k < ahead)) & (behind >= 0)
        return seen if window is None else seen & (behind < window)

    return mask_mod


def block_mask(layout: Layout, window: int | None) -> BlockMask:
    """flex_attention's mask of a layout, made once per micro-batch and window."""
    if window not in layout.masks:
        rows, keys = layout.positions.shape[0], layout.key_positions.shape[0]
        layout.masks[window] = create_block_mask(
            visible(layout, window), None, None, rows, keys, device=layout.positions.device
        )
    return layout.masks[window]


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rules: Rules) -> Tensor:
    cap = rules.softcap

    def capped(score, batch, head, q_row, k_row):
        return score if cap is None else cap * torch.tanh(score / cap)

    out = torch.compile(flex_attention, dynamic=True)(
        q[None],
        k[None],
        v[None],
        score_mod=None if cap is None else capped,
        block_mask=block_mask(layout, rules.window),
        scale=rules.scaling,
        enable_gqa=q.shape[0] != k.shape[0],
    )
    assert isinstance(out, Tensor)
    return out[0].transpose(0, 1)
