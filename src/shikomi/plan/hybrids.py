"""Models whose layers are not all attention: Falcon-H1, Jamba, LFM2."""

from __future__ import annotations

from shikomi.plan.layers import Described, Fields, Parts, attention, mlp, size_of


def falcon_h1(f: Fields, p: Parts) -> Described:
    """Attention and a Mamba-2 mixer side by side in every layer."""
    s = size_of(f)
    bias, mlp_bias = bool(f.get("attention_bias", False)), bool(f.get("mlp_bias", False))
    inner = f.count("mamba_d_ssm", f.count("mamba_expand", 2) * s.hidden)
    heads, state = f.count("mamba_n_heads", 128), f.count("mamba_d_state", 256)
    wide = inner + 2 * f.count("mamba_n_groups", 1) * state
    p.embedding("model.embed_tokens", s.vocabulary, s.hidden)
    for i in range(s.layers):
        at = f"model.layers.{i}"
        mlp(p, f"{at}.feed_forward", s.hidden, s.intermediate, mlp_bias)
        mixer = f"{at}.mamba"
        for name in ("dt_bias", "A_log", "D"):
            p.tensor(f"{mixer}.{name}", heads)
        p.tensor(f"{mixer}.conv1d.weight", wide, 1, f.count("mamba_d_conv", 4))
        if f.get("mamba_conv_bias", True):
            p.tensor(f"{mixer}.conv1d.bias", wide)
        p.linear(f"{mixer}.in_proj", inner + wide + heads, s.hidden, bool(f.get("mamba_proj_bias", False)))
        if f.get("mamba_rms_norm", False):
            p.norm(f"{mixer}.norm", inner)
        p.linear(f"{mixer}.out_proj", s.hidden, inner, bool(f.get("projectors_bias", False)))
        attention(p, f"{at}.self_attn", s, bias, bias)
        p.norm(f"{at}.input_layernorm", s.hidden)
        p.norm(f"{at}.pre_ff_layernorm", s.hidden)
    p.norm("model.final_layernorm", s.hidden)
    return s, "separate", {}


def jamba(f: Fields, p: Parts) -> Described:
    """Mamba layers with attention and experts in some of them."""
    s = size_of(f)
    inner, state = f.count("mamba_expand", 2) * s.hidden, f.count("mamba_d_state", 16)
    rank = -(-s.hidden // 16) if f.get("mamba_dt_rank", "auto") == "auto" else f.count("mamba_dt_rank", 1)
    count, every, first = (
        f.count("num_experts", f.count("num_local_experts", 16)),
        f.count("expert_layer_period", 2),
        f.get("expert_layer_offset", 1),
    )
    attends = [i % f.count("attn_layer_period", 8) == f.get("attn_layer_offset", 4) for i in range(s.layers)]
    p.embedding("model.embed_tokens", s.vocabulary, s.hidden)
    for i in range(s.layers):
        at = f"model.layers.{i}"
        if attends[i]:
            attention(p, f"{at}.self_attn", s)
        else:
            mixer = f"{at}.mamba"
            p.tensor(f"{mixer}.A_log", inner, state)
            p.tensor(f"{mixer}.D", inner)
            p.tensor(f"{mixer}.conv1d.weight", inner, 1, f.count("mamba_d_conv", 4))
            if f.get("mamba_conv_bias", True):
                p.tensor(f"{mixer}.conv1d.bias", inner)
            bias = bool(f.get("mamba_proj_bias", False))
            p.linear(f"{mixer}.in_proj", 2 * inner, s.hidden, bias)
            p.linear(f"{mixer}.x_proj", rank + 2 * state, inner)
            p.linear(f"{mixer}.dt_proj", inner, rank, True)
            p.linear(f"{mixer}.out_proj", s.hidden, inner, bias)
            for name, width in (("dt", rank), ("b", state), ("c", state)):
                p.norm(f"{mixer}.{name}_layernorm", width)
        if count > 1 and i % every == first:
            p.tensor(f"{at}.feed_forward.router.weight", count, s.hidden)
            p.experts(f"{at}.feed_forward.experts", count, s.hidden, s.intermediate)
        else:
            mlp(p, f"{at}.feed_forward", s.hidden, s.intermediate)
        p.norm(f"{at}.input_layernorm", s.hidden)
        p.norm(f"{at}.pre_ff_layernorm", s.hidden)
    p.norm("model.final_layernorm", s.hidden)
    used = {"experts": count, "experts_per_token": f.count("num_experts_per_tok", 2), "expert_width": s.intermediate}
    return s, "separate", {"attention_layers": sum(attends), **(used if count > 1 else {})}


def lfm2(f: Fields, p: Parts) -> Described:
    """Short convolutions, with attention in some layers."""
    s = size_of(f)
    kinds = f.get("layer_types", [])
    full = f.get("full_attn_idxs", range(s.layers))
    attends = [k == "full_attention" for k in kinds] or [i in full for i in range(s.layers)]
    inner = f.count("block_ff_dim", s.intermediate)
    if f.get("block_auto_adjust_ff_dim", True):
        multiple = f.count("block_multiple_of", 256)
        inner = int(f.get("block_ffn_dim_multiplier", 1.0) * int(2 * inner / 3))
        inner = multiple * -(-inner // multiple)
    s = s._replace(intermediate=inner)
    conv_bias = bool(f.get("conv_bias", False))
    p.embedding("model.embed_tokens", s.vocabulary, s.hidden)
    for i in range(s.layers):
        at = f"model.layers.{i}"
        if attends[i]:
            attention(p, f"{at}.self_attn", s, out="out_proj")
            p.norm(f"{at}.self_attn.q_layernorm", s.head_dim)
            p.norm(f"{at}.self_attn.k_layernorm", s.head_dim)
        else:
            p.tensor(f"{at}.conv.conv.weight", s.hidden, 1, f.count("conv_L_cache", 3))
            if conv_bias:
                p.tensor(f"{at}.conv.conv.bias", s.hidden)
            p.linear(f"{at}.conv.in_proj", 3 * s.hidden, s.hidden, conv_bias)
            p.linear(f"{at}.conv.out_proj", s.hidden, s.hidden, conv_bias)
        p.linear(f"{at}.feed_forward.w1", inner, s.hidden)
        p.linear(f"{at}.feed_forward.w3", inner, s.hidden)
        p.linear(f"{at}.feed_forward.w2", s.hidden, inner)
        p.norm(f"{at}.operator_norm", s.hidden)
        p.norm(f"{at}.ffn_norm", s.hidden)
    p.norm("model.embedding_norm", s.hidden)
    return s, "separate", {"attention_layers": sum(attends), "tied": bool(f.get("tie_embedding", True))}
