"""What a GGUF file holds beside its weights: the model's config, rotary scaling, tokenizer and special ids."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shikomi.errors import BadInput, Problem
from shikomi.model.gguf_header import GgufHeader, TensorEntry, dequantized, write_skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

# llama.cpp's names (llama-vocab.cpp) of the splitters that are GPT-2's with every digit alone, and of GPT-2's own.
DIGIT_SPLITTERS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
GPT2_SPLITTERS = {
    "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "a.x-4.0", "mellum",
    "modern-bert", "jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code", "roberta-bpe",
}  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"


def read_config(header: GgufHeader) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The transformers config, with bf16 as its dtype, and the raw keys that transformers' tensor processors need."""
    import torch
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        skeleton = Path(folder) / "header.gguf"
        write_skeleton(header, skeleton)
        try:
            raw = load_gguf_checkpoint(str(skeleton), return_tensors=False)["config"]
        except (ValueError, KeyError) as error:
            raise unsupported(header, str(error)) from error
    raw.pop("_model_name_or_path", None)
    for entry in header.tensors:
        if entry.name == "token_embd.weight":
            raw["vocab_size"] = entry.shape[0]
    raw = {key: _shortest(value) for key, value in raw.items()}
    config = AutoConfig.for_model(**raw)
    config.dtype = torch.bfloat16
    _set_rope(header, config)
    return config, raw


def _shortest(value: Any) -> Any:
    """A float that went through float32 as its shortest decimal: 9.999999747378752e-06 becomes 1e-05."""
    import numpy as np

    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def _set_rope(header: GgufHeader, config: PreTrainedConfig) -> None:
    """Scaled rotary positions, which transformers does not read from GGUF: linear, YaRN and Llama 3's factors."""
    prefix = f"{header.architecture}.rope.scaling."
    kind = header.metadata.get(prefix + "type", "none")
    longest = header.metadata.get(prefix + "original_context_length")
    if any(entry.name.startswith("rope_factors_") for entry in header.tensors) or kind == "longrope":
        raise unsupported(header, "its rotary positions are scaled by LongRoPE, which is not read from GGUF")
    if kind in ("linear", "yarn"):
        config.rope_parameters["rope_type"] = kind
        config.rope_parameters["factor"] = _shortest(header.metadata[prefix + "factor"])
        if kind == "yarn":
            config.rope_parameters["original_max_position_embeddings"] = longest
    elif kind != "none":
        raise unsupported(header, f"rope.scaling.type is {kind!r}; none, linear and yarn are read")
    for entry in header.tensors:
        if entry.name == ROPE_FACTORS:
            _set_llama3_rope(header, entry, config)


def _set_llama3_rope(header: GgufHeader, entry: TensorEntry, config: PreTrainedConfig) -> None:
    """Llama 3.1's scaling, of which GGUF keeps only the resulting divisors of the frequencies, (head_dim / 2,)."""
    import numpy as np
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    with header.path.open("rb") as file:
        factors = dequantized(file, entry)
    plain = dict(config.rope_parameters)
    head_dim = 2 * len(factors)
    frequencies = 1.0 / plain["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    config.rope_parameters = {
        **plain,
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if not np.allclose(frequencies / factors, expected.numpy(), rtol=1e-3):
        raise unsupported(header, f"{ROPE_FACTORS} holds a rotary scaling other than Llama 3.1's")


def read_tokenizer(header: GgufHeader) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """The file's tokenizer with its chat template, splitting digits where the original does; and notes to print."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(header.path.parent), gguf_file=header.path.name)
    except (ValueError, KeyError) as error:
        raise unsupported(header, f"its tokenizer cannot be read: {error}") from error
    notes = []
    splitter = header.metadata.get("tokenizer.ggml.pre", "gpt-2")
    backend = tokenizer.backend_tokenizer
    if header.metadata.get("tokenizer.ggml.model") == "gpt2":
        known_by_transformers = json.loads(backend.to_str())["pre_tokenizer"]["type"] != "ByteLevel"
        if splitter in DIGIT_SPLITTERS:
            backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        elif splitter not in GPT2_SPLITTERS and not known_by_transformers:
            notes.append(
                f"{header.path.name} names the text splitter {splitter!r}, which is not known here: text is split as "
                "GPT-2 does, so some words get other tokens than the model was trained on"
            )
    longest = header.metadata.get(f"{header.architecture}.context_length")
    if longest is not None:
        tokenizer.model_max_length = longest
    # where it was converted from is nobody's business later
    for key in ("name_or_path", "is_local", "local_files_only", "gguf_file"):
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer, notes


def write_generation_config(header: GgufHeader, config: PreTrainedConfig, out_folder: Path) -> None:
    """The ids that start, end and pad a text; a chat model may end a turn by another token than a text (`eot`)."""
    from transformers import GenerationConfig

    ends = [header.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    generation = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=unique[0] if len(unique) == 1 else unique or None,
        pad_token_id=config.pad_token_id,
    )
    generation.save_pretrained(out_folder)


def unsupported(header: GgufHeader, reason: str) -> BadInput:
    return BadInput(
        [
            Problem(
                f"this GGUF file ({header.architecture}) cannot be converted",
                file=str(header.path),
                found=reason,
                fix="use the model's safetensors folder or hub id instead of a GGUF file",
            )
        ]
    )
