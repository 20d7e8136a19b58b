"""What layers keep of the forward for the backward, in numbers per token and layer, and their largest temporaries.

On the fused path that is what `model/fused.py` saves. On the others it is what autograd saves of transformers' own
layers: inputs of norms, q, k, v, both sides of products, and inputs of the linear layers whose gradients read them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from shikomi.adapters._adapter import Reads
from shikomi.plan.architecture import Architecture
from shikomi.plan.layers import Size


class Widths(NamedTuple):
    """Numbers per token of one layer. Gate and up can be computed again on the fused path, for some rows at a time."""

    kept: float  # without gate and up
    gate_up: float
    attention: float  # alive at once in the backward of the attention part, without what is kept
    mlp: float  # the same of the feed-forward part, where gate and up are kept
    mlp_rows: float  # the same of each of at most ROWS_AGAIN tokens where they are not
    mlp_ends: float  # and then of every token


ROWS_AGAIN = 512  # of model/fused_mlp.py


def fused(model: Architecture, reads: Reads, copies: bool) -> Widths:
    """Half blocks: h, q, k, v, h2, and outputs where an adapter reads them; `copies`: storage is not arithmetic."""
    s = model.size
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    outputs = sum(1 for path in reads.outputs if path.endswith(("o_proj", "down_proj")))
    outputs_per_layer = (outputs + reads.sublayers) / s.layers
    qkv, gate_up = q + 2 * kv, 2.0 * s.intermediate
    share = _read_share(model, reads)
    normed = model.model_type == "qwen3"
    turned = qkv if any(path.endswith(("q_proj", "k_proj", "v_proj")) for path in reads.outputs) else 0
    attention = (copies + 1 + normed) * qkv + q + q * share("o_proj") + 2 * s.hidden + 2 * kv + turned
    x = share("gate_proj")
    rows = 2 * gate_up + 2 * s.intermediate + 3 * s.hidden
    mlp = rows - (0 if copies else gate_up) + (2 + copies + x - 1) * s.hidden
    halves = 2 * s.hidden + qkv + outputs_per_layer * s.hidden
    if reads.sublayers:  # nothing before the first of them has a gradient
        halves -= (s.hidden + qkv) / s.layers
        if reads.sublayers <= s.layers:  # the first stands behind the feed-forward part
            halves -= s.hidden / s.layers
            gate_up -= gate_up / s.layers
    return Widths(halves, gate_up, attention, mlp, rows, 2 * s.hidden)


def _read_share(model: Architecture, reads: Reads) -> Callable[[str], float]:
    """Of the layers, how many read the input of their linear layer of this name."""

    def share(name: str) -> float:
        return min(1.0, sum(1 for path in reads.inputs if path.endswith(name)) / model.layers)

    return share


class Own(NamedTuple):
    """What transformers' layers of one kind keep, in numbers per token."""

    always: Callable[[Size, int], float]  # of the size and of the experts per token
    inputs: tuple[tuple[str, tuple[str, ...]], ...]  # width ("h", "q", "f") and linear layers that share this input
    outputs: tuple[str, ...] = ()  # linear layers whose output is kept only where an adapter reads it
    norms: Callable[[Size], float] = lambda s: 0.0  # further ones where the weights of the norms are trained


def _qkv(s: Size) -> int:
    return (s.heads + 2 * s.kv_heads) * s.head_dim


def _qk(s: Size) -> int:
    return (s.heads + s.kv_heads) * s.head_dim


LLAMA_INPUTS = (
    ("h", ("q_proj", "k_proj", "v_proj")),
    ("q", ("o_proj",)),
    ("h", ("gate_proj", "up_proj")),
    ("f", ("down_proj",)),
)
OWN: Mapping[str, Own] = {
    "gemma2": Own(
        lambda s, k: 4 * s.hidden + _qkv(s) + 3 * s.intermediate,
        LLAMA_INPUTS,
        ("q_proj", "k_proj"),
        lambda s: 4 * s.hidden,
    ),
    "gemma3_text": Own(
        lambda s, k: 4 * s.hidden + _qkv(s) + _qk(s) + 3 * s.intermediate,
        LLAMA_INPUTS,
        norms=lambda s: 4 * s.hidden + _qk(s),
    ),
    "olmo2": Own(
        lambda s, k: 2 * s.hidden + _qkv(s) + _qk(s) + 3 * s.intermediate,
        LLAMA_INPUTS,
        norms=lambda s: 2 * s.hidden + _qk(s),
    ),
    "phi3": Own(
        lambda s, k: 2 * s.hidden + _qkv(s) + _qk(s) + 3 * s.intermediate,
        (("h", ("qkv_proj",)), ("q", ("o_proj",)), ("h", ("gate_up_proj",)), ("f", ("down_proj",))),
        ("o_proj", "down_proj"),
        lambda s: 2 * s.hidden,
    ),
    "gpt2": Own(
        lambda s, k: 5 * s.hidden + 4 * s.intermediate,
        (("h", ("c_attn",)), ("h", ("attn.c_proj",)), ("h", ("c_fc",)), ("f", ("mlp.c_proj",))),
        ("c_proj",),
    ),
    "gpt_neox": Own(
        lambda s, k: 6 * s.hidden + s.intermediate,
        (
            ("h", ("query_key_value",)),
            ("h", ("attention.dense",)),
            ("h", ("dense_h_to_4h",)),
            ("f", ("dense_4h_to_h",)),
        ),
        (".dense", "dense_4h_to_h"),
    ),
    "opt": Own(
        lambda s, k: 5 * s.hidden + s.intermediate,
        (("h", ("q_proj", "k_proj", "v_proj")), ("h", ("out_proj",)), ("h", ("fc1",))),
        ("q_proj", "out_proj", "fc1", "fc2"),
    ),
    "mixtral": Own(
        lambda s, k: 2 * s.hidden + _qkv(s) + k * (3 * s.intermediate + s.hidden),
        LLAMA_INPUTS[:2],
        ("q_proj", "k_proj", "o_proj"),
        lambda s: 2 * s.hidden,
    ),
    "qwen3_moe": Own(
        lambda s, k: 2 * s.hidden + _qkv(s) + _qk(s) + k * (3 * s.intermediate + s.hidden),
        LLAMA_INPUTS[:2],
        ("o_proj",),
        lambda s: 2 * s.hidden + _qk(s),
    ),
}
ANY = Own(lambda s, k: 4 * s.hidden + _qkv(s) + _qk(s) + 4 * s.intermediate, LLAMA_INPUTS)  # no better is known


def own(model: Architecture, reads: Reads, trained: Collection[str]) -> Widths:
    """transformers' own layers, all in the arithmetic dtype; `trained` are the names of what is trained."""
    s, chosen = model.size, model.experts_per_token
    if model.expert_width:
        s = s._replace(intermediate=model.expert_width)
    kind = OWN.get(model.model_type, ANY)
    sizes = {"h": s.hidden, "q": s.heads * s.head_dim, "f": s.intermediate}
    read = kind.always(s, chosen)
    for width, names in kind.inputs:
        layers = {number for path in reads.inputs if path.endswith(names) for number in re.findall(r"\.(\d+)\.", path)}
        read += sizes[width] * len(layers) / s.layers
    read += sum(model.linears[path][0] for path in reads.outputs if path.endswith(kind.outputs)) / s.layers
    inside = model.tensors.keys() & set(trained)
    if any("norm" in name for name in inside):
        read += kind.norms(s)
    if any(".experts." in name for name in inside):
        read += chosen * (s.hidden + s.intermediate) + s.hidden  # the router's input too
    if reads.sublayers:  # nothing before the first of them has a gradient
        before = s.hidden + _qkv(s) if reads.sublayers > s.layers else read
        read += (reads.sublayers * s.hidden - before) / s.layers
    wide = s.intermediate * max(1, chosen)
    attention = 2 * _qkv(s) + 2 * s.heads * s.head_dim + 3 * s.hidden
    return Widths(read, 0, attention, 5 * wide + 3 * s.hidden, 0, 0)
