"""Tiny GGUF files, written as llama.cpp's converter would: its names, its order of heads, its norms plus one."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tiny_models import CHATML, tiny_model, tiny_tokenizer

# key of the metadata -> the config's field, under the names that architectures have for it
KEYS = {
    "block_count": ("num_hidden_layers", "n_layer"),
    "embedding_length": ("hidden_size", "n_embd"),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon",),
    "attention.sliding_window": ("sliding_window",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "context_length": ("max_position_embeddings", "n_positions"),
}
ARCHITECTURE = {"qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
NORM_PLUS_ONE = {"gemma2", "gemma3"}
TRANSPOSED = (".attn_qkv.weight", ".attn_output.weight", ".ffn_up.weight", ".ffn_down.weight")
DIGIT_MERGES = ["2 0", "2 4", "20 24"]  # a vocabulary whose merges would join digits where the splitter let them


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, llama.cpp's token types (1 normal, 3 control) and merges: the tiny tokenizer's, and a few of digits."""
    description = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    ids = dict(description["model"]["vocab"])
    special = {token["content"] for token in description["added_tokens"]}
    merges = [" ".join(merge) for merge in description["model"]["merges"]]
    for merge in DIGIT_MERGES:
        ids.setdefault(merge.replace(" ", ""), len(ids))
        merges.append(merge)
    tokens = sorted(ids, key=ids.__getitem__)
    return tokens, [3 if token in special else 1 for token in tokens], merges


def write_tiny(
    path: Path,
    architecture: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0,
    splitter: str = "smollm",
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    leave_out: tuple[str, ...] = (),
    **overrides: Any,
) -> torch.nn.Module:
    """Write a tiny random model as GGUF and return it in fp32; matrices are stored as `kind`, vectors in fp32."""
    tokens, types, merges = vocabulary()
    model = tiny_model(architecture, vocab_size=len(tokens), **overrides)
    name = ARCHITECTURE.get(architecture, architecture)
    writer = gguf.GGUFWriter(path, name)
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    for key, fields in KEYS.items():
        value = next((config[field] for field in fields if config.get(field) is not None), None)
        if value is not None:
            add: Any = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{name}.{key}", value)
    if rope := config.get("rope_parameters"):
        writer.add_float32(f"{name}.rope.freq_base", rope.get("rope_theta") or rope["full_attention"]["rope_theta"])
    if config.get("head_dim"):
        writer.add_uint32(f"{name}.attention.key_length", config["head_dim"])
    writer.add_name("Tiny Test 8k")
    _write_vocabulary(writer, tokens, types, merges, splitter)
    for key, value in (metadata or {}).items():
        add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(key, value)
    for tensor_name, values in (_tensors(model, name) | (extra or {})).items():
        if not tensor_name.startswith(leave_out or ("-",)):
            _write_tensor(writer, tensor_name, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _write_vocabulary(
    writer: gguf.GGUFWriter, tokens: list[str], types: list[int], merges: list[str], splitter: str
) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)


def _tensors(model: torch.nn.Module, name: str) -> dict[str, np.ndarray]:
    config: Any = model.config
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors: dict[str, np.ndarray] = {}
    for full_name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        module, _, suffix = full_name.rpartition(".")
        if full_name.endswith("experts.gate_up_proj"):
            block = f"blk.{full_name.split('.')[2]}"
            gate, up = np.split(values, 2, axis=1)
            tensors |= {f"{block}.ffn_gate_exps.weight": gate, f"{block}.ffn_up_exps.weight": up}
            continue
        if full_name.endswith("experts.down_proj"):
            tensors[f"blk.{full_name.split('.')[2]}.ffn_down_exps.weight"] = values
            continue
        target = f"{names.get_name(module)}.{suffix}"
        if name == "llama" and ".attn_q." in target:
            values = _permuted(values, config.num_attention_heads)
        if name == "llama" and ".attn_k." in target:
            values = _permuted(values, config.num_key_value_heads)
        if name in NORM_PLUS_ONE and target.endswith("norm.weight"):
            values = values + 1
        if name == "gpt2" and target.endswith(TRANSPOSED):
            values = values.T
        tensors[target] = np.ascontiguousarray(values)
    return tensors


def _permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring numbers, transformers the two halves of a head."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _write_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    values = values.astype(np.float32)
    if values.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
