"""Tiny random models of the architectures that the engine promises to train."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 97
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)

SPECS: dict[str, dict] = {
    "llama": SMALL,
    "llama-tied": SMALL | {"tie_word_embeddings": True},
    "qwen2": SMALL,
    "qwen3": SMALL,
    "mistral": SMALL | {"sliding_window": 6},
    "gemma2": SMALL
    | {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    "gemma3_text": SMALL
    | {
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 5.0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": SMALL | {"sliding_window": 6},
    "gpt2": dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, eos_token_id=2),
    "gpt_neox": SMALL
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
    "mixtral": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": SMALL
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "bloom": dict(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "jamba": SMALL
    | {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 4,
        "mamba_d_conv": 2,
        "mamba_expand": 2,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": SMALL | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
}
EXPECTED = (
    {name: "packed" for name in SPECS}
    | {name: "fused" for name in ("llama", "llama-tied", "qwen2", "qwen3", "mistral")}
    | {name: "separate" for name in ("bloom", "jamba", "lfm2")}
)


def build(name: str, seed: int = 0):
    """A random fp32 model of an architecture, biases and norms moved off their initial values."""
    torch.manual_seed(seed)
    settings = SPECS[name]
    config = AutoConfig.for_model(name.removesuffix("-tied"), **settings)
    for key in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if key in config.to_dict():
            setattr(config, key, 0.0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
