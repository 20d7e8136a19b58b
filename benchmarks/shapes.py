"""Random models of known shapes, written to disk a piece at a time: making one takes no memory to speak of."""

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from measure import Failed

BLOCK = 1 << 20  # numbers that are written together

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 49_152,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES = {
    "1.5B": (
        {
            **LLAMA,
            **dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=29),
            **dict(num_attention_heads=32, num_key_value_heads=8, head_dim=64),
        },
        3.0,
    ),
    "7B": (
        {
            **LLAMA,
            **dict(hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32),
            **dict(num_attention_heads=32, num_key_value_heads=32, head_dim=128),
        },
        8.0,
    ),
}
SMALL = {  # the widths of SmolLM2-135M, in a sixth of its layers
    **LLAMA,
    **dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=5, tie_word_embeddings=True),
    **dict(num_attention_heads=9, num_key_value_heads=3, head_dim=64),
}
VOCABULARY = {
    **LLAMA,
    **dict(hidden_size=640, intermediate_size=2048, num_hidden_layers=4, vocab_size=262_144, tie_word_embeddings=True),
    **dict(num_attention_heads=8, num_key_value_heads=2, head_dim=80),
}


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a Llama-shaped model."""
    h, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv, q = (config["head_dim"] * config[f"num_{n}_heads"] for n in ("key_value", "attention"))
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        found |= {f"{at}.{n}_layernorm.weight": (h,) for n in ("input", "post_attention")}
        attention = {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q)}
        found |= {f"{at}.self_attn.{n}_proj.weight": shape for n, shape in attention.items()}
        found |= {f"{at}.mlp.{n}_proj.weight": (f, h) for n in ("gate", "up")} | {f"{at}.mlp.down_proj.weight": (h, f)}
    return found if config["tie_word_embeddings"] else found | {"lm_head.weight": (v, h)}


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(prod(shape) for shape in shapes.values())


def write_weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Random bf16 tensors in a safetensors file, a million numbers at a time: norms are 1, the rest is small."""
    chance = np.random.default_rng(0).normal(0, 0.02, BLOCK).astype("<f4")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (name, shape) in enumerate(shapes.items()):
            norm = len(shape) == 1 and name.endswith("weight")
            values = np.ones(BLOCK, "<f4") if norm else np.roll(chance, 7919 * number)
            bf16 = (values.view("<u4") >> 16).astype("<u2")
            for first in range(0, prod(shape), BLOCK):
                file.write(bf16[: prod(shape) - first].tobytes())


def make_model(folder: Path, config: dict[str, Any], tokenizer: Path) -> int:
    """A random model written tensor by tensor, with the tokenizer of another; returns its number of parameters."""
    shapes = shapes_of(config)
    room = shutil.disk_usage(folder).free
    if 2.2 * count(shapes) > room:
        raise Failed(f"{2 * count(shapes) / 1e9:.0f} GB of disk needed for random weights, {room / 1e9:.0f} GB free")
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder / "model.safetensors", shapes)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    return count(shapes)
