"""How each model type is put together: names and shapes of its parameters from the fields of its config.json.

One function a family; what a config leaves out has the default of transformers' configuration class of that type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shikomi.plan.hybrids import falcon_h1, jamba, lfm2
from shikomi.plan.layers import NORMS, Described, Family, Fields, Parts, Size, attention, mlp, size_of

SANDWICH = (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class LlamaLike:
    """Decoders that differ in biases, norms and the path they take."""

    path: str
    qkv_bias: bool | None = False  # None: the field attention_bias says, for the output too
    qk_norms: str = ""  # "head": one of a head's width; "all": one over all heads
    norms: tuple[str, ...] = NORMS
    head_dim: int | None = None
    tied: bool = False
    fused_names: bool = False  # qkv_proj and gate_up_proj in one (Phi-3)
    windowed: str = ""  # the field that a sliding window depends on; "always": wherever one is given
    experts: tuple[str, ...] = ()  # names of the field that counts experts

    def __call__(self, f: Fields, p: Parts) -> Described:
        s = size_of(f, self.head_dim)
        own = bool(f.get("attention_bias", False))
        qkv, out = (own, own) if self.qkv_bias is None else (self.qkv_bias, False)
        mlp_bias = self.path == "fused" and bool(f.get("mlp_bias", False))
        p.embedding("model.embed_tokens", s.vocabulary, s.hidden)
        count = f.need(*self.experts) if self.experts else 0
        width = f.count("moe_intermediate_size", s.intermediate) if self.experts else 0
        for i in range(s.layers):
            at = f"model.layers.{i}"
            if self.fused_names:
                p.linear(f"{at}.self_attn.o_proj", s.hidden, s.heads * s.head_dim)
                p.linear(f"{at}.self_attn.qkv_proj", (s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden)
                p.linear(f"{at}.mlp.gate_up_proj", 2 * s.intermediate, s.hidden)
                p.linear(f"{at}.mlp.down_proj", s.hidden, s.intermediate)
            else:
                attention(p, f"{at}.self_attn", s, qkv, out)
                if self.qk_norms:
                    whole = self.qk_norms == "all"
                    p.norm(f"{at}.self_attn.q_norm", s.head_dim * (s.heads if whole else 1))
                    p.norm(f"{at}.self_attn.k_norm", s.head_dim * (s.kv_heads if whole else 1))
                if count and self._sparse(f, i):
                    p.tensor(f"{at}.mlp.gate.weight", count, s.hidden)
                    p.experts(f"{at}.mlp.experts", count, s.hidden, width)
                else:
                    mlp(p, f"{at}.mlp", s.hidden, s.intermediate, mlp_bias)
            for name in self.norms:
                p.norm(f"{at}.{name}", s.hidden)
        p.norm("model.norm", s.hidden)
        more: dict[str, Any] = {"tied": self.tied, "window": self._window(f)}
        if count:
            more |= {"experts": count, "experts_per_token": f.need("num_experts_per_tok"), "expert_width": width}
        return s, self.path, more

    @staticmethod
    def _sparse(f: Fields, layer: int) -> bool:
        """Whether a layer has experts; the two fields are Qwen's."""
        return layer not in f.get("mlp_only_layers", []) and (layer + 1) % f.count("decoder_sparse_step", 1) == 0

    def _window(self, f: Fields) -> int | None:
        on = self.windowed == "always" or (self.windowed and f.get(self.windowed, False))
        return f.config.get("sliding_window") if on else None


def _gpt2(f: Fields, p: Parts) -> Described:
    hidden, heads = f.need("n_embd", "hidden_size"), f.need("n_head", "num_attention_heads")
    inner = f.count("n_inner", 4 * hidden)
    layers, vocabulary = f.need("n_layer", "num_hidden_layers"), f.need("vocab_size")
    s = Size(hidden, layers, heads, heads, hidden // heads, inner, vocabulary)
    positions = f.need("n_positions", "max_position_embeddings")
    p.embedding("transformer.wte", vocabulary, hidden)
    p.embedding("transformer.wpe", positions, hidden)
    for i in range(layers):
        at = f"transformer.h.{i}"
        p.norm(f"{at}.ln_1", hidden, True)
        p.linear(f"{at}.attn.c_attn", 3 * hidden, hidden, True, transposed=True)
        p.linear(f"{at}.attn.c_proj", hidden, hidden, True, transposed=True)
        p.norm(f"{at}.ln_2", hidden, True)
        p.linear(f"{at}.mlp.c_fc", inner, hidden, True, transposed=True)
        p.linear(f"{at}.mlp.c_proj", hidden, inner, True, transposed=True)
    p.norm("transformer.ln_f", hidden, True)
    return s, "packed", {"tied": True, "gated": False, "positions": positions}


def _gpt_neox(f: Fields, p: Parts) -> Described:
    s = size_of(f)
    bias = bool(f.get("attention_bias", True))
    p.embedding("gpt_neox.embed_in", s.vocabulary, s.hidden)
    for i in range(s.layers):
        at = f"gpt_neox.layers.{i}"
        p.norm(f"{at}.input_layernorm", s.hidden, True)
        p.norm(f"{at}.post_attention_layernorm", s.hidden, True)
        p.linear(f"{at}.attention.query_key_value", 3 * s.hidden, s.hidden, bias)
        p.linear(f"{at}.attention.dense", s.hidden, s.hidden, bias)
        p.linear(f"{at}.mlp.dense_h_to_4h", s.intermediate, s.hidden, True)
        p.linear(f"{at}.mlp.dense_4h_to_h", s.hidden, s.intermediate, True)
    p.norm("gpt_neox.final_layer_norm", s.hidden, True)
    return s, "packed", {"gated": False}


def _bloom(f: Fields, p: Parts) -> Described:
    hidden, heads = f.need("hidden_size", "n_embed"), f.need("n_head", "num_attention_heads")
    layers, vocabulary = f.need("n_layer", "num_hidden_layers"), f.need("vocab_size")
    s = Size(hidden, layers, heads, heads, hidden // heads, 4 * hidden, vocabulary)
    p.embedding("transformer.word_embeddings", vocabulary, hidden)
    p.norm("transformer.word_embeddings_layernorm", hidden, True)
    for i in range(layers):
        at = f"transformer.h.{i}"
        p.norm(f"{at}.input_layernorm", hidden, True)
        p.linear(f"{at}.self_attention.query_key_value", 3 * hidden, hidden, True)
        p.linear(f"{at}.self_attention.dense", hidden, hidden, True)
        p.norm(f"{at}.post_attention_layernorm", hidden, True)
        p.linear(f"{at}.mlp.dense_h_to_4h", 4 * hidden, hidden, True)
        p.linear(f"{at}.mlp.dense_4h_to_h", hidden, 4 * hidden, True)
    p.norm("transformer.ln_f", hidden, True)
    return s, "separate", {"tied": True, "gated": False}


def _falcon(f: Fields, p: Parts) -> Described:
    hidden, heads = f.need("hidden_size"), f.need("num_attention_heads", "n_head")
    layers, vocabulary = f.need("num_hidden_layers", "n_layer"), f.need("vocab_size")
    new, multi = bool(f.get("new_decoder_architecture", False)), bool(f.get("multi_query", True))
    kv = f.count("num_kv_heads", heads) if new or not multi else 1
    inner, bias = f.count("ffn_hidden_size", 4 * hidden), bool(f.get("bias", False))
    s = Size(hidden, layers, heads, kv, hidden // heads, inner, vocabulary)
    qkv = (heads + 2 * kv) * s.head_dim if new or multi else 3 * hidden
    parallel = bool(f.get("parallel_attn", True))
    two = parallel and f.count("num_ln_in_parallel_attn", 2 if new else 1) == 2
    norms = ("ln_attn", "ln_mlp") if two else ("input_layernorm",) if parallel else NORMS[::-1]
    p.embedding("transformer.word_embeddings", vocabulary, hidden)
    for i in range(layers):
        at = f"transformer.h.{i}"
        p.linear(f"{at}.self_attention.query_key_value", qkv, hidden, bias)
        p.linear(f"{at}.self_attention.dense", hidden, hidden, bias)
        p.linear(f"{at}.mlp.dense_h_to_4h", inner, hidden, bias)
        p.linear(f"{at}.mlp.dense_4h_to_h", hidden, inner, bias)
        for name in norms:
            p.norm(f"{at}.{name}", hidden, True)
    p.norm("transformer.ln_f", hidden, True)
    return s, "separate", {"tied": True, "gated": False}


def _opt(f: Fields, p: Parts) -> Described:
    hidden, heads = f.need("hidden_size"), f.need("num_attention_heads")
    layers, vocabulary, inner = f.need("num_hidden_layers"), f.need("vocab_size"), f.need("ffn_dim")
    s = Size(hidden, layers, heads, heads, hidden // heads, inner, vocabulary)
    bias, affine = bool(f.get("enable_bias", True)), bool(f.get("layer_norm_elementwise_affine", True))
    width = f.count("word_embed_proj_dim", hidden)
    positions = f.need("max_position_embeddings")
    p.embedding("model.decoder.embed_tokens", vocabulary, width)
    p.embedding("model.decoder.embed_positions", positions + 2, hidden)
    if width != hidden:
        p.linear("model.decoder.project_out", width, hidden)
        p.linear("model.decoder.project_in", hidden, width)
    last = f.get("do_layer_norm_before", True) and not f.get("_remove_final_layer_norm", False)
    if affine and last:
        p.norm("model.decoder.final_layer_norm", hidden, True)
    for i in range(layers):
        at = f"model.decoder.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            p.linear(f"{at}.self_attn.{name}", hidden, hidden, bias)
        if affine:
            p.norm(f"{at}.self_attn_layer_norm", hidden, True)
        p.linear(f"{at}.fc1", inner, hidden, bias)
        p.linear(f"{at}.fc2", hidden, inner, bias)
        if affine:
            p.norm(f"{at}.final_layer_norm", hidden, True)
    return s, "packed", {"tied": True, "gated": False, "positions": positions}


FAMILIES: dict[str, Family] = {
    "llama": LlamaLike("fused", qkv_bias=None),
    "mistral": LlamaLike("fused", windowed="always"),
    "qwen2": LlamaLike("fused", qkv_bias=True, windowed="use_sliding_window"),
    "qwen3": LlamaLike("fused", qkv_bias=None, qk_norms="head", head_dim=128, windowed="use_sliding_window"),
    "gemma2": LlamaLike("packed", qkv_bias=None, norms=SANDWICH, head_dim=256, tied=True, windowed="always"),
    "gemma3_text": LlamaLike(
        "packed", qkv_bias=None, qk_norms="head", norms=SANDWICH, head_dim=256, tied=True, windowed="always"
    ),
    "olmo2": LlamaLike("packed", qkv_bias=None, qk_norms="all", norms=(NORMS[1], SANDWICH[3])),
    "phi3": LlamaLike("packed", fused_names=True, windowed="always"),
    "mixtral": LlamaLike("packed", windowed="always", experts=("num_local_experts",)),
    "qwen3_moe": LlamaLike(
        "packed",
        qkv_bias=None,
        qk_norms="head",
        windowed="use_sliding_window",
        experts=("num_experts", "num_local_experts"),
    ),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "falcon": _falcon,
    "bloom": _bloom,
    "falcon_h1": falcon_h1,
    "jamba": jamba,
    "lfm2": lfm2,
}
"""By transformers' model_type."""
